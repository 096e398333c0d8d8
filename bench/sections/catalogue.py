"""The best k of a whole catalogue for one user and for many, beside one read of the table, torch and faiss."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from baselines.base import Unavailable
from baselines.faiss_flat import FaissFlat, TorchTopK
from context import Bench
from limits import reading
from measure import Clock, Timed, Timing, interleave
from torch import Tensor

from speeder_engine import EngineConfig
from speeder_engine.native.search import search_catalogue
from speeder_engine.native.support import pick_kernels
from speeder_engine.triton_kernels.top_scores import Answerable

USERS, K, SEEN = (1, 64), 10, 30
NUM_ITEMS = {True: 200_000, False: 1_000_000}  # quick or not


class Search(Protocol):
    def search(self, queries: Tensor, k: int) -> tuple[object, object]: ...


def measure(bench: Bench, clock: Clock) -> None:
    width, count = bench.subject.config.decoder.hidden_size, NUM_ITEMS[bench.quick]
    generator = torch.Generator(bench.device).manual_seed(0)
    table = torch.empty(count, width, dtype=bench.subject.dtype, device=bench.device)
    table.normal_(generator=generator)
    queries = torch.randn(max(USERS), width, device=bench.device, generator=generator).to(table.dtype)
    contenders = {f"ours_{users}": searching(table, queries[:users]) for users in USERS}
    read = reading(table)
    contenders["read"] = Timed(lambda _: read())
    timings = interleave(contenders, bench.rounds(9, 12), Clock.of(clock.left / 2), bench.device)
    rows = [row(bench, f"ours, {label(users)}", timings[f"ours_{users}"], timings["read"]) for users in USERS]
    for users in USERS:
        suffix = "" if users == 1 else f"_{users}"
        bench.report.put(f"catalogue_ms{suffix}", timings[f"ours_{users}"].p50 * 1e3)
        bench.report.put(f"catalogue_runs{suffix}", timings[f"ours_{users}"].count)
        bench.report.put(f"catalogue_over_read{suffix}", timings[f"ours_{users}"].over(timings["read"]))
    bench.report.put("catalogue_read_ms", timings["read"].p50 * 1e3)
    bench.report.put("catalogue_items", count)
    rows.append(row(bench, "one read of the table", timings["read"], timings["read"]))
    try:
        for key, make in rivals(bench.dtype).items():
            rows += beside(bench, key, make, table, queries, clock)
    finally:
        columns = ("", "p50 ms", "runs", "/ read of the table", "/ ours")
        bench.report.table(f"top {K} of {count:,} items x {width}, {bench.dtype}", columns, rows)


def searching(table: Tensor, queries: Tensor) -> Timed:
    """As the engine's retrieve head does it: the items a user has seen are excluded, a prior is added."""
    count, rng = len(table), np.random.default_rng(0)
    prior = torch.zeros(count, device=table.device)
    seen = [np.sort(rng.choice(count, SEEN, replace=False)).astype(np.int32) for _ in queries]
    given = Answerable.build(torch.ones(count, dtype=torch.bool, device=table.device), seen, [None] * len(seen))

    kernels = pick_kernels(EngineConfig(), table.device, table.dtype)

    @torch.inference_mode()
    def call(_: int) -> object:
        return search_catalogue(queries, table, prior, given, K, kernels)

    return Timed(call)


def searching_with(other: Search, queries: Tensor) -> Timed:
    return Timed(lambda _: other.search(queries, K))


def row(bench: Bench, label: str, timing: Timing, read: Timing, ratio: float | None = None) -> list[object]:
    return [label, timing.p50 * 1e3, timing.count, timing.over(read), ratio]


def rivals(dtype: str) -> dict[str, Callable[[Tensor], Search]]:
    """faiss in fp32, as it is used, and in the table's own half precision."""
    found: dict[str, Callable[[Tensor], Search]] = {"torch": TorchTopK, "faiss": FaissFlat}
    if dtype != "float32":
        found["faiss_half"] = lambda table: FaissFlat(table, dtype)
    return found


def beside(
    bench: Bench, key: str, make: Callable[[Tensor], Search], table: Tensor, queries: Tensor, clock: Clock
) -> list[list[object]]:
    """Another search in turn with ours, for one user and for many."""
    try:
        other = make(table)
    except Unavailable as error:
        bench.report.note(f"catalogue, {key}: {error}")
        return []
    rows: list[list[object]] = []
    for users in USERS:
        asked = queries[:users]
        timed = {"ours": searching(table, asked), "other": searching_with(other, asked)}
        timings = interleave(timed, bench.rounds(7, 8), Clock.of(clock.left / 4), bench.device, pause=bench.pause)
        ratio = timings["other"].over(timings["ours"])
        suffix = "" if users == 1 else f"_{users}"
        bench.report.put(f"catalogue_{key}_ms{suffix}", timings["other"].p50 * 1e3)
        bench.report.put(f"catalogue_{key}_runs{suffix}", timings["other"].count)
        bench.report.put(f"catalogue_vs_{key}{suffix}", ratio)
        rows.append([f"{key}, {label(users)}", timings["other"].p50 * 1e3, timings["other"].count, None, ratio])
    return rows


def label(users: int) -> str:
    return "one user" if users == 1 else f"{users} users"
