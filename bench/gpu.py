"""Kernels and latency on a GPU: `make gpu` runs it, `python bench/gpu.py --out DIR` alone.

Ceilings of the chip first, then whole steps at 0.5B, 7B and 1.5B with random weights, at 0.5B launched in other ways
and at 7B with weights and with keys and values in 8 bits too, searches of a million items, transformers on the same
rows, launches, and every kernel. Every section has its share of the time; results are written after each. `--only`
measures some of them, into the file that is there. After an illegal access no process can use the device again: the
rest goes on in another one.
`--cpu-smoke` runs all of it with tiny shapes on the CPU, so that it keeps working; its figures mean nothing.
"""

import argparse
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines.one_token import Compiled, StaticPrefix
from commands import listed
from goals import SEARCHED, goals_of
from kernel_cases import Case, Maker, maker_name
from measure import Ceilings, Clock, OutOfTime, device_seconds, l2_bytes, measure_ceilings, num_copies
from steps import Load, contender_latency, count_all_launches, latency, saturated, touch
from subject import Subject
from workload import Workload, make_users

from speeder_engine.config import DecoderConfig
from speeder_engine.random_engine import SHAPES
from speeder_engine.triton_kernels.linear_w8 import multiplies_fp8

FEW_BUCKETS = (16, 32, 64, 192)
SCHEMA = 1
EMPTY: dict[str, dict[str, Any]] = {
    "machine": {},
    "kernels": {},
    "searches": {},
    "steps": {},
    "transformers": {},
    "goals": {},
    "failed": {},
}
Section = tuple[str, float, Callable[[Clock], None]]  # a name, the seconds it may take, what it does


class DeviceLost(Exception):
    """Nothing runs on the device any more, in this process."""

    def __init__(self, next_case: int) -> None:
        super().__init__(f"nothing runs on the device any more; case {next_case} is the next")
        self.next_case = next_case  # of its section


