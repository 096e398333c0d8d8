"""Passes of fixed buckets, on the CPU: what is captured on a GPU is run again here, on the same static tensors."""

import gc
import sys
import threading
import tracemalloc
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import make_tiny, make_titled

from speeder_engine import ConfigError, Engine, EngineConfig, Item, Request
from speeder_engine import serving as serving_module
from speeder_engine.batch import ROW_TILE, make_batch
from speeder_engine.config import CalendarConfig
from speeder_engine.graphs import CudaCapture
from speeder_engine.step_buffers import Bucket, make_buckets
from speeder_engine.transfer import Transfer

SETTINGS = {"dtype": "float32", "kv_budget": "4MiB", "max_batch_users": 8, "max_batch_rows": 150, "debug": True}
SETTINGS |= {"row_buckets": (16, 48, 96, 160), "freeze_gc": False}


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=12, step=4)


def captured(tiny, **settings):
    engine = Engine(tiny.parts(), EngineConfig(**SETTINGS | {"graphs": "on"} | settings))
    engine.warm_up()
    return engine


def eager(tiny, **settings):
    return Engine(tiny.parts(), EngineConfig(**SETTINGS | settings))


def random_request(tiny, rng, user=None, longest=20):
    """Any head but the title's, with and without a session, an allow list, denied items."""
    history = tiny.ids(rng.integers(0, 120, rng.integers(0, longest)))
    what, options = rng.random(), {}
    if what < 0.6:
        options["candidates"] = tiny.ids(rng.permutation(120)[: rng.integers(1, 12)])
        options["head"] = "rank" if what < 0.4 else "retrieve"
    if rng.random() < 0.2:
        options["allow"] = tiny.ids(rng.permutation(120)[:60])
    if rng.random() < 0.2:
        options["deny"] = tiny.ids(rng.permutation(120)[:30])
    return Request(history, int(rng.integers(1, 15)), user_id=user, **options)


def assert_alike(found, expected):
    """Row tiles of another number may be summed otherwise; the ranking is the same."""
    assert [ranking.items for ranking in found] == [ranking.items for ranking in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5, rtol=1e-5)


TIERS = {"kv_budget": "26KB", "host_budget": "26KB"}
SMALL = {"cpu_path": "torch", "weights": "fp8", "kv": "fp8", "kv_budget": "12KB", "host_budget": "12KB"}


@pytest.mark.parametrize("settings", [{}, TIERS, {"dtype": "bfloat16"}, SMALL, SMALL | {"dtype": "bfloat16"}])
def test_mixed_batches_answer_as_without_graphs(tiny, settings):
    """Appends, corrections, slides, evictions and restores, all heads in one batch."""
    ours, theirs, rng = captured(tiny, **settings), eager(tiny, **settings), np.random.default_rng(0)
    for _ in range(40):
        users = rng.permutation(12)[: rng.integers(1, 9)]
        asked = [random_request(tiny, rng, f"user {u}" if rng.random() < 0.8 else None) for u in users]
        found, expected = ours.recommend_many(asked), theirs.recommend_many(asked)
        if settings.get("dtype") == "bfloat16":
            assert found == expected
        assert_alike(found, expected)
        ours.check_integrity()
    counted, plain = ours.stats(), theirs.stats()
    assert counted.graphs_captured == len(ours._now().graphs._buckets) == 5
    assert counted.graph_replays > 35
    assert counted.eager_steps == 0
    assert plain.graphs_captured == plain.graph_replays == 0
    for name in ("rows_computed", "positions_reused", "evictions", "blocks_restored", "blocks_copied", "requests"):
        assert getattr(counted, name) == getattr(plain, name), name


def test_a_session_that_grows_and_slides(tiny):
    ours, theirs = captured(tiny), eager(tiny, kv_budget="0")
    ids = tiny.ids(np.random.default_rng(5).integers(0, 120, 40))
    for length in range(41):
        for options in ({}, {}, {"candidates": tiny.ids(range(5))}):
            asked = [Request(ids[:length], user_id="ada", **options)]
            assert_alike(ours.recommend_many(asked), theirs.recommend_many(asked))
    assert ours.stats().eager_steps == 0
    np.testing.assert_allclose(ours.user_vector(ids[:7]), theirs.user_vector(ids[:7]), atol=1e-5)


