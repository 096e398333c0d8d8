"""A captured bucket through the kernels, interpreted: padding rows beside real ones, with and without graphs."""

import pytest
import torch
from reference import make_tiny

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.triton_kernels import (
    add_rms_norm,
    candidate_scores,
    compressed_attention,
    few_rows,
    fused_linear,
    fused_qkv,
    item_embed,
    keep_last,
    qk_norm_rope_store,
    swiglu,
)

APART, FUSED = {swiglu, qk_norm_rope_store}, {few_rows, fused_linear, fused_qkv}
KERNELS = {add_rms_norm, compressed_attention, item_embed, keep_last, candidate_scores} | APART | FUSED


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_padding_disturbs_no_kernel(dtype, bound, monkeypatch):
    tiny = make_tiny(window=6, step=2, head_dim=32)
    ids = tiny.ids(range(30))
    settings = {
        "dtype": dtype,
        "cpu_path": "torch",
        "kv_budget": "4MiB",
        "max_batch_users": 2,
        "row_buckets": (16,),
    }
    expected = Engine(tiny.parts(), EngineConfig(**settings))
    engine = Engine(tiny.parts(), EngineConfig(**settings, graphs="on", freeze_gc=False, debug=True))
    engine.warm_up()
    launched = set()
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "runs_triton", lambda *tensors, kernel=kernel: launched.add(kernel) is None)
    asked = [Request(ids[:3], user_id="a"), Request(ids[4:6], candidates=ids[20:23])]
    found = engine.recommend_many(asked)
    shared = engine._now().cache.shared_blocks
    monkeypatch.undo()
    assert launched == KERNELS - (FUSED if dtype == "float32" else APART)
    assert torch.equal(engine._now().cache.keys[:, shared], expected._now().cache.keys[:, shared])
    for ours, theirs in zip(found, expected.recommend_many(asked), strict=True):
        assert ours.items == theirs.items
        assert list(ours.scores) == pytest.approx(list(theirs.scores), abs=bound)
    assert engine.stats().graph_replays == 1