class Report:
    """What was measured so far, as a file."""

    def __init__(self, out: Path, smoke: bool, go_on: bool = False) -> None:
        """`go_on`: what the file in `out` holds stays, but for what is measured again."""
        self.path = out / "gpu.json"
        self.found: dict[str, Any] = {"schema": SCHEMA, "is_smoke": smoke, **deepcopy(EMPTY), "skipped": []}
        if go_on and self.path.exists():
            self.found |= json.loads(self.path.read_text())
        out.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, clock: Clock, seconds: float, section: Callable[[Clock], None]) -> int:
        """A section within its share; what it measured before the time was up, or before it failed, stays. Its case to
        go on with in another process, 0 where there is none."""
        share = Clock.of(min(seconds, clock.left))
        rest = f"{name}: the rest of it"
        self.found["skipped"] = [each for each in self.found["skipped"] if each not in (name, rest)]
        self.found["failed"].pop(name, None)
        if share.seconds <= 0:
            self.found["skipped"].append(name)
            print(f"{name}: skipped, the time is up", flush=True)
            return 0
        next_case = 0
        try:
            section(share)
        except OutOfTime:
            self.found["skipped"].append(rest)
        except DeviceLost as error:  # what failed there has been noted
            next_case = error.next_case
        except Exception as error:  # one section's failure must not cost the others
            self.found["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.write()
        print(f"{name}: {share.seconds - share.left:.0f} s", flush=True)
        return next_case

    def write(self) -> None:
        self.found["goals"] = goals_of(self.found)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        self.path.with_suffix(".txt").write_text(table(self.found) + "\n")


def still_answers(device: torch.device) -> bool:
    """Whether the device runs anything for this process; memory is given back, the next section's shapes are others."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except RuntimeError:  # of whatever was launched before
        return False
    return True


def machine(device: torch.device) -> dict[str, Any]:
    named = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {"name": "cpu", **named}
    import triton

    held = torch.cuda.get_device_properties(device)
    return {"name": held.name, "memory_gib": held.total_memory / 2**30, "triton": triton.__version__, **named}


def kernels(
    report: Report, device: torch.device, ceilings: Ceilings, smoke: bool, first_case: int, clock: Clock
) -> None:
    for case, (name, make) in enumerate(kernel_makers(device, smoke)):
        if case < first_case:
            continue
        clock.check()
        measured = one_kernel(report, name, make, device, ceilings)
        if not measured and not still_answers(device):
            raise DeviceLost(case + 1)


def kernel_makers(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of every shape."""
    dtype = torch.float32 if smoke else torch.bfloat16
    for name in ("tiny",) if smoke else ("0.5b", "1.5b", "7b"):
        for num_rows in (32,) if smoke else (32, 64, 256, 1024):
            maker = Maker(SHAPES[name], num_rows, device, dtype)
            makers = [*maker.all(1000)]
            if num_rows == (32 if smoke else 64):
                sizes = (500, 4) if smoke else (100_000, 64)
                makers += [partial(maker.search, *sizes, two_stage=two_stage) for two_stage in (False, True)]
            yield from ((name, make) for make in makers)


def searches(report: Report, device: torch.device, smoke: bool, clock: Clock) -> None:
    """The whole catalogue, for one user and for many."""
    for make in search_makers(device, smoke):
        clock.check()
        case = make()
        seconds = seconds_of(make, case, device)
        found = {"us": seconds * 1e6, "gb_s": case.num_bytes / seconds / 1e9}
        # beside what a copy of as many bytes takes: the table is read and nothing of its size written
        copy = report.found["machine"]["ceilings"]["copy_bytes"]
        report.found["searches"][case.name] = found | {"of_copy": case.num_bytes / copy / seconds}


def search_makers(device: torch.device, smoke: bool) -> Iterator[Callable[[], Case]]:
    maker = Maker(SHAPES["tiny" if smoke else "0.5b"], 32, device, torch.float32 if smoke else torch.bfloat16)
    for two_stage in (False, True):
        for num_users in (1, 4 if smoke else 64):
            yield partial(maker.search, 500 if smoke else SEARCHED, num_users, two_stage=two_stage)


def seconds_of(make: Callable[[], Case], case: Case, device: torch.device) -> float:
    others = [make().call for _ in range(num_copies(case.num_bytes, l2_bytes(device)) - 1)]
    with torch.inference_mode():
        return device_seconds([case.call, *others], device)


def one_kernel(report: Report, shape: str, make: Callable[[], Case], device: torch.device, ceilings: Ceilings) -> bool:
    """Whether it could be measured."""
    failure = f"kernel at {shape}: {maker_name(make)}"
    report.found["failed"].pop(failure, None)
    try:
        case = make()
        seconds = seconds_of(make, case, device)
    except Exception as error:  # the other kernels are measured all the same
        report.found["failed"][failure] = f"{type(error).__name__}: {error}"[:500]
        return False
    report.found["kernels"][f"{shape} {case.name}"] = {
        "us": seconds * 1e6,
        "gb_s": case.num_bytes / seconds / 1e9,
        "tflop_s": case.flops / seconds / 1e12,
        "of_ceiling": ceilings.fraction(case.num_bytes, case.flops, seconds),
    }
    return True


def steps(
    report: Report,
    shape: str,
    other: dict[str, Any] | None,
    clock: Clock,
    device: torch.device,
    ceilings: Ceilings,
    smoke: bool,
) -> None:
    """`other`: the engine's settings, where they are not its own; fewer buckets and batches then, since kernels are
    compiled for each."""
    load = made_load(shape, device, smoke, other)
    found: dict[str, Any] = {"graphs_captured": load.engine.stats().graphs_captured}
    report.found["steps"][label(shape, other)] = found
    found["weight_bytes"], found["kv_block_bytes"] = load.weight_bytes, load.engine._now().cache.size.block_bytes
    try:
        measure_steps(other, load, ceilings, smoke, clock, found)
    finally:
        stats = load.engine.stats()
        found["graph_replays"], found["eager_steps"] = stats.graph_replays, stats.eager_steps
        load.engine.close()


def launch_counts(report: Report, device: torch.device, smoke: bool, clock: Clock) -> None:
    """Behind all that is timed by the clock: what the profiler leaves in a process slows its launches down."""
    shapes = plan(device, smoke)
    for shape, other, _ in shapes:
        if shape == shapes[0][0]:
            clock.check()
            load = made_load(shape, device, smoke, other or {})
            found = report.found["steps"].setdefault(label(shape, other), {})
            try:
                count_all_launches(load, found.setdefault("latency", {}))
            finally:
                load.engine.close()


def made_load(
    shape: str | DecoderConfig, device: torch.device, smoke: bool, other: dict[str, Any] | None, **more: Any
) -> Load:
    num_items, num_users = (200, 4) if smoke else (100_000, 256)
    if other is not None:
        more |= other | ({"cpu_path": "torch"} if smoke else {"row_buckets": FEW_BUCKETS})
    return Load(shape, device, "float32" if smoke else "bfloat16", num_items, num_users, **more)


def compile_part(index: int, device: torch.device, smoke: bool) -> None:
    """Runs what one part of the plan runs, or the kernels' own cases behind it, once: what Triton compiles then lies on
    the disk when that part is timed. Two layers, since a model's last one runs other kernels than the rest."""
    parts = plan(device, smoke)
    if index == len(parts):
        compile_kernels(device, smoke)
        return
    if index > len(parts):
        transformers({}, Compiled, device, smoke, Clock.of(math.inf), num_users=1)
        return
    shape, other, _ = parts[index]
    load = made_load(replace(SHAPES[shape], num_layers=2), device, smoke, other, kv_budget="256MiB")
    touch(load, batches(smoke, other))
    load.engine.close()


def compile_kernels(device: torch.device, smoke: bool) -> None:
    """All that compile; raises the last error of those that don't."""
    failure: Exception | None = None
    for make in (*(make for _, make in kernel_makers(device, smoke)), *search_makers(device, smoke)):
        try:
            with torch.inference_mode():
                make().call()
        except Exception as error:  # the others are run all the same
            traceback.print_exc()
            failure = error
    if failure is not None:
        raise failure


def transformers(
    found: dict[str, Any],
    kind: type[StaticPrefix],
    device: torch.device,
    smoke: bool,
    clock: Clock,
    num_users: int = 53,
) -> None:
    """What a user would write over the same weights, by shape."""
    shape, workload = "tiny" if smoke else "0.5b", Workload()
    dtype, num_items = ("float32", 200) if smoke else ("bfloat16", 10_000)
    subject = Subject.random(shape, num_items=num_items, dtype=dtype, device=str(device))
    contender = kind(subject)
    try:
        users = make_users(5 if smoke else num_users, num_items, workload, 0)
        contender_latency(contender, users, clock, device, found.setdefault(shape, {}))
    finally:
        contender.close()


def measure_steps(
    other: dict[str, Any] | None,
    load: Load,
    ceilings: Ceilings,
    smoke: bool,
    clock: Clock,
    found: dict[str, Any],
) -> None:
    """Each is filled row by row: what is measured when the time is up stays."""
    latency(load, ceilings, clock, 4 if smoke else 300, found.setdefault("latency", {}))
    saturated(load, ceilings, clock, batches(smoke, other), found.setdefault("saturated", {}))


def batches(smoke: bool, other: dict[str, Any] | None) -> tuple[int, ...]:
    if smoke:
        return (2,)
    return (1, 8, 16, 32, 64) if other is None else (1, 8)


def label(shape: str, other: dict[str, Any] | None) -> str:
    return shape + "".join(f", {name} {kind}" for name, kind in (other or {}).items())


def plan(device: torch.device, smoke: bool) -> list[tuple[str, dict[str, Any] | None, float]]:
    """Shapes, settings that are not the engine's own, and the seconds they may take; what matters most comes first."""
    launches = ({"launches": "apart"}, {"launches": "overlapped"})
    in_8_bits: tuple[dict[str, Any], ...] = ({"weights": "fp8"}, {"weights": "int8"})
    in_8_bits += ({"kv": "fp8" if smoke or multiplies_fp8(device) else "int8"},)
    if smoke:
        return [("tiny", None, 20), *(("tiny", other, 20) for other in (launches[0], *in_8_bits))]
    first = [("0.5b", None, 55), *(("0.5b", other, 20) for other in launches), ("7b", None, 50)]
    return [*first, ("7b", in_8_bits[0], 30), ("1.5b", None, 40), *(("7b", other, 30) for other in in_8_bits[1:])]


def sections(report: Report, device: torch.device, ceilings: Ceilings, smoke: bool, first_case: int) -> list[Section]:
    """All of it, what matters most first; the kernels from this one on."""
    run = partial(steps, report, device=device, ceilings=ceilings, smoke=smoke)
    shapes: list[Section] = [
        (f"steps {label(shape, other)}", seconds, partial(run, shape, other))
        for shape, other, seconds in plan(device, smoke)
    ]
    searching: Section = ("searches", 20, partial(searches, report, device, smoke))
    theirs: Section = (
        "transformers",
        20,
        partial(transformers, report.found["transformers"], StaticPrefix, device, smoke),
    )
    last: list[Section] = [
        ("launches", 25, partial(launch_counts, report, device, smoke)),
        ("kernels", 120, partial(kernels, report, device, ceilings, smoke, first_case)),
    ]
    if not smoke:  # on a CPU a compiler's minute for figures that mean nothing
        compiled = partial(transformers, report.found["transformers"], Compiled, device, smoke)
        last.insert(0, ("transformers, compiled", 60, compiled))
    return [shapes[0], searching, theirs, *shapes[1:], *last]


def table(found: dict[str, Any]) -> str:
    """For people: what the file has, in lines."""
    lines = [
        f"{found['machine'].get('name', 'unknown')}{' (a smoke test: these figures mean nothing)' * found['is_smoke']}"
    ]
    ceilings = found["machine"].get("ceilings")
    if ceilings:
        copy, matmul = ceilings["copy_bytes"] / 1e9, ceilings["matmul_flops"] / 1e12
        lines.append(f"ceilings: copy {copy:,.0f} GB/s, bf16 product {matmul:,.1f} TFLOP/s")
    if found["goals"]:
        lines += ["", f"{'to reach on an H200':62} {'found':>8} {'bound':>8}"]
    for name, row in found["goals"].items():
        bound = f"{'<=' if row['at_most'] else '>='} {row['bound']:g}"
        lines.append(f"{name:62} {row['found']:8.3f} {bound:>8}{'' if row['reached'] else '  missed'}")
    if found["searches"]:
        lines += ["", f"{'search':58} {'us':>9} {'GB/s':>8} {'of a copy':>10}"]
    for name, row in found["searches"].items():
        lines.append(f"{name:58} {row['us']:9.1f} {row['gb_s']:8.0f} {row['of_copy']:10.0%}")
    lines += ["", f"{'kernel':58} {'us':>9} {'GB/s':>8} {'TFLOP/s':>8} {'of ceiling':>10}"]
    for name, row in found["kernels"].items():
        lines.append(f"{name:58} {row['us']:9.1f} {row['gb_s']:8.0f} {row['tflop_s']:8.1f} {row['of_ceiling']:10.0%}")
    for shape, step in found["steps"].items():
        heads = f"{'device us':>10} {'launches':>9} {'p50 ms':>8} {'p95':>8} {'p99':>8} {'users/s':>9}"
        lines += ["", f"{shape + ', random weights':40} {heads}"]
        for name, row in {**step.get("latency", {}), **step.get("saturated", {})}.items():
            lines.append(step_line(name, row))
        if "graph_replays" in step:
            lines.append(f"{step['graph_replays']:,} passes from graphs, {step['eager_steps']:,} launched one by one")
        lines += [step_line(f"transformers, {name}", row) for name, row in found["transformers"].get(shape, {}).items()]
    lines += ["", *(f"FAILED {name}: {why}" for name, why in found["failed"].items())]
    lines += [f"skipped for want of time: {name}" for name in found["skipped"]]
    return "\n".join(lines)


def step_line(name: str, row: dict[str, Any]) -> str:
    cells = [row.get(key) for key in ("device_us", "launches", "p50_ms", "p95_ms", "p99_ms", "users_s")]
    widths, digits = (10, 9, 8, 8, 8, 9), (1, 0, 3, 3, 3, 0)
    shown = [
        f"{'-' if cell is None else f'{cell:,.{digit}f}':>{width}}"
        for cell, width, digit in zip(cells, widths, digits, strict=True)
    ]
    return f"{name:40} {' '.join(shown)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder; bench/results, or a temporary one of a smoke test")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--until", type=float, default=math.inf, help="Unix time by which it must have ended")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU; the figures mean nothing")
    parser.add_argument("--only", default="", help="sections, as 'searches; steps 7b', into the file that is there")
    parser.add_argument("--begin", default="", help="with this section, and into the file that is there")
    parser.add_argument("--case", type=int, default=0, help="the first kernel to measure")
    parser.add_argument("--compile", type=int, metavar="PART", help="only compile what this part of it runs")
    options = parser.parse_args()
    smoke = options.cpu_smoke
    out = options.out or Path(tempfile.mkdtemp() if smoke else "bench/results")
    if not smoke and not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device is usable here; run it on a machine with one, or with --cpu-smoke")
        return 1
    device = torch.device("cpu" if smoke else "cuda")
    if options.compile is not None:
        compile_part(options.compile, device, smoke)
        return 0
    only = listed(options.only)
    report = Report(out, smoke, go_on=bool(only or options.begin))
    gc.collect()
    gc.freeze()  # most of what is collected before each measurement has only been imported
    clock = Clock.of(min(options.seconds, options.until - time.time()))
    ceilings = measure_ceilings(device, smoke)
    report.found["machine"] = {**machine(device), "ceilings": asdict(ceilings)}
    all_sections = sections(report, device, ceilings, smoke, options.case)
    names = [name for name, _, _ in all_sections]
    if strange := sorted({*only, *([options.begin] if options.begin else [])} - {*names}):
        print(f"bench/gpu.py: {'; '.join(strange)}: no such section; there are {'; '.join(names)}")
        return 1
    behind = all_sections[names.index(options.begin) if options.begin else 0 :]
    left = [section for section in behind if not only or section[0] in only]
    for place, (name, seconds, section) in enumerate(left):
        next_case = report.run(name, clock, clock.left if only or smoke else seconds, section)
        following = name if next_case else left[place + 1][0] if place + 1 < len(left) else None
        if not still_answers(device) and following is not None:
            go_on_elsewhere(following, next_case, clock, options)
    report.write()
    print(table(report.found))
    return 1 if report.found["failed"] else 0


def go_on_elsewhere(name: str, case: int, clock: Clock, options: argparse.Namespace) -> None:
    """Does not return: this process becomes another one, which measures what is left from the section `name` on."""
    print(f"the device is lost to this process; {name} is measured in another one", flush=True)
    given = ["--out", str(options.out or "bench/results"), "--only", options.only, "--begin", name, "--case", str(case)]
    limits = ["--seconds", str(clock.left), "--until", str(options.until)]
    os.execv(sys.executable, [sys.executable, __file__, *given, *limits])


if __name__ == "__main__":
    sys.exit(main())