def test_calendar_buckets_reach_the_static_rows():
    timed = make_tiny(window=12, step=4, calendar=CalendarConfig(0, 100, 9))
    ours, theirs = captured(timed), eager(timed)
    ids, times = timed.ids(range(8)), [100.0 * i for i in range(8)]
    asked = [Request(ids, times=times), Request(ids, times=times, candidates=ids[:3]), Request(ids)]
    found = ours.recommend_many(asked)
    assert_alike(found, theirs.recommend_many(asked))
    assert found[0] != found[2]
    assert ours.stats().graph_replays == 1


def test_upserts_after_the_capture_are_seen_and_move_nothing(tiny):
    ours, theirs = captured(tiny), eager(tiny)
    catalogue, graphs = ours.catalogue, ours._now().graphs
    pointers = [tensor.data_ptr() for tensor in (catalogue.tokens, catalogue.prior, catalogue.available)]
    ids = tiny.ids(range(6))
    asked = [Request(ids, 120, user_id="ada"), Request(ids, candidates=tiny.ids(range(4, 12)))]
    before = ours.recommend_many(asked)
    for engine in (ours, theirs):
        engine.upsert([Item("new", vectors={"text": [0.5] * 8}), Item("0002", vectors={"text": [-0.5] * 8})])
        engine.set_prior({"0007": 9.0})
        engine.set_available(["0005"], False)
    asked.append(Request([*ids, "new"], candidates=["new", "0003"]))
    after = ours.recommend_many(asked)
    assert_alike(after, theirs.recommend_many(asked))
    assert after[:2] != before
    assert "0005" not in after[1].items
    assert "new" in after[0].items
    assert pointers == [tensor.data_ptr() for tensor in (catalogue.tokens, catalogue.prior, catalogue.available)]
    assert graphs.captured == 5
    assert ours.stats().eager_steps == 0


def test_nothing_is_captured_after_the_warm_up(tiny):
    engine, rng = captured(tiny), np.random.default_rng(1)
    graphs, transfer = engine._now().graphs, engine._now().transfer
    made, pointers = dict(graphs._graphs), (transfer.host.data_ptr(), transfer.arena.data_ptr())

    def refuse(run):
        raise AssertionError("captured after the warm-up")

    graphs._capture = refuse
    engine.warm_up()
    for _ in range(20):
        engine.recommend_many([random_request(tiny, rng) for _ in range(rng.integers(1, 9))])
    assert engine.stats().graphs_captured == 5
    assert graphs._graphs == made
    assert pointers == (transfer.host.data_ptr(), transfer.arena.data_ptr())


def test_more_rows_than_the_largest_bucket_run_without_a_graph(tiny):
    ours, theirs = captured(tiny, row_buckets=(16, 32)), eager(tiny)
    rng = np.random.default_rng(2)
    large = [Request(tiny.ids(rng.integers(0, 120, 12)), candidates=tiny.ids(range(8))) for _ in range(4)]
    assert ours.recommend_many(large) == theirs.recommend_many(large)
    assert (ours.stats().graph_replays, ours.stats().eager_steps) == (0, 1)
    ours.recommend_many(large[:1])
    assert (ours.stats().graph_replays, ours.stats().eager_steps) == (1, 1)


def test_titles_run_without_a_graph():
    titled = make_titled()
    ours, theirs = captured(titled), eager(titled)
    ids = titled.ids(range(8))
    asked = [Request(ids, candidates=ids[:4], head="title", user_id="a"), Request(ids, candidates=ids[:4])]
    assert ours.recommend_many(asked) == theirs.recommend_many(asked)
    assert (ours.stats().graph_replays, ours.stats().eager_steps) == (0, 1)
    assert ours.generate([Request(ids, user_id="a")]) == theirs.generate([Request(ids, user_id="a")])


def test_the_same_history_again_runs_no_pass(tiny):
    engine = captured(tiny)
    first = engine.recommend(tiny.ids(range(5)), user_id="ada")
    assert engine.recommend(tiny.ids(range(5)), user_id="ada") == first
    assert (engine.stats().graph_replays, engine.stats().eager_steps) == (1, 0)


