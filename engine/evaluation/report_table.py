"""Reports as tables for people: systems side by side, their groups of users, their differences to one of them."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from speeder_engine.evaluation.bootstrap import Interval
from speeder_engine.evaluation.groups import GroupMetrics
from speeder_engine.evaluation.report import Report

COLUMNS = ("vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr", "coverage@10")


def report_table(reports: Sequence[Report], columns: Sequence[str] = COLUMNS) -> Table:
    """Two classes, without and with knowledge of the query's time; the best of each class and column is bold."""
    shown = [name for name in columns if any(name in report.metrics for report in reports)]
    # all figures stay whole on 80 columns: the headers fold
    numbers = (Column(name, justify="right", min_width=6, overflow="fold") for name in shown)
    table = _table("system", *numbers)
    for uses_time, title in ((False, "without query time"), (True, "with query time")):
        group = [report for report in reports if report.uses_time is uses_time]
        if not group:
            continue
        table.add_section()
        table.add_row(Text(title, "italic"))
        best = {name: max(report.metrics.get(name, -np.inf) for report in group) for name in shown}
        for report in group:
            cells = [_cell(report.metrics.get(name), best[name]) for name in shown]
            table.add_row(Text(report.system), *cells)
    return table


def group_table(by: str, groups: Mapping[str, Sequence[GroupMetrics]], metrics: Sequence[str]) -> Table:
    """`groups` of each system, the same for all; a line a system and group."""
    numbers = (Column(name, justify="right", min_width=6) for name in metrics)
    table = _table("system", Column(by, no_wrap=True), Column("users", justify="right"), *numbers)
    for system, found in groups.items():
        table.add_section()
        for place, each in enumerate(found):
            figures = (_cell(each.metrics.get(name)) for name in metrics)
            table.add_row(Text(system if place == 0 else ""), each.group, f"{each.num_users:,}", *figures)
    return table


def difference_table(against: str, differences: Mapping[str, Mapping[str, Interval]]) -> Table:
    """Each system's difference to `against` with its paired interval; one that excludes zero is bold and has a star."""
    table = _table("system", "metric", "difference", "95 % interval")
    table.title = Text(f"difference to {against}, paired; * excludes zero", "table.title")
    table.title_justify = "left"
    for system, intervals in differences.items():
        table.add_section()
        for place, (metric, found) in enumerate(intervals.items()):
            interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
            shown = Text(f"{interval} *", "bold") if found.excludes_zero else Text(interval)
            table.add_row(Text(system if place == 0 else ""), metric, f"{found.mean:+.4f}", shown)
    return table


def _table(system: str, *columns: Column | str) -> Table:
    heads = (Column(system, no_wrap=True), *columns)
    return Table(*heads, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def _cell(value: float | None, best: float | None = None) -> Text:
    if value is None:
        return Text("-", "dim")
    return Text(f"{value:.4f}", "bold" if value == best else "")
