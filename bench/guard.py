"""Whether anything got slower: `make bench-guard`.

    python bench/guard.py [--update]

Ratios of a quick run on the CPU, each measured in turn with what it is a ratio to, are held against those committed in
bench/results/guard.json for the same dtype and instruction set: more than a quarter worse fails. Instructions of the
cache manager are counted by callgrind: 3 % more fail. No second is compared with another machine's. What looks worse is
measured again, twice at most, and fails only if it stays worse: a machine that others use does not fail it.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import native
import torch
import typer
from context import Bench
from machine import served_dtype
from measure import Clock, median_of
from report import Report
from run import run_section

PLACE = Path(__file__).resolve().parent / "results" / "guard.json"
ATTEMPTS = 3
RATIO_ROOM, INSTRUCTION_ROOM = 1.25, 1.03
LOWER, HIGHER = "lower", "higher"
# section -> its ratios and which way is better
RATIOS: dict[str, dict[str, str]] = {
    "latency": {
        "cold_over_gemm": LOWER,
        "warm_over_gemm": LOWER,
        "int8_over_bf16": HIGHER,
        "vs_transformers": HIGHER,
        "vs_text_generation": HIGHER,
        "vs_text_generation_warm": HIGHER,
    },
    "throughput": {"throughput_of_ceiling": HIGHER},
    "catalogue": {"catalogue_over_read": LOWER},
    "train": {"train_vs_text": HIGHER},
}
CONTENDERS = ("transformers", "transformers_static", "text_generation")  # of `vs_...`, and quick to run
INSTRUCTIONS = "cache_manager_instructions"
SECONDS = 20.0  # of a section
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Worse:
    """A figure that left its room."""

    key: str
    committed: float
    measured: float

    def __str__(self) -> str:
        return f"{self.key}: {self.measured:.4g}, committed {self.committed:.4g}"


def worsened(key: str, better: str, committed: float, measured: float, room: float) -> Worse | None:
    """`room`: how many times worse is still fine."""
    factor = measured / committed if better == LOWER else committed / measured
    return Worse(key, committed, measured) if factor > room else None


def compare(committed: Mapping[str, float], measured: Mapping[str, float]) -> list[Worse]:
    """The ratios that both have."""
    found = [
        worsened(key, better, committed[key], measured[key], RATIO_ROOM)
        for keys in RATIOS.values()
        for key, better in keys.items()
        if key in committed and key in measured
    ]
    return [each for each in found if each is not None]


def missing(committed: Mapping[str, float], measured: Mapping[str, float]) -> list[str]:
    """Ratios that were committed and aren't measured any more: nothing guards them."""
    return [key for key in committed if key not in measured]


def kind_of_machine() -> str:
    """Ratios of the same kind are compared: of the dtype that the machine serves, and its instructions."""
    return f"{served_dtype(CPU)}, {torch.backends.cpu.get_cpu_capability()}"


def ratios_of_kind(committed: Mapping[str, Any], kind: str) -> dict[str, float] | None:
    """None, and a line that says why, where the ratios that were committed are of other machines."""
    found: dict[str, dict[str, float]] = committed.get("ratios", {})
    if found and kind not in found:
        others = " and ".join(found)
        typer.echo(f"ratios: committed with {others}, here is {kind}: not compared; --update commits these", err=True)
        return None
    return found.get(kind, {})


def measure_section(name: str) -> dict[str, float]:
    """The section's ratios, those that could be measured here."""
    report = Report()
    bench = Bench("tiny", None, CPU, served_dtype(CPU), True, CONTENDERS, report, Clock.of(2 * SECONDS))
    run_section(bench, name, Clock.of(SECONDS))
    for line in report.notes:
        typer.echo(line, err=True)
    return {key: float(value) for key in RATIOS[name] if (value := report.values.get(key)) is not None}


