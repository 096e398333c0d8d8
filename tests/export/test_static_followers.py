"""Who follows whom inside exported graphs: their answers are the engine's, sessions and corrections included."""

import numpy as np
import pytest
import torch
from reference import make_tiny

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.config import FollowersConfig
from speeder_engine.export.onnx_engine import OnnxEngine
from speeder_engine.export.static_followers import StaticFollowers

CONFIG = FollowersConfig(window=3, last=5, keep=4)


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(num_layers=1, followers=CONFIG)


@pytest.mark.parametrize("reduces", [True, False])
def test_it_is_f_on_the_host(tiny, reduces):
    """Three items of 123 came later: they follow nobody, and nobody them."""
    static, scorer = StaticFollowers(tiny.model.followers, 123, reduces), tiny.model.followers.scorer()
    rng = np.random.default_rng(0)
    lengths = torch.tensor([0, 1, 4, 9, 12])
    history = torch.from_numpy(rng.integers(0, 120, (5, 12)))
    history[:, 3] = torch.tensor([122, 121, 120, 122, 121])
    found = static(static.last_rows(history, lengths))
    assert found.shape == (5, 123) and not found[:, 120:].any()
    for b, length in enumerate(lengths.tolist()):
        expected = scorer.following(history[b, :length].numpy().astype(np.int32)).of(np.arange(123))
        np.testing.assert_allclose(found[b], expected, rtol=1e-5, atol=1e-6)
    short = static.last_rows(history[:, :3], lengths.clamp(max=3))
    assert short.shape == (5, CONFIG.last) and (short[:, 3:] == -1).all()


def test_exports_answer_as_the_engine_does(ort):
    """The other flavour's do in `test_tensorrt.py`."""
    assert "last_rows" in {each["name"] for each in ort.manifest["graphs"]["extend"]["inputs"]}
    rng = np.random.default_rng(1)
    with OnnxEngine.load(ort.path) as exported, ort.engine() as engine:
        history = ort.tiny.ids(rng.integers(0, 120, 6))
        for turn in range(4):
            history = [*history, ort.tiny.item_ids[rng.integers(120)]]
            if turn == 2:
                history[3] = ort.tiny.item_ids[rng.integers(120)]
            times = list(range(len(history)))
            for named in ({"k": 30}, {"k": 9, "candidates": ort.tiny.item_ids[:9]}):
                request = Request(history, user_id="u", times=times, **named)
                found, expected = exported.recommend_many([request])[0], engine.recommend_many([request])[0]
                np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
                assert found.items == expected.items
        asked = [Request(history, 30, times=times)]
        calendar = ort.tiny.model.config.prompt.calendar
        plain = make_tiny(num_layers=2, family="qwen3", calendar=calendar)
        with Engine(plain.parts(), EngineConfig(dtype="float32", kv_budget="0")) as without:
            assert without.recommend_many(asked)[0].items != engine.recommend_many(asked)[0].items
