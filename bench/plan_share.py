"""What planning costs beside the step it plans: `python bench/plan_share.py [--shape tiny|0.5b]`.

Warm users with 30 items of history and one new one each: the native call alone, with its Python around it, and the
whole step. Medians; planning and steps are timed in turns.
"""

import argparse
import json
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.query import Query
from speeder_engine.random_engine import SHAPES, random_parts

HISTORY = 30
USERS = (1, 8, 64, 256)


class Timed:
    """An engine with warm users; each round appends another item to every history, from a short history again when the
    window is full."""

    def __init__(self, shape: str, num_users: int) -> None:
        parts = random_parts(shape, num_items=1000, dtype=torch.bfloat16)
        config = EngineConfig(dtype="bfloat16", kv_budget="512MiB", max_batch_users=num_users)
        self.engine = Engine(parts, config)
        self.serving = self.engine._now()
        rng = np.random.default_rng(0)
        self.histories = [[f"{row:07d}" for row in rng.permutation(1000)[:50]] for _ in range(num_users)]
        self.engine.recommend_many(self.requests(HISTORY))

    def requests(self, length: int) -> list[Request]:
        return [Request(history[:length], user_id=f"u{i}") for i, history in enumerate(self.histories)]

    def round(self) -> tuple[float, float, float]:
        """Seconds of the native plan, of planning, of the step: the same append each time, undone in between."""
        self.engine.recommend_many(self.requests(HISTORY))
        queries: Sequence[Query] = [self.serving.resolve(request) for request in self.requests(HISTORY + 1)]
        users = [query.request.user_id for query in queries]
        cache, buffers = self.serving.cache, self.serving.cache._buffers
        keys = self.serving._keys(queries)
        started = time.perf_counter()
        plan = cache.plan(users, keys)
        planning = time.perf_counter() - started
        cache.release(plan)
        outputs = (buffers.cached_len, buffers.session_slots, buffers.block_tables, buffers.slot_mapping)
        started = time.perf_counter()
        step, *_ = cache.manager.plan(users, buffers.offsets, buffers.keys, *outputs, buffers.copies, buffers.restores)
        native = time.perf_counter() - started
        cache.manager.release(step)
        started = time.perf_counter()
        self.serving.step(queries)
        return native, planning, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="What planning costs beside the step it plans.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    table = Table("users", "native plan, us", "with Python, us", "step, ms", "planning / step")
    rows = {}
    for num_users in USERS:
        timed = Timed(options.shape, num_users)
        rounds = track(range(options.rounds + 2), f"{num_users} users", console=Console(stderr=True))
        native, planning, step = np.median([timed.round() for _ in rounds][2:], axis=0)
        rows[num_users] = {"native_us": native * 1e6, "planning_us": planning * 1e6, "step_ms": step * 1e3}
        share = f"{planning / step:.2%}"
        table.add_row(str(num_users), f"{native * 1e6:.1f}", f"{planning * 1e6:.1f}", f"{step * 1e3:.2f}", share)
    if options.json:
        print(json.dumps({"shape": options.shape, "users": rows}))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
