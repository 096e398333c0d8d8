"""What a step costs the host: all of a warm request but the pass, which on a GPU is one launch of a captured graph."""

from collections.abc import Sequence

import numpy as np
from context import Bench
from measure import ROW_US, Clock, Timed, interleave

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.config import DecoderConfig
from speeder_engine.random_engine import random_parts

BUCKETS = {1: 32, 8: 192, 64: 1536}  # users -> rows of the smallest pass that holds theirs
HISTORY, CANDIDATES, NUM_ITEMS = 30, 20, 10_000
SHAPE = DecoderConfig(300, 32, 1, 4, 2, 8, 64)  # whatever it is, it is computed once and never again


def measure(bench: Bench, clock: Clock) -> None:
    users = tuple(BUCKETS)[: 2 if bench.quick else None]
    engine = graphs_without_work(tuple(BUCKETS[each] for each in users))
    try:
        timed = {str(each): steps(engine, each) for each in users}
        timings = interleave(timed, bench.rounds(100, 1000), Clock.of(clock.left), warm_ups=10)
    finally:
        engine.close()
    for name, timing in timings.items():
        bench.report.put(f"host_step_us_{name}", timing.p50 * 1e6)
    rows = [[name, *timing.cells(1e6)] for name, timing in timings.items()]
    title = (
        f"host: warm users with one new item and {CANDIDATES} candidates, from requests to rankings without the pass"
    )
    bench.report.table(title, ("users", *ROW_US), rows)


def graphs_without_work(row_buckets: tuple[int, ...]) -> Engine:
    """An engine whose captured passes do nothing when they are replayed; on the CPU, whatever the device."""
    parts = random_parts(SHAPE, num_items=NUM_ITEMS)
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        cpu_path="torch",
        graphs="on",
        row_buckets=row_buckets,
        kv_budget="64MiB",
        freeze_gc=False,
    )
    engine = Engine(parts, config)
    engine.warm_up()
    for graph in engine._now().graphs._graphs.values():
        graph._replay = lambda: None
    return engine


def steps(engine: Engine, users: int) -> Timed:
    """Each round brings the same new item: before it, the sessions are as they were."""
    rng = np.random.default_rng(users)
    before, after = [requests(engine, users, length, rng) for length in (HISTORY, HISTORY + 1)]
    return Timed(lambda _: engine.recommend_many(after), lambda _: engine.recommend_many(before))


def requests(engine: Engine, users: int, length: int, rng: np.random.Generator) -> Sequence[Request]:
    ids = engine.catalogue.item_ids
    named = [tuple(ids[row] for row in rng.choice(NUM_ITEMS, CANDIDATES, replace=False)) for _ in range(users)]
    return [
        Request(ids[user : user + length], user_id=f"{users} {user}", candidates=candidates)
        for user, candidates in enumerate(named)
    ]
