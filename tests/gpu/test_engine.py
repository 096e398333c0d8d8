"""The engine on a GPU: its invariants within the type's bound, graphs against none, the host tier, waiting for nothing.

Skipped where there is no CUDA device.
"""

import asyncio
import gc
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import make_tiny, make_titled, reference_scores

from speeder_engine import Engine, EngineConfig, Item, Request
from speeder_engine.models import linear
from speeder_engine.models.linear import W8Linear
from speeder_engine.random_engine import SHAPES, random_parts
from speeder_engine.triton_kernels.linear_w8 import multiplies_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu"),
]
BOUND = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}  # of scores of order one
SETTINGS = {"device": "cuda", "dtype": "float32", "kv_budget": "4MiB", "max_batch_users": 8, "freeze_gc": False}
SETTINGS |= {"row_buckets": (16, 48, 96, 160), "max_batch_rows": 150}


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=12, step=4)


def made(tiny, warm=True, **settings):
    engine = Engine(tiny.parts(), EngineConfig(**SETTINGS | settings))
    if warm:
        engine.warm_up()
    return engine


def assert_near(found, expected, bound):
    """Equal scores within the bound; the ranking equal but for items whose scores are nearer than that."""
    for ours, theirs in zip(found, expected, strict=True):
        known = dict(theirs)
        for item_id, score in ours:
            if item_id in known:
                assert abs(known[item_id] - score) <= bound
        for mine, other in zip(ours.scores, theirs.scores, strict=True):
            assert abs(mine - other) <= bound
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[0] == other[0] or abs(mine[1] - other[1]) <= 2 * bound


def random_requests(tiny, rng, sessions=True):
    asked = []
    for user in rng.permutation(12)[: rng.integers(1, 9)]:
        options = {}
        if rng.random() < 0.6:
            options = {"candidates": tiny.ids(rng.permutation(120)[: rng.integers(1, 12)])}
            options["head"] = "rank" if rng.random() < 0.7 else "retrieve"
        if rng.random() < 0.2:
            options["allow"] = tiny.ids(rng.permutation(120)[:60])
        history = tiny.ids(rng.integers(0, 120, rng.integers(0, 20)))
        asked.append(Request(history, 10, user_id=f"{user}" if sessions else None, **options))
    return asked


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_answers_equal_transformers(family):
    other, rng = make_tiny(window=12, step=4, family=family), np.random.default_rng(0)
    engine = made(other)
    for length in (0, 1, 5, 12, 17):
        rows, candidates = rng.integers(0, 120, length), rng.permutation(120)[:9]
        retrieve, rank = reference_scores(other, rows, candidates)
        for user in (None, "a", "a"):
            found = dict(engine.recommend(other.ids(rows), k=120, exclude_seen=False, user_id=user))
            scores = torch.tensor([found[item_id] for item_id in other.item_ids])
            torch.testing.assert_close(scores, retrieve, atol=2e-4, rtol=1e-4)
            found = dict(engine.recommend(other.ids(rows), candidates=other.ids(candidates), k=9, user_id=user))
            scores = torch.tensor([found[item_id] for item_id in other.ids(candidates)])
            torch.testing.assert_close(scores, rank, atol=2e-4, rtol=1e-4)


def assert_all_alike(tiny, rng, bound, graphs, eager, cold, on_cpu):
    """Captured passes against eager ones, cold ones, one by one and, twice as far, the CPU."""
    for _ in range(20):
        asked = random_requests(tiny, rng)
        found = graphs.recommend_many(asked)
        assert_near(found, eager.recommend_many(asked), bound)
        assert_near(found, cold.recommend_many(asked), bound)
        assert_near(found, [cold.recommend_many([each])[0] for each in asked], bound)
        assert_near(found, on_cpu.recommend_many(asked), 2 * bound)
        graphs.check_integrity()
    assert graphs.stats().graph_replays > 15
    assert graphs.stats().eager_steps == 0


@pytest.mark.parametrize("dtype", list(BOUND))
def test_graphs_warm_cold_and_packed_answer_alike(tiny, dtype):
    graphs, eager = made(tiny, dtype=dtype), made(tiny, dtype=dtype, graphs="off")
    cold, rng = made(tiny, dtype=dtype, kv_budget="0"), np.random.default_rng(1)
    on_cpu = Engine(tiny.parts(), EngineConfig(device="cpu", dtype="float32"))
    assert_all_alike(tiny, rng, BOUND[dtype], graphs, eager, cold, on_cpu)
    assert eager.stats().graph_replays == 0


