"""The engine through its kernels, interpreted, against the engine through their references."""

import pytest
import torch
from reference import make_tiny, make_titled

from speeder_engine import Engine, EngineConfig, Request, runner
from speeder_engine.models import linear
from speeder_engine.triton_kernels import (
    add_rms_norm,
    candidate_scores,
    compressed_attention,
    few_rows,
    fused_linear,
    fused_qkv,
    item_embed,
    keep_last,
    linear_w8,
    qk_norm_rope_store,
    quantize_rows,
    swiglu,
    top_scores,
    tree_attention,
)

BODY = (add_rms_norm, compressed_attention, item_embed, keep_last, qk_norm_rope_store, candidate_scores, top_scores)
KERNELS = (*BODY, swiglu, tree_attention)
SMALL = (*(kernel for kernel in KERNELS if kernel is not swiglu), linear_w8, quantize_rows)  # which gates too
FUSED = (*(kernel for kernel in KERNELS if kernel is not swiglu), few_rows, fused_linear)  # in bf16, few rows as here
ALL = (*KERNELS, linear_w8, quantize_rows, few_rows, fused_linear, fused_qkv)


@pytest.fixture
def through_kernels(monkeypatch):
    """Counts the launches of each file."""
    counts = dict.fromkeys((each.__name__.split(".")[-1] for each in ALL), 0)

    def counted(name):
        def runs_triton(*tensors):
            counts[name] += 1
            return True

        return runs_triton

    def switch():
        for each in ALL:
            monkeypatch.setattr(each, "runs_triton", counted(each.__name__.split(".")[-1]))
        monkeypatch.setattr(runner, "runs_triton", lambda *tensors: True)

    return switch, counts


def answers(engine, ids, title):
    """A cold batch, then an append with candidates beside it; or words, scored and written."""
    scores = []
    if title:
        asked = [Request(ids[:3], 2, user_id="a", candidates=ids[20:22], head="title"), Request(ids[4:5], 5)]
        scores = [len(each.text) for each in engine.generate([Request(ids[:3], user_id="a")], max_tokens=2)]
    else:
        cold = engine.recommend_many([Request(ids[:3], 5, user_id="a"), Request((), 5)])
        scores = [score for ranking in cold for _, score in ranking]
        asked = [Request(ids[:4], 4, user_id="a", candidates=ids[20:24], head="rank"), Request(ids[2:4], 5)]
    scores += [score for ranking in engine.recommend_many(asked) for _, score in ranking]
    engine.check_integrity()
    return torch.tensor(scores)


def launched(counts):
    return {name for name, count in counts.items() if count}


def names(kernels):
    return {each.__name__.split(".")[-1] for each in kernels}


@pytest.mark.parametrize(("title", "dtype"), [(False, "bfloat16"), (True, "float32")])
def test_answers_are_the_same(title, dtype, through_kernels):
    tiny = make_titled(window=6, step=2) if title else make_tiny(family="qwen3", window=6, step=2, num_layers=2)
    ids = tuple(tiny.ids(range(30)))
    config = EngineConfig(dtype=dtype, kv_budget="4MiB", cpu_path="torch", debug=True)
    expected = answers(Engine(tiny.parts(), config), ids, title)
    switch, counts = through_kernels
    switch()
    found = answers(Engine(tiny.parts(), config), ids, title)
    kernels = KERNELS if dtype == "float32" else FUSED
    assert launched(counts) == names(kernels) - (set() if title else {"tree_attention"})
    bound = 1e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


# the interpreter loses the carry where a number is rounded up to the next power of two in fp8: 127.9 becomes 64
@pytest.mark.parametrize(
    ("title", "weights", "kv", "bound"), [(False, "fp8", "int8", 1e-4), (True, "int8", "fp8", 0.05)]
)
def test_answers_in_8_bits_are_the_same(title, weights, kv, bound, through_kernels):
    """In fp32, so that both ways round the same numbers to 8 bits."""
    tiny = make_titled(window=6, step=2) if title else make_tiny(family="qwen2", window=6, step=2, num_layers=2)
    ids = tuple(tiny.ids(range(30)))
    settings = {"dtype": "float32", "kv_budget": "4MiB", "cpu_path": "torch", "debug": True}
    config = EngineConfig(**settings, weights=weights, kv=kv)
    plain, expected = (answers(Engine(tiny.parts(), each), ids, title) for each in (EngineConfig(**settings), config))
    switch, counts = through_kernels
    switch()
    found = answers(Engine(tiny.parts(), config), ids, title)
    assert launched(counts) == names(SMALL) - (set() if title else {"tree_attention"})
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    assert (expected - plain).abs().max() > 1e-2


def test_rows_in_fp8_answer_the_same(through_kernels, monkeypatch):
    """As on a GPU that multiplies fp8: norms and sums on the way to it."""
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: True)
    tiny = make_tiny(family="qwen2", window=6, step=2, num_layers=2)
    ids, config = tuple(tiny.ids(range(30))), EngineConfig(dtype="float32", weights="fp8", cpu_path="torch")
    expected = answers(Engine(tiny.parts(), config), ids, False)
    switch, counts = through_kernels
    switch()
    found = answers(Engine(tiny.parts(), config), ids, False)
    assert launched(counts) == names(SMALL) - {"tree_attention"}
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("title", "num_layers"), [(False, 1), (True, 3)])
def test_heads_as_wide_as_tiles_are_projected_and_rotated_at_once(title, num_layers, through_kernels):
    """Text, whose keys are not kept, among the rows; titles that are written are turned by the other kernel."""
    tiny = make_tiny(family="qwen3", window=6, step=2, head_dim=32, num_layers=num_layers)
    tiny = make_titled(window=6, step=2, head_dim=32) if title else tiny
    ids, config = tuple(tiny.ids(range(30))), EngineConfig(dtype="bfloat16", kv_budget="4MiB", cpu_path="torch")
    expected = answers(Engine(tiny.parts(), config), ids, title)
    switch, counts = through_kernels
    switch()
    found = answers(Engine(tiny.parts(), config), ids, title)
    unused = set() if title else {"qk_norm_rope_store", "tree_attention"}
    assert launched(counts) == names((*FUSED, fused_qkv)) - unused
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)


def test_fused_layers_of_8_bit_weights_answer_the_same(through_kernels):
    tiny = make_tiny(family="qwen2", window=6, step=2, num_layers=2)
    ids = tuple(tiny.ids(range(30)))
    config = EngineConfig(dtype="bfloat16", weights="int8", kv_budget="4MiB", cpu_path="torch")
    expected = answers(Engine(tiny.parts(), config), ids, False)
    switch, counts = through_kernels
    switch()
    found = answers(Engine(tiny.parts(), config), ids, False)
    assert launched(counts) == names((*FUSED, quantize_rows)) - {"tree_attention"}
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
