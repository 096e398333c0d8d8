"""Whole steps of an engine with random weights: device time, end to end, launches, saturated users a second."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from baselines.base import Baseline
from goals import COLD, WARM
from measure import (
    Ceilings,
    Clock,
    clocked,
    count_launches,
    quantiles,
    quiet,
    replay_seconds,
    synchronize,
    unquiet_seconds,
    wall_seconds,
)
from workload import BenchUser

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.config import DecoderConfig
from speeder_engine.random_engine import random_parts
from speeder_engine.step_buffers import Bucket

HISTORY, CANDIDATES, WINDOW = 30, 20, 50
UNTIMED = 3  # batches, or users
TRANSFORMERS = "transformers, "


class Load:
    """An engine, and users whose histories grow by an item with every request."""

    def __init__(
        self,
        shape: str | DecoderConfig,
        device: torch.device,
        dtype: str,
        num_items: int,
        num_users: int,
        **more: Any,
    ) -> None:
        """more: settings of the engine."""
        kind = getattr(torch, dtype)
        parts = random_parts(shape, num_items=num_items, window=WINDOW, dtype=kind, device=str(device))
        self.shape: DecoderConfig = parts.config.decoder
        settings: dict[str, Any] = {"device": str(device), "dtype": dtype, "freeze_gc": False, "kv_budget": "4GiB"}
        if device.type != "cuda":
            settings |= {"kv_budget": "64MiB", "graphs": "on", "row_buckets": (32, 64), "max_batch_users": 8}
        config = EngineConfig(**settings | more)
        self.device, self.num_users = device, num_users
        self.engine = Engine(parts, config)
        self.engine.warm_up()
        rng = np.random.default_rng(0)
        self.items = self.engine.catalogue.item_ids
        self.histories = [rng.integers(0, num_items, WINDOW) for _ in range(num_users)]
        self.candidates = [self.items[row] for row in rng.permutation(num_items)[:CANDIDATES]]

    @property
    def weight_bytes(self) -> int:
        """As they are held, scales included."""
        return sum(tensor.numel() * tensor.itemsize for _, tensor in self._weights)

    @property
    def num_weights(self) -> int:
        return sum(tensor.numel() for name, tensor in self._weights if not name.endswith("scales"))

    @property
    def _weights(self) -> list[tuple[str, torch.Tensor]]:
        state = self.engine.model.decoder.state_dict()
        return [(name, tensor) for name, tensor in state.items() if name != "inv_freq"]

    def request(self, user: int, length: int, ranked: bool, session: bool = True) -> Request:
        history = [self.items[row] for row in self.histories[user][:length]]
        named = self.candidates if ranked else None
        return Request(history, 10, user_id=f"u{user}" if session else None, candidates=named)

    def warm(self, length: int = HISTORY) -> None:
        self.engine.recommend_many([self.request(user, length, False) for user in range(self.num_users)])

    def warm_calls(self, batch: int, ranked: bool) -> list[Callable[[], object]]:
        """Every user appends an item a request, until the window is full."""
        calls: list[Callable[[], object]] = []
        for length in range(HISTORY + 1, WINDOW + 1):
            for start in range(0, self.num_users - batch + 1, batch):
                asked = [self.request(user, length, ranked) for user in range(start, start + batch)]
                calls.append(partial(self.engine.recommend_many, asked))
        return calls

    def cold_calls(self, count: int) -> list[Callable[[], object]]:
        asked = [self.request(i % self.num_users, HISTORY, True, session=False) for i in range(count)]
        return [partial(self.engine.recommend_many, [each]) for each in asked]


def bucket_of(load: Load, num_rows: int, num_reads: int) -> Bucket:
    return min(b for b in load.engine._now().graphs._graphs if b.rows >= num_rows and b.reads >= num_reads)


def replayed(load: Load, num_rows: int, num_reads: int, ceilings: Ceilings) -> dict[str, Any]:
    """The captured pass that this many rows take, alone on the device."""
    bucket = bucket_of(load, num_rows, num_reads)
    graph = load.engine._now().graphs._graphs[bucket]
    if load.device.type != "cuda":
        graph._replay()
        return {"bucket_rows": bucket.rows, "bucket_reads": bucket.reads}
    seconds = replay_seconds(graph._replay)
    flops = 2 * load.num_weights * num_rows
    return {
        "bucket_rows": bucket.rows,
        "bucket_reads": bucket.reads,
        "device_us": seconds * 1e6,
        "gb_s": load.weight_bytes / seconds / 1e9,
        "tflop_s": flops / seconds / 1e12,
        "of_ceiling": ceilings.fraction(load.weight_bytes, flops, seconds),
    }


def single_cases(load: Load, count: int) -> dict[str, tuple[list[Callable[[], object]], int, int]]:
    """One request at a time: cold, and warm with one new item; 20 candidates, or the whole catalogue. With the rows of
    its pass and how many of them are read."""
    return {
        COLD: (load.cold_calls(count), HISTORY + CANDIDATES, CANDIDATES + 1),
        WARM: (load.warm_calls(1, True), 1 + CANDIDATES, 1 + CANDIDATES),
        "warm 1, catalogue": (load.warm_calls(1, False), 1, 1),
    }


def latency(load: Load, ceilings: Ceilings, clock: Clock, count: int, found: dict[str, Any]) -> None:
    for name, (calls, rows, reads) in single_cases(load, count + 5).items():
        load.warm()
        unquiet_seconds(calls[:5], clock)
        row = replayed(load, rows, reads, ceilings) if load.engine._now().graphs._graphs else {}
        found[name] = row | quantiles(wall_seconds(calls[5 : 5 + count], clock))
        clock.check()


def count_all_launches(load: Load, found: dict[str, Any]) -> None:
    """In each request, and in its captured pass alone. The request first: buckets lie over one another, so that a graph
    reads what its own last step has left only until another's."""
    for name, (calls, rows, reads) in single_cases(load, 1).items():
        load.warm()
        graph = load.engine._now().graphs._graphs[bucket_of(load, rows, reads)]
        row = found.setdefault(name, {})
        row["launches_end_to_end"] = count_launches(calls[0], load.device)
        row["launches"] = count_launches(graph._replay, load.device)


