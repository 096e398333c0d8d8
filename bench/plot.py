"""Charts of a run's keys, as SVG and PNG: `python bench/plot.py FILE.json DIR [MORE.json ...]`, or `run.py ... --plot
DIR`.

A chart is drawn where its keys are there. Contenders that had more rounds in another run are taken from its file, and
marked. Needs matplotlib; nothing else of bench/ does.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from report import cell

Values = Mapping[str, Any]
OURS, OTHERS, LIMIT, SECOND = "#1f6f8b", "#b9c2c9", "#c0392b", "#e0a458"
FEWEST_RUNS = 3  # of a contender: fewer are no median
EVENTS = ("cold", "same", "append", "slide", "correction")
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # of figures that a line would cross
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "svg.hashsalt": "speeder",  # the same figures, the same file
}


def draw_all(values: Values, folder: Path) -> list[str]:
    """Writes every chart whose keys are there; returns their names. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with pyplot.rc_context(STYLE):
        for name, draw in CHARTS.items():
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            if draw(axes, values):
                axes.set_title(axes.get_title("left"), pad=20)
                axes.text(0, 1.02, subject(values), transform=axes.transAxes, fontsize=9, color="#7f8c8d")
                for kind in ("svg", "png"):
                    figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else {})
                drawn.append(name)
            pyplot.close(figure)
    return drawn


def with_another_run(values: Values, other: Values) -> dict[str, Any]:
    """With the contenders that had more rounds in a run of the same on the same machine. Raises ValueError for one of
    something else."""
    for key in ("shape", "dtype", "machine_cpu", "machine_cpu_flags"):
        if values.get(key) != other.get(key):
            raise ValueError(f"{key}: {values.get(key)} here, {other.get(key)} in another run: no chart shows both")
    found = dict(values)
    for name in contenders(other):
        if other.get(f"{name}_cold_runs", 0) > values.get(f"{name}_cold_runs", 0):
            found = {key: value for key, value in found.items() if not key.startswith(f"{name}_")}
            found |= {key: value for key, value in other.items() if key.startswith(f"{name}_")}
            found[f"{name}_from"] = "another run"
    return found


def contenders(values: Values) -> list[str]:
    """Keys of whatever was measured beside the engine, int8 weights among it."""
    return [key.removesuffix("_cold_ms") for key in values if key.endswith("_cold_ms") and not is_session(key)]


def subject(values: Values) -> str:
    machine = values.get("machine_gpu") or f"{values.get('machine_cores')} cores of {values.get('machine_cpu')}"
    return f"{values.get('shape')}, {values.get('dtype')}, {machine}"


def latency(axes: Any, values: Values) -> bool:
    """Cold and warm milliseconds of everybody who had rounds enough, the slowest on top."""
    names = [name for name in contenders(values) if values.get(f"{name}_cold_runs", FEWEST_RUNS) >= FEWEST_RUNS]
    if "cold_ms" not in values or not names:
        return False
    rows = [("speeder-engine", values["cold_ms"], values["warm_ms"])]
    rows += [(label(name, values), values[f"{name}_cold_ms"], values.get(f"{name}_warm_ms")) for name in names]
    rows.sort(key=lambda row: row[1])
    for at, (name, cold, warm) in enumerate(rows):
        dark, light = (OURS, "#7fb3c4") if name.startswith("speeder") else ("#7f8c8d", OTHERS)
        named = name == "speeder-engine"  # once in the legend
        for place, value, color, what in ((0.2, cold, dark, "cold"), (-0.2, warm, light, "returning")):
            if value is not None:
                axes.barh(at + place, value, 0.38, color=color, label=what if named else None)
                axes.text(value, at + place, f" {cell(value)}", va="center", fontsize=8, zorder=3, bbox=BEHIND)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    for key, style in (("cold_gemm_ms", "--"), ("warm_gemm_ms", ":")):
        axes.axvline(values[key], color=LIMIT, linestyle=style, linewidth=1, label=f"own products, {key.split('_')[0]}")
    axes.set_xscale("log")
    note = "; *: another run" if any(name.endswith("*") for name, *_ in rows) else ""
    axes.set_xlabel(f"milliseconds a user, median (log scale){note}")
    axes.set_title("One user: 30 items, 20 candidates")
    axes.margins(x=0.1)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return True


def limits(axes: Any, values: Values) -> bool:
    """How far a step is from its own products and from the machine's limits."""
    keys = ("cold_over_gemm", "warm_over_gemm", "cold_over_limit", "warm_over_limit")
    if any(key not in values for key in keys):
        return False
    _bars(
        axes, [key.replace("_over_", " /\n").replace("gemm", "own products") for key in keys], [values[k] for k in keys]
    )
    axes.axhline(1, color=LIMIT, linewidth=1, label="the limit")
    axes.set_ylabel("times")
    axes.set_title("A step, and what bounds it")
    axes.legend(frameon=False)
    return True


