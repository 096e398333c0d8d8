"""What a returning user costs, by what happened since; and how often a stream's users find their sessions."""

from itertools import count, islice
from typing import Any

from context import Bench
from measure import Clock, Timed, interleave
from ours import Ours
from workload import Stream

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.config import DecoderConfig
from speeder_engine.prompt import PromptLayout
from speeder_engine.random_engine import random_parts

HISTORIES = (10, 50, 200)
BUDGETS = (10, 25, 50, 100)  # percent of what the sessions of all users take
# a body so small that a stream takes seconds: what is found in the cache doesn't depend on it
COUNTED = DecoderConfig(64, 32, 1, 1, 1, 32, 32)
COUNTED_ITEMS, STREAM_USERS, BATCH = 2000, 400, 16

Rows = tuple[int, ...]


def measure(bench: Bench, clock: Clock) -> None:
    ours = Ours(bench.subject)
    try:
        found = {length: events(bench, ours, length, Clock.of(clock.left / 4)) for length in HISTORIES}
    finally:
        ours.close()
    for part, unit in enumerate(("rows computed", "ms, p50")):
        rows = [[event, *(found[length][event][part] for length in HISTORIES)] for event in found[HISTORIES[0]]]
        title = f"{bench.subject_name}: a session of a window of {bench.workload.window}, {unit}"
        bench.report.table(title, ("", *(f"history {length}" for length in HISTORIES)), rows)
    hit_rates(bench)


def events(bench: Bench, ours: Ours, length: int, clock: Clock) -> dict[str, tuple[int, float]]:
    """Rows and median ms of bringing a session up to date, by event, each on a session of its own."""
    computed: dict[str, int] = {}
    timed = {
        event: _timed(ours, event, before, after, computed)
        for event, (before, after) in histories(ours.subject.layout, length).items()
    }
    timings = interleave(timed, bench.rounds(5, 8), clock, bench.device, warm_ups=1)
    for event, timing in timings.items():
        bench.report.put(f"session_{event}_{length}_rows", computed[event])
        bench.report.put(f"session_{event}_{length}_ms", timing.p50 * 1e3)
    return {event: (computed[event], timing.p50 * 1e3) for event, timing in timings.items()}


def histories(layout: PromptLayout, length: int) -> dict[str, tuple[Rows | None, Rows]]:
    """Event -> the history a session holds and the one that comes; items are told by their numbers."""

    def first(slides: bool) -> int:
        """The first length from here on whose append moves the window, or doesn't."""
        return next(n for n in count(length) if (layout.start(n + 1) != layout.start(n)) == slides)

    def items(n: int) -> Rows:
        return tuple(range(n))

    steady, sliding = first(slides=False), first(slides=True)
    middle = (layout.start(length) + length) // 2
    return {
        "cold": (None, items(length)),
        "same": (items(length), items(length)),
        "append": (items(steady), items(steady + 1)),
        "slide": (items(sliding), items(sliding + 1)),
        "correction": (items(length), (*range(middle), length, *range(middle + 1, length))),
    }


def _timed(ours: Ours, event: str, before: Rows | None, after: Rows, computed: dict[str, int]) -> Timed:
    known = None if before is None else ours.subject.item_ids(before)
    wanted, engine = ours.subject.item_ids(after), ours.engine

    def prepare(_: int) -> None:
        engine.close_session(event)
        if known is not None:
            engine.warm(event, known)

    def call(_: int) -> None:
        computed[event] = engine.warm(event, wanted)

    return Timed(call, prepare)


def hit_rates(bench: Bench) -> None:
    """Of the history positions of a stream's requests, those found in sessions; under budgets that hold a part of
    what all sessions would take."""
    requests = bench.rounds(1000, 6000)
    whole, needed = hit_rate(requests, "1GiB")
    rates = [*(hit_rate(requests, needed * percent // 100)[0] for percent in BUDGETS[:-1]), whole]
    for percent, rate in zip(BUDGETS, rates, strict=True):
        bench.report.put(f"hit_rate_{percent}", rate)
    bench.report.put("hit_rate", whole)
    rows = [[f"{percent} %", rate] for percent, rate in zip(BUDGETS, rates, strict=True)]
    title = f"history positions found in sessions, {requests} requests of {STREAM_USERS} users by Zipf's law"
    bench.report.table(title, ("KV budget, of what all sessions take", "hit rate"), rows)


def hit_rate(num_requests: int, budget: str | int) -> tuple[float, int]:
    """The rate, and the bytes that sessions hold in the end."""
    stream = Stream(STREAM_USERS, COUNTED_ITEMS, seed=2)
    parts = random_parts(COUNTED, num_items=COUNTED_ITEMS, instruction_len=4)
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "freeze_gc": False}
    with Engine(parts, EngineConfig(kv_budget=str(budget), **settings)) as engine:
        ids, start = engine.catalogue.item_ids, PromptLayout(parts.config.prompt).start
        users, positions = stream.closed(BATCH), 0
        for _ in range(num_requests // BATCH):
            batch = [user for _, user in islice(users, BATCH)]
            positions += sum(len(user.history) - start(len(user.history)) for user in batch)
            asked = [Request([ids[row] for row in user.history], 1, user_id=user.user_id) for user in batch]
            engine.recommend_many(asked)
        stats = engine.stats()
        return stats.positions_reused / positions, stats.session_bytes
