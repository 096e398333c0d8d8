"""The study's results as markdown, figures beside the file: `python bench/results_tables.py docs/results/DATA.json`.

The file holds, as speeder_engine.evaluation.results makes them; a part that isn't there is left out:

    rows    system, variant, uses_time, metric, mean, low, high, seeds
    paired  system, variant, uses_time, against, metric, mean, low, high
    groups  system, variant, by, group, num_users, metric, mean, low, high
    curves  name, metric, x, series: {label: {mean, low, high}}, lists as long as x

`--no-figures` needs no matplotlib.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
OURS, DECLARED = "speeder", "declared"
CLASSES = {False: "without the query's time", True: "with the query's time"}
METRICS = ("vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr")
PAIRED = ("hr@10", "ndcg@10", "vhr@1")
GROUPED = ("hr@10", "ndcg@10")


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Every table of the file, a heading and markdown each."""
    rows, paired = results.get("rows", []), results.get("paired", [])
    for uses_time, title in CLASSES.items():
        mine = [row for row in rows if row["uses_time"] is uses_time]
        yield from titled(f"Systems {title}", system_table([row for row in mine if is_system(row)]))
        differences = [pair for pair in paired if is_declared(pair) and pair.get("uses_time") is uses_time]
        yield from titled(f"The declared model's difference to each, {title}", difference_table(differences))
        yield from titled(f"Ablations {title}", ablation_table([row for row in mine if row["system"] == OURS], paired))
    for by in unique(row["by"] for row in results.get("groups", [])):
        for metric in GROUPED:
            chosen = [row for row in results["groups"] if (row["by"], row["metric"]) == (by, metric)]
            yield from titled(f"{metric} by {by}", group_table(chosen))
    for curve in results.get("curves", []):
        yield from titled(f"{curve['name']} ({curve.get('metric', 'mean')})", curve_table(curve))


def system_table(rows: Sequence[Row]) -> list[list[str]]:
    """The best mean of each metric is bold; other systems first, the declared model last."""
    names = sorted(unique((row["system"], row["variant"]) for row in rows), key=lambda name: name[0] == OURS)
    found = {(row["system"], row["variant"], row["metric"]): row for row in rows}
    shown = [metric for metric in METRICS if any(key[2] == metric for key in found)]
    best = {metric: max(row["mean"] for row in rows if row["metric"] == metric) for metric in shown}
    lines = [["system", *shown, "seeds"]]
    for name in names:
        cells = [estimate(found.get((*name, metric)), best[metric]) for metric in shown]
        seeds = next(row["seeds"] for row in rows if (row["system"], row["variant"]) == name)
        lines.append([label(*name), *cells, str(seeds)])
    return lines


def difference_table(pairs: Sequence[Row]) -> list[list[str]]:
    """A line for each that the declared model is paired with; a star where the interval excludes zero."""
    found = {(pair["against"], pair["metric"]): pair for pair in pairs}
    lines = [["against", *PAIRED]]
    for against in unique(pair["against"] for pair in pairs):
        lines.append([against, *(difference(found.get((against, metric))) for metric in PAIRED)])
    return lines


def ablation_table(rows: Sequence[Row], paired: Sequence[Row]) -> list[list[str]]:
    """The declared model, then every variant with what it differs by; nothing where there is no other variant."""
    variants = sorted(unique(row["variant"] for row in rows), key=lambda variant: variant != DECLARED)
    if not set(variants) - {DECLARED}:
        return []
    found = {(row["variant"], row["metric"]): row for row in rows}
    differences = ablation_differences(paired, rows[0]["uses_time"])
    lines = [["variant", *(name for metric in PAIRED for name in (metric, "difference"))]]
    for variant in variants:
        cells = [
            cell
            for metric in PAIRED
            for cell in (estimate(found.get((variant, metric))), difference(differences.get((variant, metric))))
        ]
        lines.append([variant, *cells])
    return lines


def ablation_differences(paired: Sequence[Row], uses_time: bool) -> dict[tuple[str, str], Row]:
    """By variant and metric: how a variant of ours differs from the declared one of the same class."""
    return {
        (pair["variant"], pair["metric"]): pair
        for pair in paired
        if pair["system"] == OURS and pair["against"] == DECLARED and pair.get("uses_time", uses_time) is uses_time
    }


def group_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line a system, a column a group with its number of users."""
    groups = unique((row["group"], row["num_users"]) for row in rows)
    found = {(row["system"], row["variant"], row["group"]): row for row in rows}
    lines = [["system", *(f"{group} ({num_users:,})" for group, num_users in groups)]]
    for name in unique((row["system"], row["variant"]) for row in rows):
        lines.append([label(*name), *(estimate(found.get((*name, group))) for group, _ in groups)])
    return lines


def curve_table(curve: Row) -> list[list[str]]:
    series = curve["series"]
    lines = [["", *map(str, curve["x"])]]
    for name, values in series.items():
        points = zip(values["mean"], values["low"], values["high"], strict=True)
        lines.append([name, *(estimate({"mean": mean, "low": low, "high": high}) for mean, low, high in points)])
    return lines


def is_system(row: Row) -> bool:
    return bool(row["system"] != OURS) or is_declared(row)


def is_declared(row: Row) -> bool:
    return bool(row["system"] == OURS and row["variant"] == DECLARED)


def label(system: str, variant: str) -> str:
    return f"{system} ({variant})" if system == OURS else system


def estimate(row: Row | None, best: float | None = None) -> str:
    """`.241 [.229, .250]`, bold where the mean is `best`."""
    if row is None:
        return "-"
    shown = f"**{figure(row['mean'])}**" if row["mean"] == best else figure(row["mean"])
    return shown if row["low"] == row["high"] else f"{shown} [{figure(row['low'])}, {figure(row['high'])}]"


def difference(row: Row | None) -> str:
    """`+.012 [+.004, +.020] *`; the star: zero is outside."""
    if row is None:
        return "-"
    shown = f"{figure(row['mean'], '+')} [{figure(row['low'], '+')}, {figure(row['high'], '+')}]"
    return f"{shown} *" if row["low"] > 0 or row["high"] < 0 else shown


def figure(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def titled(title: str, lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Nothing where there is no line under the head."""
    if len(lines) > 1:
        head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
        yield "\n".join([f"### {title}", "", head, "|" + "---|" * len(lines[0]), *body, ""])


def unique(values: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file of results")
    parser.add_argument("--out", type=Path, help="folder of the figures; without it the file's own")
    parser.add_argument("--no-figures", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    print("\n".join(tables(results)))
    if not arguments.no_figures:
        from results_figures import draw_results

        folder = arguments.out or arguments.results.parent
        for name in draw_results(results, folder):
            print(f"![{name}]({name}.svg)")


if __name__ == "__main__":
    main()
