"""The study's tables and figures, from results as the package makes them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from results_figures import draw_results
from results_tables import difference, estimate, tables

from speeder_engine.evaluation.groups import Grouping
from speeder_engine.evaluation.report import CandidateOutcome, Report
from speeder_engine.evaluation.results import curve_of, group_rows, paired_rows, rows_of

USERS = np.arange(200, dtype=np.int32)


def _reports(system, ceiling, uses_time=False):
    """Two seeds whose ranks lie below `ceiling`."""
    rng = np.random.default_rng(ceiling)
    outcome = CandidateOutcome(rng.integers(0, 3, 200).astype(np.int32), np.ones(200, bool))
    return [
        Report(system, uses_time, USERS, rng.integers(0, ceiling, 200).astype(np.int32), {}, outcome) for _ in range(2)
    ]


@pytest.fixture(scope="module")
def results():
    ours, text, sasrec = _reports("speeder", 20), _reports("speeder", 60), _reports("sasrec", 30)
    recent = _reports("recent_popularity", 15, uses_time=True)
    grouping = Grouping("length", ("short", "long"), USERS, (USERS % 4 == 0).astype(np.int32))
    return {
        "data": "made",
        "rows": [
            *rows_of(ours, "speeder", "declared"),
            *rows_of(text, "speeder", "text only"),
            *rows_of(sasrec, "sasrec", "tuned"),
            *rows_of(recent, "recent_popularity", "14 days"),
        ],
        "paired": [
            *paired_rows(ours, "speeder", "declared", sasrec, "sasrec"),
            *paired_rows(text, "speeder", "text only", ours, "declared"),
        ],
        "groups": group_rows(ours, "speeder", "declared", grouping) + group_rows(sasrec, "sasrec", "tuned", grouping),
        "curves": [curve_of("Window, shuffled", [10, 50], {"real": [ours, text], "shuffled": [text, text]}, "hr@10")],
    }


def _table(results, title):
    (found,) = [table for table in tables(results) if table.startswith(f"### {title}\n")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()[2:]]


def test_two_classes_of_systems(results):
    head, _, *lines = _table(results, "Systems without the query's time")
    assert head == ["system", "vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr", "seeds"]
    assert [line[0] for line in lines] == ["sasrec", "speeder (declared)"]
    row = next(row for row in results["rows"] if (row["system"], row["metric"]) == ("speeder", "hr@10"))
    assert lines[1][4] == f"**{row['mean']:.3f}** [{row['low']:.3f}, {row['high']:.3f}]".replace("0.", ".")
    assert "**" not in lines[0][4] and lines[0][-1] == "2"
    assert [line[0] for line in _table(results, "Systems with the query's time")[2:]] == ["recent_popularity"]


def test_ablations_stand_beside_the_declared_model(results):
    _, _, declared, text = _table(results, "Ablations without the query's time")
    assert (declared[0], text[0]) == ("declared", "text only")
    assert declared[2] == "-" and text[2].startswith("-.") and text[2].endswith("*")
    (line,) = _table(results, "The declared model's difference to each, without the query's time")[2:]
    assert line[0] == "sasrec" and line[1].startswith("+.") and line[1].endswith("*")


def test_groups_and_curves(results):
    head, _, ours, _ = _table(results, "hr@10 by length")
    assert head == ["system", "short (150)", "long (50)"] and ours[0] == "speeder (declared)"
    head, _, real, shuffled = _table(results, "Window, shuffled (hr@10)")
    assert head == ["", "10", "50"] and real[0] == "real"
    assert real[2] == shuffled[1] == shuffled[2] != real[1]


def test_figures_are_told_as_they_are():
    assert estimate({"mean": 1.0, "low": 1.0, "high": 1.0}) == "1.000"
    assert estimate(None) == difference(None) == "-"
    assert estimate({"mean": 0.0505, "low": 0.04, "high": 0.06}) == ".051 [.040, .060]"
    assert difference({"mean": -0.01, "low": -0.02, "high": 0.0}) == "-.010 [-.020, +.000]"
    assert difference({"mean": 0.01, "low": 0.001, "high": 0.02}) == "+.010 [+.001, +.020] *"


def test_nothing_there_is_nothing_told():
    assert list(tables({"data": "none"})) == []


def test_the_script_writes_figures_that_depend_on_the_results_alone(results, root, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "made.json"
    path.write_text(json.dumps(results))
    done = subprocess.run([sys.executable, root / "bench" / "results_tables.py", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["made-systems", "made-ablations", "made-window-shuffled"]
    assert [line for line in done.stdout.splitlines() if line.startswith("![")] == [f"![{n}]({n}.svg)" for n in names]
    assert "### Systems with the query's time" in done.stdout
    assert draw_results(results, tmp_path / "again") == names
    for name in names:
        drawn = (tmp_path / f"{name}.svg").read_bytes()
        assert drawn.startswith(b"<?xml") and drawn == (tmp_path / "again" / f"{name}.svg").read_bytes()
