"""The demo itself, on a recipe of seconds: twice into the same folder, on made data and on a folder of one's own."""

from functools import partial

import pytest

from speeder_engine import demo
from speeder_engine.demo import make_catalogue, run_demo
from speeder_engine.encoders import fitted_image
from speeder_engine.encoders.convnet import ConvNetConfig
from speeder_engine.engine import Engine
from speeder_engine.errors import ConfigError
from speeder_engine.synthetic import write_synthetic_dataset

RECIPE = """
instruction: "Next:"
window: 20
window_step: 5
text_encoder: fitted
backbone: {hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32, vocab_size: 300}
collaborative: {epochs: 1}
batch_size: 128
stages:
  - {name: S1, modalities: [text], epochs: 1, learning_rate: 0.003}
  - {name: S3, modalities: [text, collaborative, image], epochs: 1, learning_rate: 0.003}
"""


@pytest.mark.slow
def test_made_data_then_a_folder_then_made_data_again(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "seconds.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.setattr(demo, "write_synthetic_dataset", partial(write_synthetic_dataset, num_users=300, num_items=160))
    monkeypatch.setattr(fitted_image, "ConvNetConfig", partial(ConvNetConfig, steps=3))
    own = write_synthetic_dataset(tmp_path / "own", num_users=200, num_items=120, seed=3)
    sizes = []
    for data in (None, own, None):
        run_demo(data, tmp_path / "demo", str(recipe))
        printed = capsys.readouterr().out
        for word in ("took next", "cold user", "warm session", "candidates ranked", "speeder", "popularity", "vhr@1"):
            assert word in printed
        sizes.append(len(Engine.load(tmp_path / "demo" / "engine").catalogue))
    assert sizes[0] == sizes[2] > sizes[1]


def test_a_folder_that_no_demo_wrote_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds 'thesis.tex', which no demo wrote"):
        make_catalogue(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
