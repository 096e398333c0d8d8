"""Rows of a study's results, as `docs/results/<data>.json` holds them: means over seeds, intervals over users.

A row is one system, variant and metric. Several reports of one system differ in the seed alone (bootstrap.py says how
they are taken together). Draws nothing, prints nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from speeder_engine.errors import DataError
from speeder_engine.evaluation.bootstrap import Interval, mean_interval, paired_difference, values_by_seed
from speeder_engine.evaluation.groups import GROUP_METRICS, Grouping
from speeder_engine.evaluation.report import Report

Row = dict[str, Any]
METRICS = ("vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr")
PAIRED_METRICS = ("hr@10", "ndcg@10", "vhr@1")


def rows_of(reports_by_seed: Sequence[Report], system: str, variant: str) -> list[Row]:
    """A row a metric: system, variant, uses_time, metric, mean, low, high, seeds (how many).

    Metrics of candidate lists only where all reports have them. DataError for no reports, for reports on other users
    and where some knew the query's time and others not.
    """
    uses_time = _uses_time(reports_by_seed, system)
    named = {"system": system, "variant": variant, "uses_time": uses_time}
    return [
        {**named, "metric": metric, **_bounds(mean_interval(values_by_seed(reports_by_seed, metric)))}
        | {"seeds": len(reports_by_seed)}
        for metric in _metrics(reports_by_seed, METRICS)
    ]


def paired_rows(
    reports_by_seed: Sequence[Report],
    system: str,
    variant: str,
    against: Sequence[Report],
    against_name: str,
    metrics: Sequence[str] = PAIRED_METRICS,
) -> list[Row]:
    """A row a metric of the difference to `against`, reports of another system or of a variant of the same one.

    system, variant, uses_time (of the first), against, metric, mean, low, high.
    """
    uses_time = _uses_time(reports_by_seed, system)
    named = {"system": system, "variant": variant, "uses_time": uses_time, "against": against_name}
    return [
        {**named, "metric": metric, **_bounds(paired_difference(reports_by_seed, against, metric))}
        for metric in _metrics([*reports_by_seed, *against], metrics)
    ]


def group_rows(reports_by_seed: Sequence[Report], system: str, variant: str, grouping: Grouping) -> list[Row]:
    """A row a group with users and metric: system, variant, by, group, num_users, metric, mean, low, high."""
    _uses_time(reports_by_seed, system)
    values = {name: values_by_seed(reports_by_seed, name) for name in _metrics(reports_by_seed, GROUP_METRICS)}
    rows = []
    for group, mask in grouping.members(reports_by_seed[0]):
        named = {"system": system, "variant": variant, "by": grouping.by, "group": group, "num_users": int(mask.sum())}
        rows += [{**named, "metric": name, **_bounds(mean_interval(each[:, mask]))} for name, each in values.items()]
    return rows


def curve_of(name: str, x: Sequence[float], series: Mapping[str, Sequence[Sequence[Report]]], metric: str) -> Row:
    """A curve: name, metric, x and, for each label of `series`, mean, low and high at each x, of reports by seed."""
    bounds = {
        label: [mean_interval(values_by_seed(reports, metric)) for reports in points]
        for label, points in series.items()
    }
    uneven = [label for label, points in bounds.items() if len(points) != len(x)]
    if uneven:
        raise DataError(f"curve {name}: {uneven[0]} has {len(bounds[uneven[0]])} points, x has {len(x)}")
    listed = {
        label: {key: [getattr(each, key) for each in points] for key in ("mean", "low", "high")}
        for label, points in bounds.items()
    }
    return {"name": name, "metric": metric, "x": list(x), "series": listed}


def _bounds(found: Interval) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _metrics(reports: Sequence[Report], metrics: Sequence[str]) -> list[str]:
    on_lists = all(report.on_candidates is not None for report in reports)
    return [name for name in metrics if on_lists or name not in ("vhr@1", "valid_ratio")]


def _uses_time(reports: Sequence[Report], system: str) -> bool:
    classes = {report.uses_time for report in reports}
    if len(classes) != 1:
        told = "are both with and without the query's time" if classes else "are none"
        raise DataError(f"{system}: its reports {told}; give those of one system, a seed each")
    return classes.pop()
