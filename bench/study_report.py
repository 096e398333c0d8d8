"""What the runs of the study have left -> docs/results/DATA.json, as bench/results_tables.py reads it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_runs import AMONG_THEMSELVES, CUT_SHORT, LENGTHS, TARGETS
from study_variants import COLD_ITEMS, DECLARED, WITH_TIME

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.evaluation.bootstrap import mean_interval, values_by_seed
from speeder_engine.evaluation.groups import GROUP_METRICS, GROUPINGS
from speeder_engine.evaluation.report import Report
from speeder_engine.evaluation.results import curve_of, group_rows, paired_rows, rows_of
from speeder_engine.files import write_json

OURS = "speeder"
SHUFFLED = "history shuffled but for its last item"
# what was kept as, of which system and variant, what it is called
SHUFFLES = (
    ("shuffled", OURS, DECLARED, SHUFFLED),
    ("shuffled for the decoder", OURS, DECLARED, f"{SHUFFLED}, for the decoder alone"),
    ("shuffled", "itemknn", "itemknn", SHUFFLED),
)
Reports = Mapping[tuple[str, str], Mapping[int, Report]]  # system and variant -> seed -> report
Asked = dict[tuple[str, int], Report]  # variant and seed -> report


def write_report(data: Path, work: Path, out: Path) -> None:
    reports, extra = read_reports(work)
    split = leave_one_out(load_dataset(data))
    asked = split.queries("test")
    # a model that a tenth of the targets was kept from is asked for those alone
    asked_apart = (*COLD_ITEMS, *(name + each for name in (TARGETS, AMONG_THEMSELVES) for each in COLD_ITEMS))
    systems = {key: each for key, each in reports.items() if key[1] not in asked_apart}
    results: dict[str, Any] = {"data": split.dataset.name, "rows": [], "paired": [], "groups": [], "curves": []}
    for (system, variant), by_seed in systems.items():
        results["rows"] += rows_of(list(by_seed.values()), system, name_of(variant))
    results["paired"] = differences(systems)
    for key in shown_in_groups(systems):
        for group in GROUPINGS.values():
            results["groups"] += group_rows(list(systems[key].values()), key[0], name_of(key[1]), group(split, asked))
    results["groups"] += cold_rows(reports)
    results["curves"] = lengths(extra)
    for asked_as, system, variant, told in SHUFFLES:
        mixed = of_variant(extra[asked_as], variant)
        if mixed and (system, variant) in reports:
            whole = seeds_of(reports[system, variant], mixed)
            # a baseline that is asked something else is no system beside the others
            results["rows"] += rows_of([*mixed.values()], system, told) if system == OURS else []
            results["paired"] += paired_rows([*mixed.values()], system, told, whole, variant)
    results["validation"] = [
        {"system": OURS, "variant": name_of(variant), "seed": seed, **rounded(report.metrics)}
        for (variant, seed), report in sorted(extra["validation"].items())
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, results)


def read_reports(work: Path) -> tuple[dict[tuple[str, str], dict[int, Report]], dict[str, Asked]]:
    """Test reports by system, variant and seed; those of our variants that were asked something else by that."""
    found: dict[tuple[str, str], dict[int, Report]] = defaultdict(dict)
    extra: dict[str, Asked] = defaultdict(dict)
    for path in sorted((work / "reports").glob("*.npz")):
        system, variant, seed, *asked = path.stem.split("@")
        if not asked:
            found[system, variant][int(seed)] = Report.load(path)
        else:
            extra[asked[0]][variant, int(seed)] = Report.load(path)
    return found, extra


def of_variant(reports: Asked, variant: str) -> dict[int, Report]:
    """By seed."""
    return {seed: report for (name, seed), report in reports.items() if name == variant}


def differences(reports: Reports) -> list[dict[str, Any]]:
    """The declared models to every system of their class, and every variant to the declared model of its class.

    Seeds are paired with the same seeds where a variant has fewer.
    """
    rows = []
    for ours in ((OURS, DECLARED), (OURS, WITH_TIME)):
        for key, others in reports.items():
            if ours not in reports or key == ours:
                continue
            mine = reports[ours]
            if next(iter(mine.values())).uses_time != next(iter(others.values())).uses_time:
                continue
            if key[0] == OURS:
                rows += paired_rows(list(others.values()), OURS, key[1], seeds_of(mine, others), DECLARED)
            else:
                rows += paired_rows(list(mine.values()), OURS, DECLARED, list(others.values()), key[0])
    return rows


def seeds_of(reports: Mapping[int, Report], like: Mapping[int, Report]) -> list[Report]:
    """Those of the seeds that `like` has, or all where they share none."""
    return [reports[seed] for seed in like if seed in reports] or list(reports.values())


def cold_rows(reports: Reports) -> list[dict[str, Any]]:
    """Targets held out of training, by their tokens of text and image alone, in the whole catalogue and among
    themselves; and where they were trained on."""
    found: dict[str, Sequence[Report]] = {}
    for variant in COLD_ITEMS:
        for name, told in ((TARGETS, variant), (AMONG_THEMSELVES, f"{variant}, among themselves")):
            if (OURS, name + variant) in reports:
                found[told] = list(reports[OURS, name + variant].values())
    if not found or (OURS, DECLARED) not in reports:
        return []
    users = next(iter(found.values()))[0].users
    declared = list(reports[OURS, DECLARED].values())
    asked = np.isin(declared[0].users, users)
    shared = {"system": OURS, "by": "item", "group": "held out of training", "num_users": int(asked.sum())}
    rows = []
    for metric in GROUP_METRICS:
        listed = {told: each for told, each in found.items() if metric != "vhr@1" or each[0].on_candidates is not None}
        values = {told: values_by_seed(each, metric) for told, each in listed.items()}
        values["declared, which was trained on them"] = values_by_seed(declared, metric)[:, asked]
        for told, each in values.items():
            bounds = mean_interval(each)
            found_here = {"mean": bounds.mean, "low": bounds.low, "high": bounds.high}
            rows.append({**shared, "variant": told, "metric": metric, **found_here})
    return rows


def name_of(variant: str) -> str:
    """Both declared models are the declared row of their class."""
    return DECLARED if variant == WITH_TIME else variant


def shown_in_groups(reports: Reports) -> list[tuple[str, str]]:
    wanted = [(OURS, DECLARED), ("itemknn", "itemknn"), ("sasrec", "sasrec")]
    return [key for key in wanted if key in reports]


def lengths(extra: Mapping[str, Asked]) -> list[dict[str, Any]]:
    """Accuracy over how many of a history's last items are seen, a curve for each window."""
    curves = []
    for variant in CUT_SHORT:
        points = {n: [*of_variant(extra.get(f"last {n}", {}), variant).values()] for n in LENGTHS}
        points = {n: reports for n, reports in points.items() if reports}
        if points:
            title = "history cut to its last items" + (f", {variant}" if variant != DECLARED else "")
            series: dict[str, Sequence[Sequence[Report]]] = {OURS: [*points.values()]}
            curves.append(curve_of(title, [*points], series, "ndcg@10"))
    return curves


def rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in metrics.items()}
