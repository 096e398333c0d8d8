import re
from io import StringIO

import numpy as np
from rich.console import Console

from speeder_engine.evaluation.bootstrap import Interval
from speeder_engine.evaluation.groups import GroupMetrics
from speeder_engine.evaluation.report import Report
from speeder_engine.evaluation.report_table import COLUMNS, difference_table, group_table, report_table


def _report(system, uses_time, **metrics):
    users = np.arange(2, dtype=np.int32)
    return Report(system, uses_time, users, users, {name.replace("_at_", "@"): each for name, each in metrics.items()})


def _rows(table, width=120):
    """The printed rows, cells apart by two spaces or more."""
    console = Console(width=width, record=True, file=StringIO())
    console.print(table)
    lines = [line.strip() for line in console.export_text().splitlines() if any(map(str.isalnum, line))]
    return [re.split(" {2,}", line) for line in lines]


def test_the_table_has_two_classes_and_only_columns_that_somebody_fills():
    reports = [
        _report("late", True, hr_at_10=0.5, mrr=0.25),
        _report("[plain]", False, hr_at_10=0.125),
        _report("other", False, hr_at_10=0.25),
    ]
    assert _rows(report_table(reports)) == [
        ["system", "hr@10", "mrr"],
        ["without query time"],
        ["[plain]", "0.1250", "-"],
        ["other", "0.2500", "-"],
        ["with query time"],
        ["late", "0.5000", "0.2500"],
    ]


def test_every_figure_is_whole_on_80_columns():
    metrics = dict.fromkeys(COLUMNS, 0.1234)
    users = np.arange(2, dtype=np.int32)
    table = report_table([Report("recent_popularity", True, users, users, metrics)])
    assert _rows(table, 80)[-1] == ["recent_popularity", *["0.1234"] * 7]


def test_the_best_of_a_class_is_bold():
    table = report_table([_report("a", False, mrr=0.1), _report("b", False, mrr=0.2), _report("c", True, mrr=0.15)])
    cells = list(table.columns[1].cells)
    assert {str(cell): cell.style for cell in cells if str(cell)} == {"0.1000": "", "0.2000": "bold", "0.1500": "bold"}


def test_groups_stand_under_their_system():
    groups = {
        "a": [GroupMetrics("head", 1200, {"hr@10": 0.5}), GroupMetrics("tail", 3, {"hr@10": 0.0})],
        "b": [GroupMetrics("head", 1200, {"hr@10": 0.25, "vhr@1": 0.75}), GroupMetrics("tail", 3, {"hr@10": 1.0})],
    }
    assert _rows(group_table("popularity", groups, ("vhr@1", "hr@10"))) == [
        ["system", "popularity", "users", "vhr@1", "hr@10"],
        ["a", "head", "1,200", "-", "0.5000"],
        ["tail", "3", "-", "0.0000"],
        ["b", "head", "1,200", "0.7500", "0.2500"],
        ["tail", "3", "-", "1.0000"],
    ]


def test_differences_that_exclude_zero_are_marked():
    intervals = {"hr@10": Interval(0.01, 0.004, 0.016), "ndcg@10": Interval(-0.001, -0.003, 0.001)}
    assert _rows(difference_table("base", {"other": intervals})) == [
        ["difference to base, paired; * excludes zero"],
        ["system", "metric", "difference", "95 % interval"],
        ["other", "hr@10", "+0.0100", "[+0.0040, +0.0160] *"],
        ["ndcg@10", "-0.0010", "[-0.0030, +0.0010]"],
    ]


def test_brackets_of_a_name_are_no_markup():
    table = difference_table("a[/]b[bold]c", {"x": {"mrr": Interval(0.1, 0.0, 0.2)}})
    printed = " ".join(cell for row in _rows(table) for cell in row)
    assert printed.startswith("difference to a[/]b[bold]c, paired; * excludes zero")