def throughput(axes: Any, values: Values) -> bool:
    """Users a second by batch, and what the matmul ceiling would allow."""
    batches = [size for size in (1, 4, 16, 64) if f"users_s_{size}" in values]
    if not batches:
        return False
    for suffix, name, color in (("", "returning, 1 + 20 rows", OURS), ("_cold", "cold, 30 + 20 rows", SECOND)):
        rates = [values[f"users_s_{size}{suffix}"] for size in batches]
        ceilings = [rate / values[f"of_ceiling_{size}{suffix}"] for size, rate in zip(batches, rates, strict=True)]
        axes.plot(batches, rates, "o-", color=color, label=name)
        axes.plot(batches, ceilings, "--", color=color, linewidth=1, label=f"matmul ceiling, {name.split(',')[0]}")
        for size, rate in zip(batches, rates, strict=True):
            axes.annotate(cell(rate), (size, rate), textcoords="offset points", xytext=(0, 6), fontsize=8, ha="center")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks(batches, [str(size) for size in batches])
    axes.set_xlabel("users in a batch")
    axes.set_ylabel("users a second")
    axes.set_title("Throughput")
    axes.legend(frameon=False, fontsize=8)
    return True


def sessions(axes: Any, values: Values) -> bool:
    """Rows a returning user costs, by event and length of history."""
    lengths = [length for length in (10, 50, 200) if f"session_cold_{length}_rows" in values]
    if not lengths:
        return False
    width = 0.8 / len(lengths)
    for index, length in enumerate(lengths):
        rows = [values[f"session_{event}_{length}_rows"] for event in EVENTS]
        places = [at + (index - (len(lengths) - 1) / 2) * width for at in range(len(EVENTS))]
        axes.bar(places, rows, width, color=(OTHERS, "#7fb3c4", OURS)[index % 3], label=f"history of {length}")
        for place, count in zip(places, rows, strict=True):
            axes.text(place, count, f"{count}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(EVENTS)), EVENTS)
    axes.set_ylabel("rows computed")
    axes.set_title("What a session saves")
    axes.legend(frameon=False)
    return True


def hit_rates(axes: Any, values: Values) -> bool:
    percents = sorted(int(key.rsplit("_", 1)[1]) for key in values if key.startswith("hit_rate_"))
    if not percents:
        return False
    rates = [100 * values[f"hit_rate_{percent}"] for percent in percents]
    axes.plot(percents, rates, "o-", color=OURS, label="found in sessions")
    axes.axhline(100 * values["hit_rate"], color=LIMIT, linewidth=1, linestyle="--", label="with room for all")
    axes.set_ylim(0, 100)
    axes.set_xlabel("KV budget, % of what all sessions take")
    axes.set_ylabel("% of history positions")
    axes.set_title("Cache hit rate on a Zipf stream")
    axes.legend(frameon=False)
    return True


def catalogue(axes: Any, values: Values) -> bool:
    names = {
        "ours": "catalogue_ms",
        "torch\nmatmul + topk": "catalogue_torch_ms",
        "faiss flat": "catalogue_faiss_ms",
        "faiss, half\nprecision": "catalogue_faiss_half_ms",
    }
    there = {name: key for name, key in names.items() if key in values}
    if "ours" not in there:
        return False
    _bars(axes, list(there), [values[key] for key in there.values()])
    axes.axhline(values["catalogue_read_ms"], color=LIMIT, linewidth=1, label="one read of the table")
    axes.set_ylabel("milliseconds, one user")
    axes.set_title(f"Top 10 of {values['catalogue_items']:,} items")
    axes.legend(frameon=False)
    return True


def _bars(axes: Any, names: list[str], heights: list[float]) -> None:
    axes.bar(names, heights, 0.6, color=[OURS, *[OTHERS] * (len(names) - 1)] if "ours" in names else OURS)
    for at, height in enumerate(heights):
        axes.text(at, height, cell(height), ha="center", va="bottom", fontsize=9)


def is_session(key: str) -> bool:
    return key.startswith("session_")


def label(name: str, values: Values) -> str:
    shown = "speeder-engine, int8" if name == "int8" else name.replace("_", " ")
    return shown + " *" * (f"{name}_from" in values)


CHARTS: dict[str, Callable[[Any, Values], bool]] = {
    "latency": latency,
    "limits": limits,
    "throughput": throughput,
    "sessions": sessions,
    "hit_rate": hit_rates,
    "catalogue": catalogue,
}

if __name__ == "__main__":
    first, out, *others = map(Path, sys.argv[1:])
    drawn = json.loads(first.read_text())
    for path in others:
        drawn = with_another_run(drawn, json.loads(path.read_text()))
    print("\n".join(draw_all(drawn, out)))