@pytest.mark.parametrize("launches", ["apart", "fused", "overlapped"])
def test_however_passes_are_launched_they_answer_alike(launches):
    """Matrices of a real shape, cut as those are; in graphs, one by one, and cold, in fp32."""
    shape = replace(SHAPES["0.5b"], num_layers=3)

    def of_shape(**settings):
        parts = random_parts(shape, num_items=120, window=12, dtype=torch.bfloat16, device="cuda")
        return Engine(parts, EngineConfig(**SETTINGS | {"dtype": "bfloat16", "launches": launches, **settings}))

    graphs, eager, wide = of_shape(), of_shape(graphs="off"), of_shape(dtype="float32", kv_budget="0")
    graphs.warm_up()
    ids, rng = graphs.catalogue.item_ids, np.random.default_rng(9)
    for _ in range(20):
        asked = []
        for user in rng.permutation(12)[: rng.integers(1, 6)]:
            history = [ids[row] for row in rng.integers(0, 120, rng.integers(0, 16))]
            named = [ids[row] for row in rng.permutation(120)[:8]] if rng.random() < 0.6 else None
            asked.append(Request(history, 10, user_id=f"{user}", candidates=named))
        found, expected = graphs.recommend_many(asked), wide.recommend_many(asked)
        bound = 0.05 * max(1.0, *(abs(score) for each in expected for score in each.scores))
        assert_near(found, expected, bound)
        assert_near(found, eager.recommend_many(asked), bound)
    assert graphs.stats().eager_steps == 0


def in_8_bits(kind):
    """Everything in 8 bits, keys and values as this GPU can."""
    return {"weights": kind, "kv": "int8" if kind == "fp8" and not multiplies_fp8(torch.device("cuda")) else kind}


by_kind = pytest.mark.parametrize("kind", ["int8", "fp8"])
# of fp32: a few numbers on the other side of a border between two values of 8 bits
TURNED = {"int8": 5e-3, "fp8": 3e-2}


by_launches = pytest.mark.parametrize("launches", ["fused", "apart"])


@by_kind
@by_launches
def test_8_bits_answer_alike_in_graphs_warm_cold_packed_and_on_the_cpu(tiny, kind, launches, monkeypatch):
    settings, rng = {"launches": launches, **in_8_bits(kind)}, np.random.default_rng(5)
    graphs, eager = made(tiny, **settings), made(tiny, graphs="off", **settings)
    cold = made(tiny, kv_budget="0", **settings)
    # the CPU's reference rounds rows where the GPU does
    rounds_rows = graphs.model.decoder.layers[0].qkv.quantize
    assert rounds_rows == (kind == "fp8" and launches == "apart" and multiplies_fp8(torch.device("cuda")))
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: rounds_rows)
    on_cpu = Engine(tiny.parts(), EngineConfig(device="cpu", cpu_path="torch", dtype="float32", **settings))
    assert_all_alike(tiny, rng, TURNED[kind], graphs, eager, cold, on_cpu)


@by_kind
@by_launches
def test_8_bits_of_a_bf16_engine_answer_alike(tiny, kind, launches):
    """As engines are run: other kernels than in fp32, in blocks of other sizes."""
    settings, rng = {"launches": launches, **in_8_bits(kind)}, np.random.default_rng(8)
    graphs, eager = made(tiny, dtype="bfloat16", **settings), made(tiny, dtype="bfloat16", graphs="off", **settings)
    wide, cold = made(tiny, **settings), made(tiny, dtype="bfloat16", kv_budget="0", **settings)
    bound = BOUND["bfloat16"] + TURNED[kind]
    assert_all_alike(tiny, rng, bound, graphs, eager, cold, wide)


@by_kind
def test_int8_and_fp8_weights_equal_transformers_with_the_same(kind, monkeypatch):
    """Rows as they come, so that fp32 decides."""
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: False)
    tiny, rng = make_tiny(window=12, step=4, family="qwen2"), np.random.default_rng(6)
    engine, largest = made(tiny, weights=kind), 127 if kind == "int8" else 448
    assert all(m.values.is_cuda for m in engine.model.decoder.modules() if isinstance(m, W8Linear))
    for module in tiny.model.backbone.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            scale = weight.abs().amax(1, keepdim=True) / largest
            small = (weight / scale).round() if kind == "int8" else (weight / scale).to(torch.float8_e4m3fn).float()
            weight.copy_(small * scale)
    for length in (0, 5, 12, 17):
        rows, candidates = rng.integers(0, 120, length), rng.permutation(120)[:9]
        retrieve, rank = reference_scores(tiny, rows, candidates)
        for user in (None, "a", "a"):
            found = dict(engine.recommend(tiny.ids(rows), k=120, exclude_seen=False, user_id=user))
            scores = torch.tensor([found[item_id] for item_id in tiny.item_ids])
            torch.testing.assert_close(scores, retrieve, atol=5e-4, rtol=1e-4)
            found = dict(engine.recommend(tiny.ids(rows), candidates=tiny.ids(candidates), k=9, user_id=user))
            scores = torch.tensor([found[item_id] for item_id in tiny.ids(candidates)])
            torch.testing.assert_close(scores, rank, atol=5e-4, rtol=1e-4)