def touch(load: Load, batches: tuple[int, ...]) -> None:
    """A request of each kind, and a batch of each size, so that all they need is compiled."""
    load.cold_calls(1)[0]()
    for ranked in (True, False):
        for batch in (1, *batches):
            load.warm()
            load.warm_calls(batch, ranked)[0]()


def saturated(load: Load, ceilings: Ceilings, clock: Clock, batches: tuple[int, ...], found: dict[str, Any]) -> None:
    """Users a second with warm sessions, batch after batch; the first ones are not timed. The limit of ranked ones:
    weights read once a batch, or products of all its rows."""
    for ranked in (True, False):
        for batch in batches:
            load.warm()
            synchronize(load.device)
            calls = load.warm_calls(batch, ranked)
            unquiet_seconds(calls[:UNTIMED], clock)
            clock.check()
            seconds = wall_seconds(calls[UNTIMED:], Clock.of(min(1.0, clock.left)))
            name = f"batch {batch}, {'1 + 20 ranked' if ranked else '1, catalogue'}"
            users_s = batch * len(seconds) / sum(seconds)
            found[name] = {"users_s": users_s, **quantiles(seconds)}
            if ranked:
                flops = 2 * load.num_weights * (1 + CANDIDATES)
                found[name]["of_limit"] = ceilings.fraction(load.weight_bytes / batch, flops, 1 / users_s)


def contender_latency(
    contender: Baseline, users: Sequence[BenchUser], clock: Clock, device: torch.device, found: dict[str, Any]
) -> None:
    """What a user would run instead, over the same rows: strangers, and users who return with one new item. What was
    timed when the time is up stays."""
    for name, before, call in (
        (COLD, None, contender.answer),
        (WARM, contender.warm_up, contender.answer_warm),
    ):
        timed: list[float] = []
        try:
            with quiet(), clock.interrupting():
                for user in users:
                    if before is not None:
                        before(user)
                    synchronize(device)
                    timed.append(clocked(partial(call, user)))
        finally:
            if counted := timed[UNTIMED:]:
                found[f"{contender.label.removeprefix(TRANSFORMERS)}, {name}"] = quantiles(counted)
