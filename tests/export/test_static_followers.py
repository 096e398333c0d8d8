"""Who follows whom inside exported graphs: their answers are the engine's, sessions and corrections included."""

import numpy as np
import pytest
import torch
from reference import make_tiny

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.config import FollowersConfig
from speeder_engine.export import OnnxConfig, export_onnx
from speeder_engine.export.onnx_engine import OnnxEngine
from speeder_engine.export.static_followers import StaticFollowers

CONFIG = FollowersConfig(window=3, last=5, keep=4)


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(num_layers=1, followers=CONFIG)


@pytest.mark.parametrize("reduces", [True, False])
def test_it_is_f_on_the_host(tiny, reduces):
    static, scorer = StaticFollowers(tiny.model.followers, reduces), tiny.model.followers.scorer()
    rng = np.random.default_rng(0)
    lengths = torch.tensor([0, 1, 4, 9, 12])
    history = torch.from_numpy(rng.integers(0, 120, (5, 12)))
    found = static(static.last_rows(history, lengths))
    for b, length in enumerate(lengths.tolist()):
        expected = scorer.following(history[b, :length].numpy().astype(np.int32)).of(np.arange(120))
        np.testing.assert_allclose(found[b], expected, rtol=1e-5, atol=1e-6)
    short = static.last_rows(history[:, :3], lengths.clamp(max=3))
    assert short.shape == (5, CONFIG.last) and (short[:, 3:] == -1).all()


@pytest.mark.parametrize("flavour", ["standard", "ort"])
def test_exports_answer_as_the_engine_does(tiny, tmp_path, flavour):
    tiny.parts().save(tmp_path / "engine")
    # compared with the engine for 40 users and every graph before it is published
    manifest = export_onnx(tmp_path / "engine", tmp_path / "onnx", OnnxConfig(flavour), 40)
    assert "last_rows" in {each["name"] for each in manifest["graphs"]["extend"]["inputs"]}
    plain = make_tiny(num_layers=1)
    rng = np.random.default_rng(1)
    config = EngineConfig(dtype="float32", kv_budget="0")
    with OnnxEngine.load(tmp_path / "onnx") as exported, Engine(tiny.parts(), config) as engine:
        history = tiny.ids(rng.integers(0, 120, 6))
        for turn in range(4):
            history = [*history, tiny.item_ids[rng.integers(120)]]
            if turn == 2:
                history[3] = tiny.item_ids[rng.integers(120)]
            request = Request(history, 30, user_id="u")
            found, expected = exported.recommend_many([request])[0], engine.recommend_many([request])[0]
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
            assert found.items == expected.items
            request = Request(history, 9, user_id="u", candidates=tiny.item_ids[:9])
            found, expected = exported.recommend_many([request])[0], engine.recommend_many([request])[0]
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    with Engine(plain.parts(), config) as without:
        assert without.recommend(history, 30).items != expected.items
