"""Judge: the same model called by hand on the pixels its own processor gives."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from speeder_engine.encoders import sources
from speeder_engine.encoders.image import TransformersImageEncoder
from speeder_engine.encoders.load import load_encoder
from speeder_engine.errors import ConfigError, SpeederWarning

try:
    AutoImageProcessor.from_pretrained("nowhere", local_files_only=True)
except ImportError:
    pytest.skip("this transformers has no image processors without torchvision", allow_module_level=True)
except OSError:
    pass  # nothing is there, but it would have been read

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(sources, "has_native_bf16", lambda device: False)


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 50}
    if request.param == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12))
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "tower")
    processor.save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def by_hand(folder, images):
    model = (
        (CLIPModel if "clip" in (folder / "config.json").read_text() else SiglipModel).from_pretrained(folder).eval()
    )
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [Image.open(BytesIO(image)).convert("RGB") for image in images]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        return (model.visual_projection(pooled) if isinstance(model, CLIPModel) else pooled).numpy()


def test_encodes_as_the_model_called_by_hand(folder, covers):
    encoder = TransformersImageEncoder(folder, batch_size=4)
    features = encoder.encode(covers[0][:10])
    assert features.present.all() and features.dim == encoder.dim
    np.testing.assert_allclose(features.values, by_hand(folder, covers[0][:10]), atol=1e-5)


def test_the_saved_folder_is_self_contained(folder, covers, tmp_path):
    encoder = TransformersImageEncoder(folder, label="tiny")
    encoder.save(tmp_path / "saved")
    folder.rename(tmp_path / "gone")
    loaded = load_encoder(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.name, loaded.modality) == (encoder.fingerprint, encoder.name, "image")
    np.testing.assert_array_equal(loaded.encode(covers[0][:5]).values, encoder.encode(covers[0][:5]).values)


def test_undecodable_images_are_counted_in_one_warning(folder, covers):
    images = [b"no image", covers[0][0], None, covers[0][1][:200]]
    encoder = TransformersImageEncoder(folder, batch_size=1)
    with pytest.warns(SpeederWarning, match=r"^2 of 3 images .*: 'input 0', 'input 3'$") as caught:
        features = encoder.encode(images)
    assert len(caught) == 1
    np.testing.assert_array_equal(features.present, [False, True, False, False])
    np.testing.assert_allclose(features.values[1:2], by_hand(folder, covers[0][:1]), atol=1e-5)


def test_a_plain_tensor_as_output_is_taken_too(folder, covers, monkeypatch):
    encoder = TransformersImageEncoder(folder)
    expected = encoder.encode(covers[0][:2]).values
    returns_output = encoder.model.get_image_features
    monkeypatch.setattr(encoder.model, "get_image_features", lambda **pixels: returns_output(**pixels).pooler_output)
    np.testing.assert_array_equal(encoder.encode(covers[0][:2]).values, expected)


def test_refuses_a_model_without_an_image_tower(folder):
    BertModel(BertConfig(vocab_size=10, **TOWER)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="BertModel has no get_image_features"):
        TransformersImageEncoder(folder)
