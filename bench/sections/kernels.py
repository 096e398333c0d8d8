"""Every operation of triton_kernels/ at the shapes of real steps: its torch reference on a CPU, its kernel on a GPU."""

from functools import partial

import torch
from context import Bench
from kernel_cases import Case, Maker
from measure import Clock, Timed, interleave

ROWS = (32, 1024)
SEARCHED, USERS = 20_000, 16


def measure(bench: Bench, clock: Clock) -> None:
    sizes = ROWS[:1] if bench.quick else ROWS
    found: list[list[object]] = []
    try:
        for num_rows in bench.track(sizes, "kernels, rows"):
            maker = Maker(bench.subject.config.decoder, num_rows, bench.device, bench.subject.dtype)
            makers = [*maker.all(1000)]
            if num_rows == ROWS[0]:
                makers.append(partial(maker.search, SEARCHED, USERS))
            for make in makers:
                clock.check()
                found += one(bench, make(), num_rows, clock)
    finally:
        name = "kernel" if bench.device.type == "cuda" else "torch reference"
        columns = (name, "p50 us", "runs", "GB/s", "GFLOP/s", "of ceiling")
        bench.report.table(f"{bench.subject_name}: operations", columns, found)


def one(bench: Bench, case: Case, num_rows: int, clock: Clock) -> list[list[object]]:
    with torch.inference_mode():
        timing = interleave({"case": Timed(lambda _: case.call())}, bench.rounds(5, 10), Clock.of(clock.left / 8),
                            bench.device)["case"]  # fmt: skip
    best, seconds = bench.limits.best, timing.p50
    limit = max(case.num_bytes / best["copy"], case.flops / best[bench.limits.matmul(bench.dtype)])
    key = case.name.split(" rows")[0].replace(" items", "").split(",")[0].replace(" ", "_")
    bench.report.put(f"kernel_{key}_us", seconds * 1e6)
    rates = (case.num_bytes / seconds / 1e9, case.flops / seconds / 1e9 or None)
    return [[case.name, seconds * 1e6, timing.count, *rates, limit / seconds]]
