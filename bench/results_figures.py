"""Figures of a study's results as SVG: systems by class, ablations, curves, each with intervals. Needs matplotlib."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plot import LIMIT, OTHERS, OURS, SECOND, STYLE
from results_tables import CLASSES, DECLARED, PAIRED, Row, ablation_differences, is_system, label, unique
from results_tables import OURS as OUR_SYSTEM

COLORS = (OURS, SECOND, LIMIT, "#7f8c8d", "#7fb3c4", "#6c4f77")


def draw_results(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes every figure that has data as `<data>-<name>.svg`; returns their names, without the ending.

    Raises ImportError without matplotlib. The same results give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with pyplot.rc_context(STYLE):
        for name, panels, size, draw in figures(results):
            figure, axes = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
            draw(axes[0])
            drawn.append(f"{results['data']}-{name}")
            figure.savefig(folder / f"{drawn[-1]}.svg", metadata={"Date": None})
            pyplot.close(figure)
    return drawn


def figures(results: Mapping[str, Any]) -> list[tuple[str, int, tuple[float, float], Callable[[Any], None]]]:
    """Name, number of panels, size in inches and what draws them."""
    found: list[tuple[str, int, tuple[float, float], Callable[[Any], None]]] = []
    rows, paired = results.get("rows", []), results.get("paired", [])
    bars = [row for row in rows if is_system(row) and row["metric"] in PAIRED]
    if bars:
        height = 1.2 + 0.3 * len(_names(bars))
        found.append(("systems", len(PAIRED), (10, height), lambda axes: systems(axes, bars)))
    for uses_time, title in CLASSES.items():
        differences = ablation_differences(paired, uses_time)
        if differences:
            name = "ablations-with-time" if uses_time else "ablations"
            height = 1.2 + 0.3 * len(unique(variant for variant, _ in differences))
            found.append((name, len(PAIRED), (10, height), _ablations_of(differences, title)))
    for curve in results.get("curves", []):
        name = re.sub(r"[^a-z0-9]+", "-", curve["name"].lower()).strip("-")
        found.append((name, 1, (6, 4), _curve_of(curve)))
    return found


def systems(axes: Sequence[Any], rows: Sequence[Row]) -> None:
    """Bars with intervals, a panel a metric: the class without the query's time on top, the other below."""
    names = _names(rows)
    found = {(row["uses_time"], row["system"], row["variant"], row["metric"]): row for row in rows}
    for panel, metric in zip(axes, PAIRED, strict=True):
        for place, name in enumerate(names):
            row = found.get((*name, metric))
            if row is not None:
                color = OURS if name[1] == OUR_SYSTEM else SECOND if name[0] else OTHERS
                panel.barh(-place, row["mean"], 0.7, color=color, xerr=_errors(row), error_kw={"elinewidth": 1})
        panel.set_title(metric)
        panel.set_yticks([-place for place in range(len(names))], [])
        split = sum(not uses_time for uses_time, *_ in names)
        if 0 < split < len(names):
            panel.axhline(0.5 - split, color="#7f8c8d", linewidth=0.8, linestyle=":")
    told = [f"{label(system, variant)}{', time' if uses_time else ''}" for uses_time, system, variant in names]
    axes[0].set_yticklabels(told)


def ablations(axes: Sequence[Any], differences: Mapping[tuple[str, str], Row], title: str) -> None:
    """How each variant differs from the declared model, with paired intervals; solid where zero is outside."""
    variants = unique(variant for variant, _ in differences)
    for panel, metric in zip(axes, PAIRED, strict=True):
        for place, variant in enumerate(variants):
            row = differences.get((variant, metric))
            if row is not None:
                sure = row["low"] > 0 or row["high"] < 0
                style = {"color": OURS, "markerfacecolor": OURS if sure else "white", "capsize": 3}
                panel.errorbar(row["mean"], -place, xerr=_errors(row), fmt="o", **style)
        panel.axvline(0, color=LIMIT, linewidth=1)
        panel.set_title(metric)
        panel.set_yticks([-place for place in range(len(variants))], [])
    axes[0].set_yticklabels(variants)
    axes[0].set_xlabel(f"difference to `{DECLARED}`, {title}", loc="left")


def curve(panel: Any, drawn: Row) -> None:
    """A line and a band a series."""
    for color, (name, values) in zip(COLORS, drawn["series"].items(), strict=False):
        panel.plot(drawn["x"], values["mean"], "o-", color=color, label=name, markersize=4)
        panel.fill_between(drawn["x"], values["low"], values["high"], color=color, alpha=0.15, linewidth=0)
    panel.set_title(drawn["name"])
    panel.set_xticks(drawn["x"], [str(x) for x in drawn["x"]])
    panel.set_ylabel(drawn.get("metric", ""))
    panel.legend(frameon=False, fontsize=8)


def _ablations_of(differences: Mapping[tuple[str, str], Row], title: str) -> Callable[[Any], None]:
    return lambda axes: ablations(axes, differences, title)


def _curve_of(drawn: Row) -> Callable[[Any], None]:
    return lambda axes: curve(axes[0], drawn)


def _names(rows: Sequence[Row]) -> list[tuple[bool, str, str]]:
    """Each once: class by class, weaker systems first by their mean over the metrics, ours last."""
    names = unique((row["uses_time"], row["system"], row["variant"]) for row in rows)
    strength = {
        name: sum(row["mean"] for row in rows if (row["uses_time"], row["system"], row["variant"]) == name)
        for name in names
    }
    return sorted(names, key=lambda name: (name[0], name[1] == OUR_SYSTEM, strength[name]))


def _errors(row: Row) -> list[list[float]]:
    return [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