def test_a_failed_step_leaves_the_sessions_as_they_were(tiny, monkeypatch):
    engine, ids = captured(tiny), tiny.ids(range(10))
    first = engine.recommend(ids[:6], user_id="ada")

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(engine._now().scorer, "score", fail)
    with pytest.raises(RuntimeError, match="injected"):
        engine.recommend([*ids[:3], *ids[7:]], user_id="ada")
    monkeypatch.undo()
    engine.check_integrity()
    before = engine.stats().rows_computed
    assert engine.recommend(ids[:6], user_id="ada") == first
    assert engine.stats().rows_computed == before


def test_padding_writes_no_key_and_reads_no_users(tiny):
    engine = captured(tiny)
    serving = engine._now()
    engine.recommend(tiny.ids(range(5)), user_id="ada")
    keys, last = serving.cache.keys.clone(), serving.cache.last_hidden[: serving.cache.scratch_slot].clone()
    for graph in serving.graphs._graphs.values():
        graph.buffers.clear()
        graph._replay()
        assert torch.isfinite(graph._outcome.vectors).all()
    assert torch.equal(serving.cache.keys, keys)
    assert torch.equal(serving.cache.last_hidden[: serving.cache.scratch_slot], last)


def test_the_static_rows_equal_those_made_for_the_step(tiny):
    """Every field, in the part that is filled."""
    engine = captured(tiny)
    serving, seen = engine._now(), []
    graph = serving.graphs._graphs[Bucket(48, 48)]
    original = graph.buffers.fill

    def spy(rows):
        original(rows)
        seen.append((rows, make_batch(rows, serving.cache.shared_blocks, torch.from_numpy)))

    graph.buffers.fill = spy
    engine.recommend_many([Request(tiny.ids(range(9))), Request(tiny.ids(range(5, 16)), candidates=tiny.ids(range(8)))])
    [(rows, (made, reads))], batch, count = seen, graph.buffers.batch, seen[0][0].num_rows
    assert count == 28
    for name in ("item_rows", "slots", "buckets", "positions", "slot_mapping", "read_rows"):
        right = getattr(made, name).tolist()
        assert getattr(batch, name)[: len(right)].tolist() == right, name
    for name in ("sequence", "local", "visible", "candidate"):
        assert getattr(batch.attention, name)[:count].tolist() == getattr(made.attention, name).tolist(), name
        right = getattr(made.read_attention, name).tolist()
        assert getattr(batch.read_attention, name)[: rows.num_reads].tolist() == right, name
    for field in fields(reads):
        right = getattr(reads, field.name).tolist()
        assert getattr(graph.buffers.reads, field.name)[: len(right)].tolist() == right, field.name
    assert (batch.slot_mapping[count:] == -1).all()
    assert not batch.attention.candidate[count:].any()
    places = list(zip(batch.attention.sequence.tolist(), batch.attention.local.tolist(), strict=True))
    assert len(set(places)) == len(places)


def test_buckets_and_their_reads():
    assert make_buckets((16, 32, 256, 512), 200) == [Bucket(16, 16), Bucket(32, 32), Bucket(256, 64), Bucket(256, 256)]
    assert make_buckets((16, 32), 4096) == [Bucket(16, 16), Bucket(32, 32)]
    default = make_buckets(EngineConfig().row_buckets, 4096)
    assert len(default) == 22
    # 64 warm users with 20 candidates each
    assert any(bucket.rows >= 64 * 21 for bucket in default)
    assert all(bucket.rows % ROW_TILE == bucket.reads % ROW_TILE == 0 for bucket in default)
    assert default == sorted(default)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graphs": "yes"}, "graphs: 'yes'"),
        ({"row_buckets": ()}, "row_buckets must be rising multiples of 16"),
        ({"row_buckets": (16, 40)}, "row_buckets"),
        ({"row_buckets": (32, 16)}, "row_buckets"),
    ],
)
def test_settings_that_can_not_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_graphs_are_for_gpus_unless_asked_for(tiny):
    engine = eager(tiny)
    engine.warm_up()
    assert engine.stats() == Engine(tiny.parts(), EngineConfig(**SETTINGS)).stats()


