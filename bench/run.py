"""Side by side with what a user would pick instead, and with what the machine can do: `python bench/run.py --help`.

A table for people; the last line of stdout is JSON with flat keys. bench/README.md documents every key.
"""

import math
import os
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import time
from importlib import import_module
from pathlib import Path

import typer
from commands import listed
from context import Bench
from machine import describe, served_dtype
from measure import Clock, OutOfTime
from report import Report
from waiting import SLEEP, SPIN, spinning, wait_by

from speeder_engine.device import pick_device
from speeder_engine.errors import SpeederError
from speeder_engine.progress import progress_bar
from speeder_engine.random_engine import SHAPES

# section -> its share of the time of `all`
SECTIONS = {
    "latency": 0.52,
    "throughput": 0.16,
    "sessions": 0.07,
    "catalogue": 0.10,
    "cache": 0.03,
    "host": 0.02,
    "kernels": 0.08,
    "train": 0.07,
}
OF_NO_ENGINE = ("cache", "host")  # sections that measure the same whatever is served
DTYPES = ("bfloat16", "float32", "float16", "auto")
SECONDS = {True: 55.0, False: 780.0}  # quick or not


def main(
    section: Annotated[str, typer.Argument(help=f"{', '.join(SECTIONS)} or all")],
    shape: Annotated[str | None, typer.Option(help=f"random weights: {', '.join(SHAPES)}; tiny if --quick")] = None,
    engine: Annotated[
        Path | None, typer.Option(help="an engine directory, of a window of 31 at least, instead of random weights")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPES)}: bfloat16 where the device multiplies it, else float32")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="small counts: under a minute for all")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="the keys go there, too")] = None,
    plot: Annotated[Path | None, typer.Option(help="a folder for charts, SVG and PNG")] = None,
    only: Annotated[str, typer.Option(help="contenders to compare with, as transformers,onnxruntime")] = "",
    seconds: Annotated[float | None, typer.Option(help="time for all of it")] = None,
    waiting: Annotated[
        str, typer.Option(help=f"contenders' threads {SLEEP} while they wait, or {SPIN} first, as by themselves")
    ] = SLEEP,
) -> None:
    """Measures SECTION; Ctrl-C leaves what was measured so far."""
    chosen = parsed(section, tuple(SECTIONS))
    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is not known; choose one of {', '.join(SHAPES)}", param_hint="--shape")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    if shape is not None and engine is not None:
        raise typer.BadParameter("give --shape or --engine, not both", param_hint="--engine")
    if engine is not None and set(chosen) <= set(OF_NO_ENGINE):
        raise typer.BadParameter(f"{section} measures no engine's weights; leave it out", param_hint="--engine")
    if seconds is not None and not 0 < seconds < math.inf:
        raise typer.BadParameter(f"{seconds:g}: a time above 0 is needed", param_hint="--seconds")
    if waiting not in (SLEEP, SPIN):
        raise typer.BadParameter(f"{waiting!r} is none of {SLEEP}, {SPIN}", param_hint="--waiting")
    wait_by(waiting)
    report = Report(json_file)
    try:
        chip = pick_device(device)
        bench = Bench(
            shape=shape or ("tiny" if quick else "0.5b"),
            engine_dir=engine,
            device=chip,
            dtype=served_dtype(chip) if dtype == "auto" else dtype,
            quick=quick,
            only=contenders(only),
            report=report,
            clock=Clock.of(seconds or SECONDS[quick] * sum(SECTIONS[name] for name in chosen) ** 0.5),
        )
        if engine is not None:
            bench.subject  # noqa: B018  what can't be loaded is said before anything is measured
        failed = run(bench, chosen)
    except SpeederError as error:
        typer.echo(f"bench/run.py: {error}", err=True)
        raise typer.Exit(1) from None
    report.show()
    if plot is not None:
        failed |= not plotted(report, plot)
    raise typer.Exit(int(failed))


def run(bench: Bench, sections: tuple[str, ...]) -> bool:
    """All sections in turn, each within its share of what is left; true if one failed."""
    report, failed, started = bench.report, False, time.monotonic()
    report.put("shape", bench.shape if bench.engine_dir is None else "engine")
    report.put("dtype", bench.dtype)
    report.put("device", bench.device.type)
    report.put("quick", bench.quick)
    report.put("waiting", SPIN if spinning() else SLEEP)
    report.describe(describe(bench.device))
    try:
        bench.limits  # noqa: B018  measured at the start, before anything else holds memory
        with progress_bar() as bench.progress:
            os.environ["SPEEDER_PROGRESS"] = "0"  # a terminal has one place for bars
            for index, name in enumerate(bench.track(sections, "sections")):
                share = SECTIONS[name] / sum(SECTIONS[each] for each in sections[index:])
                failed |= not run_section(bench, name, Clock.of(bench.clock.left * share))
                report.write()
            bench.limits.measure(3, Clock.of(20.0))
        put_limits(bench)
    except KeyboardInterrupt:
        report.note("interrupted: the rest was not measured")
        failed = True
    report.put("seconds", time.monotonic() - started)
    return failed


def run_section(bench: Bench, name: str, clock: Clock) -> bool:
    """False if it failed: the others are measured all the same."""
    try:
        import_module(f"sections.{name}").measure(bench, clock)
    except OutOfTime:
        bench.report.note(f"{name}: the time was up before all of it was measured")
    except SpeederError:
        raise
    except Exception as error:
        bench.report.note(f"{name}: failed: {type(error).__name__}: {error}")
        return False
    return True


def put_limits(bench: Bench) -> None:
    """The best that the probes reached, at the start, at the end and in between."""
    rows = []
    for name, rate in bench.limits.best.items():
        unit = "gflop_s" if name.startswith("matmul") else "gb_s"
        bench.report.put(f"ceiling_{name}_{unit}", rate / 1e9)
        rows.append([name, rate / 1e9, "GFLOP/s" if unit == "gflop_s" else "GB/s"])
    bench.report.table("what the machine can do, all threads", ("", "best", "unit"), rows)


def plotted(report: Report, folder: Path) -> bool:
    from plot import draw_all

    try:
        names = draw_all(report.values, folder)
    except ImportError:
        typer.echo("bench/run.py: --plot needs matplotlib; pip install 'speeder-engine[bench]'", err=True)
        return False
    typer.echo(f"charts: {', '.join(names)}", err=True)
    return True


def parsed(section: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if section == "all":
        return known
    if section not in known:
        raise typer.BadParameter(f"{section!r} is not known; choose {', '.join(known)} or all", param_hint="SECTION")
    return (section,)


def contenders(only: str) -> tuple[str, ...]:
    """Keys of alternatives, checked; empty: all."""
    from baselines.registry import BASELINES

    keys = tuple(listed(only, ","))
    strange = [key for key in keys if key not in BASELINES]
    if strange:
        known = ", ".join(BASELINES)
        raise typer.BadParameter(f"{', '.join(strange)}: no such contender; there are {known}", param_hint="--only")
    return keys


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app()
