import re
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.report import COLUMNS, CandidateOutcome, Report, report_table


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


def test_a_first_rank_counts_only_where_the_answer_was_valid():
    users = np.arange(3, dtype=np.int32)
    outcome = CandidateOutcome(np.array([0, 0, 1], np.int32), np.array([True, False, True]))
    report = Report("a", False, users, users, {}, outcome)
    assert report.values("vhr@1").tolist() == [1, 0, 0]
    assert report.values("valid_ratio").tolist() == [1, 0, 1]


def test_values_need_what_they_are_computed_from():
    with pytest.raises(ConfigError, match="needs candidate lists"):
        _report("a", False).values("vhr@1")
    with pytest.raises(ConfigError, match="no value per user"):
        _report("a", False).values("coverage@10")
    with pytest.raises(DataError, match="one rank for each"):
        Report("a", False, np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32), {})
    with pytest.raises(DataError, match="one rank for each"):
        Report("a", False, np.zeros(0, np.int32), np.zeros(0, np.int32), {})