def measure_until_fine(
    committed: Mapping[str, float], measure: Callable[[str], dict[str, float]], attempts: int = ATTEMPTS
) -> dict[str, float]:
    """All sections; those with a ratio that looks worse again, of each ratio the best that was measured."""
    best: dict[str, float] = {}
    for name, keys in RATIOS.items():
        for _ in range(attempts):
            for key, value in measure(name).items():
                best[key] = value if key not in best else (min if keys[key] == LOWER else max)(best[key], value)
            ours = {key: value for key, value in best.items() if key in keys}
            if not compare(committed, ours) and not missing({k: v for k, v in committed.items() if k in keys}, ours):
                break
    return best


def measure_medians(measure: Callable[[str], dict[str, float]], attempts: int = ATTEMPTS) -> dict[str, float]:
    """All sections several times: what is committed is no lucky figure."""
    found = [{key: value for name in RATIOS for key, value in measure(name).items()} for _ in range(attempts)]
    return {key: median_of(each[key] for each in found if key in each) for key in found[0]}


def count_instructions() -> tuple[str, int] | None:
    """(compiler, instructions) of the fixed steps of bench/cache_steps.cpp; None, and a line that says why, without
    the tools."""
    try:
        return native.compiler_version(), native.count_instructions(native.build("cache_steps"))
    except native.MissingTool as error:
        typer.echo(f"{INSTRUCTIONS}: not counted: {error}", err=True)
        return None


def guard_instructions(committed: Mapping[str, Any], counted: tuple[str, int] | None) -> Worse | None:
    """Counts of the same compiler are compared, others say nothing."""
    if counted is None or INSTRUCTIONS not in committed:
        return None
    compiler, count = counted
    if committed["compiler"] != compiler:
        typer.echo(
            f"{INSTRUCTIONS}: committed with {committed['compiler']}, here is {compiler}: not compared", err=True
        )
        return None
    return worsened(INSTRUCTIONS, LOWER, committed[INSTRUCTIONS], count, INSTRUCTION_ROOM)


def commit(committed: Mapping[str, Any], kind: str, place: Path) -> None:
    """Writes this machine's ratios and instructions; what other kinds have committed stays."""
    measured = {key: float(f"{value:.4g}") for key, value in measure_medians(measure_section).items()}
    counted = count_instructions()
    found = {**committed, "ratios": committed.get("ratios", {}) | {kind: measured}}
    if counted is not None:
        found |= {"compiler": counted[0], INSTRUCTIONS: counted[1]}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(f"{place.name}: {len(measured)} ratios committed for {kind}")


def main(
    update: Annotated[bool, typer.Option("--update", help="commit to what is measured now")] = False,
    place: Annotated[Path, typer.Option(help="the committed figures")] = PLACE,
) -> None:
    """Fails with exit code 1, naming what got worse and both figures."""
    committed: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    kind = kind_of_machine()
    if update:
        commit(committed, kind, place)
        return
    if not committed:
        typer.echo(f"bench/guard.py: {place} is not there; write it with --update", err=True)
        raise typer.Exit(1)
    known = ratios_of_kind(committed, kind)
    ratios = known or {}
    measured = {} if known is None else measure_until_fine(ratios, measure_section)
    counted = count_instructions()
    for key, value in measured.items():
        typer.echo(f"{key}: {value:.4g}" + (f", committed {ratios[key]:.4g}" if key in ratios else ", not committed"))
    if counted is not None:
        typer.echo(f"{INSTRUCTIONS}: {counted[1]:,}, committed {committed.get(INSTRUCTIONS, 0):,}")
    bad = [str(each) for each in (*compare(ratios, measured), guard_instructions(committed, counted)) if each]
    bad += [f"{key}: was not measured, committed {ratios[key]:.4g}" for key in missing(ratios, measured)]
    typer.echo("\n".join(f"WORSE {line}" for line in bad) or "nothing that was compared got slower")
    raise typer.Exit(int(bool(bad)))


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app()