class FakeGraph:
    """What CudaCapture asks of torch.cuda, in the order in which it asks."""

    def __init__(self):
        self.calls = []

    def patch(self, monkeypatch):
        @contextmanager
        def graph(graph, pool, stream, capture_error_mode="global"):
            self.calls.append(f"begin {capture_error_mode}")
            assert not torch.is_inference_mode_enabled()  # what it keeps of random numbers is written by others later
            yield
            self.calls.append("end")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        nothing = {name: lambda *args: nullcontext() for name in ("device", "stream")}
        fakes = {"Stream": lambda device: stream, "current_stream": lambda: stream, "graph_pool_handle": lambda: None}
        fakes |= {"CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.calls.append("replay")), "graph": graph}
        for name, fake in (nothing | fakes).items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_capture_minds_its_own_thread_alone_and_is_replayed_once(monkeypatch):
    cuda = FakeGraph()
    cuda.patch(monkeypatch)
    replay = CudaCapture(torch.device("cuda"))(lambda: cuda.calls.append("run"))
    assert cuda.calls == ["run", "run", "begin thread_local", "run", "end", "replay"]
    replay()
    assert cuda.calls[-2:] == ["replay", "replay"]


@torch.inference_mode()
def test_no_graph_is_replayed_while_another_is_captured(monkeypatch):
    """As of an engine that serves beside one that is loaded."""
    cuda = FakeGraph()
    cuda.patch(monkeypatch)
    device, waits = torch.device("cuda", 1), threading.Event()
    replay = CudaCapture(device)(lambda: None)
    serving = threading.Thread(target=lambda: (waits.set(), replay(), cuda.calls.append("served")))

    def run():
        if cuda.calls[-1].startswith("begin"):
            serving.start()
            waits.wait()
            serving.join(0.2)
            assert serving.is_alive() and cuda.calls[-1].startswith("begin")

    CudaCapture(device)(run)
    serving.join(10)
    assert "served" in cuda.calls and cuda.calls.count("replay") == 3


@pytest.mark.parametrize("was_enabled", [True, False])
def test_nothing_is_collected_while_graphs_are_captured(tiny, monkeypatch, was_enabled):
    seen = []
    monkeypatch.setattr(serving_module, "pick_capture", lambda *_: lambda run: seen.append(gc.isenabled()) or run)
    try:
        if not was_enabled:
            gc.disable()
        captured(tiny, row_buckets=(16, 32))
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
    assert seen == [False, False]


def test_events_stand_on_the_stream_of_their_own_device(monkeypatch):
    transfer, stood = Transfer(torch.device("cpu"), 64), []
    event = SimpleNamespace(record=stood.append, synchronize=lambda: None)
    monkeypatch.setattr(transfer, "_leaving", event)
    monkeypatch.setattr(transfer, "_arrived", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch, "zeros", partial(zeros_without_pinning, torch.zeros))
    transfer.begin()
    sent = transfer.put(np.arange(5))
    transfer.send()
    assert transfer.fetch([sent])[0].tolist() == [0, 1, 2, 3, 4]
    assert stood == [transfer.device, transfer.device]


def zeros_without_pinning(zeros, *size, pin_memory=False, **options):
    return zeros(*size, **options)


def test_the_warm_up_freezes_what_stands(tiny):
    try:
        engine = captured(tiny, freeze_gc=True, row_buckets=(16,))
        assert gc.get_freeze_count() > 10_000
        assert engine.recommend(tiny.ids(range(3)))
    finally:
        gc.unfreeze()


def test_a_reloaded_engine_is_captured_again(tiny, tmp_path):
    parts = tiny.parts()
    parts.save(tmp_path / "engine")
    engine = captured(tiny, row_buckets=(16, 32))
    first = engine.recommend(tiny.ids(range(5)))
    engine.reload(tmp_path / "engine")
    assert engine.stats().graphs_captured == 2
    assert_alike([engine.recommend(tiny.ids(range(5)))], [first])


def python_calls(call):
    """Frames of Python entered, generators resumed included."""
    calls = Counter()

    def profile(frame, event, _argument):
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    gc.disable()  # what it calls back is nobody's step
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def warm_step(engine, tiny, num_users, length, num_candidates):
    """A step of warm users with one new item and candidates each, asked a second time so that nothing is the first."""
    serving = engine._now()

    def queries(items, seed):
        rng = np.random.default_rng(seed)
        histories = [tiny.ids(rng.integers(0, 120, length + 1)) for _ in range(num_users)]
        options = {"candidates": tiny.ids(range(num_candidates))} if num_candidates else {}
        return [
            serving.resolve(Request(history[: length + items], 5, user_id=f"{seed} {u}", **options))
            for u, history in enumerate(histories)
        ]

    for seed in (0, 1):
        first, second = queries(0, seed), queries(1, seed)
        serving.step(first)
    return lambda: serving.step(second)


@pytest.mark.parametrize("what", ["rank", "retrieve"])
def test_python_calls_of_a_warm_step_do_not_grow_with_rows(tiny, what):
    engine = captured(tiny, debug=False)
    for graph in engine._now().graphs._graphs.values():
        graph._replay = lambda: None  # what a GPU does in one call; on the CPU it is all of the model's Python
    few, many = (4, 18) if what == "rank" else (0, 0)
    shapes = ((1, 2, few), (1, 10, many), (2, 2, few), (8, 2, few), (8, 10, many))
    calls = {shape: python_calls(warm_step(engine, tiny, *shape)) for shape in shapes}
    total = {shape: found.total() for shape, found in calls.items()}
    # looking for a graph among those of a bucket's rows may take one look more
    assert abs(total[1, 2, few] - total[1, 10, many]) <= 1
    assert abs(total[8, 2, few] - total[8, 10, many]) <= 1
    of_a_request = (total[8, 2, few] - total[1, 2, few]) / 7
    assert of_a_request < 40
    assert total[2, 2, few] - total[1, 2, few] <= of_a_request + 5


def test_a_warm_step_keeps_no_memory(tiny):
    engine = captured(tiny, debug=False)
    step = warm_step(engine, tiny, 8, 6, 4)
    tracemalloc.start()
    try:
        for _ in range(20):
            step()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            step()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000  # what a step allocates for good would be more


def test_every_tensor_of_a_captured_batch_lies_in_the_arena(tiny):
    engine = captured(tiny)
    serving = engine._now()
    arena = serving.transfer.arena
    inside = range(arena.data_ptr(), arena.data_ptr() + arena.numel() * 8)
    for graph in serving.graphs._graphs.values():
        batch = graph.buffers.batch
        for part in (batch, batch.attention, batch.read_attention, graph.buffers.reads):
            tensors = {f.name: getattr(part, f.name) for f in fields(part)}
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and name != "shared_blocks":
                    assert tensor.data_ptr() in inside, name


def test_whatever_is_put_begins_at_sixteen_bytes():
    transfer = Transfer(torch.device("cpu"), 64)
    transfer.begin(6)
    arrays = [np.arange(3), np.array([True]), np.arange(5)]
    found = [transfer.put(each) for each in arrays] + [transfer.put_int32(np.arange(3))]
    transfer.send()
    for tensor, array in zip(found, [*arrays, np.arange(3)], strict=True):
        assert (tensor.data_ptr() - transfer.arena.data_ptr()) % 16 == 0
        assert tensor.tolist() == array.tolist()
    assert transfer.put(np.arange(60)).tolist() == list(range(60))  # no room: sent by itself


def test_graphs_that_were_captured_before_one_failed_are_none(tiny):
    engine = Engine(tiny.parts(), EngineConfig(**SETTINGS | {"graphs": "on"}))
    graphs, capture, made = engine._now().graphs, engine._now().graphs._capture, []

    def fails_at_the_third(run):
        made.append(run)
        if len(made) == 3:
            raise RuntimeError("no room")
        return capture(run)

    graphs._capture = fails_at_the_third
    with pytest.raises(RuntimeError, match="no room"):
        engine.warm_up()
    assert engine.stats().graphs_captured == 0
    engine.recommend(["0001"])
    assert (engine.stats().graph_replays, engine.stats().eager_steps) == (0, 1)
    engine.warm_up()
    assert engine.stats().graphs_captured == 5