@by_kind
def test_weights_in_8_bits_replace_what_they_were_made_from(kind):
    parts = make_titled().parts()
    linears = [module for module in parts.model.decoder.modules() if isinstance(module, torch.nn.Linear)]
    num_weights, held = sum(m.weight.numel() for m in linears), [weakref.ref(m.weight) for m in linears]
    del linears
    engine = Engine(parts, EngineConfig(**SETTINGS, weights=kind))
    gc.collect()
    assert not any(each() is not None for each in held)
    small = [module for module in engine.model.decoder.modules() if isinstance(module, W8Linear)]
    assert sum(m.values.numel() * m.values.itemsize for m in small) == num_weights
    assert all(m.values.is_cuda and m.scales.is_cuda for m in small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", [None, 1e6])
def test_two_stages_answer_as_one(dtype, error):
    """After upserts too; with a bound that never holds every search is repeated."""
    large, rng = make_tiny(900, window=12, step=4), np.random.default_rng(7)
    ours, theirs = (made(large, dtype=dtype, search=search) for search in ("two_stage", "exact"))
    for engine in (ours, theirs):
        engine.upsert([Item("new", vectors={"text": [0.5] * 8}), Item("0002", vectors={"text": [-0.5] * 8})])
    if error is not None:
        ours.catalogue.coarse.worst_error.fill_(error)
    for _ in range(10):
        histories = [large.ids(rng.integers(0, 900, rng.integers(0, 15))) for _ in range(5)]
        asked = [Request(history, 10, deny=large.ids(range(3, 9))) for history in histories]
        assert_near(ours.recommend_many(asked), theirs.recommend_many(asked), BOUND[dtype])
    assert (ours.stats().searched_again == 50) == (error is not None)


def test_titles_equal_the_cpus():
    titled = make_titled()
    on_gpu, on_cpu = made(titled), Engine(titled.parts(), EngineConfig(device="cpu", dtype="float32"))
    ids = titled.ids(range(12))
    for options in ({"head": "title"}, {}):
        asked = [Request(ids[:8], candidates=ids[:6], user_id="a", **options)]
        found, expected = (dict(engine.recommend_many(asked)[0]) for engine in (on_gpu, on_cpu))
        assert found.keys() == expected.keys()
        for item_id, score in expected.items():
            assert found[item_id] == pytest.approx(score, abs=2e-3, rel=1e-3)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_the_host_tier_restores_before_the_pass(tiny, kind):
    small, bound = (in_8_bits(kind), TURNED[kind]) if kind else ({}, BOUND["float32"])
    budget = "9KB" if kind else "26KB"
    tiered = made(tiny, kv_budget=budget, host_budget="1MiB", debug=True, **small)
    cold = made(tiny, kv_budget="0", **small)
    assert tiered._now().cache.host.is_pinned()
    rng = np.random.default_rng(3)
    histories = {f"{user}": tiny.ids(rng.integers(0, 120, 11)) for user in range(20)}
    for _ in range(4):
        for user, history in histories.items():
            asked = [Request(history[: rng.integers(5, 12)], user_id=user, candidates=tiny.ids(range(4)))]
            assert_near(tiered.recommend_many(asked), cold.recommend_many(asked), bound)
            tiered.check_integrity()
    assert tiered.stats().blocks_restored > 0


def test_upserts_after_the_capture(tiny):
    graphs, eager = made(tiny), made(tiny, graphs="off")
    tokens = graphs.catalogue.tokens.data_ptr()
    ids = tiny.ids(range(6))
    asked = [Request(ids, 50, user_id="ada"), Request(ids, candidates=tiny.ids(range(4, 12)))]
    before = graphs.recommend_many(asked)
    for engine in (graphs, eager):
        engine.upsert([Item("new", vectors={"text": [0.5] * 8}), Item("0002", vectors={"text": [-0.5] * 8})])
        engine.set_available(["0005"], False)
    after = graphs.recommend_many(asked)
    assert after != before
    assert_near(after, eager.recommend_many(asked), BOUND["float32"])
    assert "0005" not in after[1].items
    assert graphs.catalogue.tokens.data_ptr() == tokens
    assert graphs.stats().graphs_captured == 5


def test_nothing_is_captured_later_and_memory_does_not_grow(tiny):
    engine, rng = made(tiny), np.random.default_rng(4)
    captured = engine.stats().graphs_captured
    for _ in range(10):
        engine.recommend_many(random_requests(tiny, rng))
    gc.collect()
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        engine.recommend_many(random_requests(tiny, rng))
    torch.cuda.synchronize()
    assert engine.stats().graphs_captured == captured
    assert torch.cuda.memory_allocated() <= allocated + 4096
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("options", [{}, {"candidates": 9}, {"candidates": 9, "head": "retrieve"}])
def test_a_warm_step_waits_for_its_answer_alone(tiny, options, kind):
    """torch raises where an operation would wait; the answer is waited for by an event, which it doesn't count."""
    engine = made(tiny, **in_8_bits(kind) if kind else {})
    if "candidates" in options:
        options = options | {"candidates": tiny.ids(range(options["candidates"]))}
    users = [Request(tiny.ids(range(u, u + 6)), user_id=f"{u}", **options) for u in range(4)]
    more = [Request(tiny.ids(range(u, u + 7)), user_id=f"{u}", **options) for u in range(4)]
    engine.recommend_many(users)
    engine.recommend_many(users)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = engine.recommend_many(more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(ranking) for ranking in found)


def test_steps_in_a_row_do_not_overwrite_one_another(tiny):
    """`warm` never waits for its pass: the next step must not spoil what is still on its way."""
    engine, cold = made(tiny), made(tiny, kv_budget="0")
    histories = [tiny.ids(np.random.default_rng(u).integers(0, 120, 9)) for u in range(30)]
    for user, history in enumerate(histories):
        engine.warm(f"{user}", history)
    for user, history in enumerate(histories):
        asked = [Request(history, user_id=f"{user}")]
        assert_near(engine.recommend_many(asked), cold.recommend_many(asked), BOUND["float32"])


def test_the_worker_answers_as_a_caller_is_answered(tiny):
    """Its thread has a device and a stream of its own."""
    engine, cold, rng = made(tiny, batch_wait_ms=2.0), made(tiny, kv_budget="0"), np.random.default_rng(10)

    async def submitted(asked):
        return await asyncio.gather(*(engine.submit(each) for each in asked))

    for _ in range(10):
        asked = random_requests(tiny, rng)
        assert_near(asyncio.run(submitted(asked)), cold.recommend_many(asked), BOUND["float32"])
        engine.check_integrity()
    assert engine.stats().graph_replays > 0 and engine.stats().eager_steps == 0
    engine.close()


def test_a_reload_captures_beside_a_worker_that_serves(tiny, tmp_path):
    other = make_tiny(window=12, step=4, seed=1)
    for each, name in ((tiny, "old"), (other, "new")):
        each.parts().save(tmp_path / name)
    engine = Engine.load(tmp_path / "old", **SETTINGS)
    expected = [made(each, kv_budget="0").recommend(tiny.ids(range(5))) for each in (tiny, other)]
    answers, rest = [], threading.Event()

    def ask():
        while not rest.is_set():
            waiting = engine.submit(Request(tiny.ids(range(5)), user_id=f"{len(answers) % 7}"))
            answers.append(asyncio.run(asyncio.wait_for(waiting, 60)))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        while not answers and asking.is_alive():
            time.sleep(0.01)
        engine.reload(tmp_path / "new")
        time.sleep(0.2)
    finally:
        rest.set()
        asking.join()
    engine.check_integrity()
    of_new = [abs(each.scores[0] - expected[1].scores[0]) <= BOUND["float32"] for each in answers]
    assert of_new == sorted(of_new) and of_new[-1] and not of_new[0]
    for is_new, answer in zip(of_new, answers, strict=True):
        assert_near([answer], [expected[is_new]], BOUND["float32"])
    engine.close()


def test_a_growing_catalogue_is_searched(tiny):
    """Beyond what the kernels that merge lists were met with."""
    engine = made(tiny, catalogue_capacity=3000)
    cold = Engine(tiny.parts(), EngineConfig(device="cpu", dtype="float32", catalogue_capacity=3000, kv_budget="0"))
    rng, asked = np.random.default_rng(11), [Request(tiny.ids(range(7)), 20)]
    for start in range(0, 2400, 800):
        new = [Item(f"new {start + i}", vectors={"text": rng.normal(size=8)}) for i in range(800)]
        for each in (engine, cold):
            each.upsert(new)
        assert_near(engine.recommend_many(asked), cold.recommend_many(asked), 2 * BOUND["float32"])


def test_callers_with_streams_of_their_own_are_in_one_order(tiny):
    engine, cold, rng = made(tiny), made(tiny, kv_budget="0"), np.random.default_rng(12)
    for turn in range(20):
        vectors = {"text": rng.normal(size=8)}
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(1_000_000)  # what comes behind it on this stream would be late
            engine.upsert([Item("0002", vectors=vectors)])
            engine.warm(f"{turn}", tiny.ids(range(9)))
        cold.upsert([Item("0002", vectors=vectors)])
        asked = [Request(tiny.ids(range(9)), user_id=f"{turn}")]
        assert_near(engine.recommend_many(asked), cold.recommend_many(asked), BOUND["float32"])
