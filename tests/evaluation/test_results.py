import json

import numpy as np
import pytest

from speeder_engine.errors import DataError
from speeder_engine.evaluation.bootstrap import mean_interval, paired_difference
from speeder_engine.evaluation.groups import by_length
from speeder_engine.evaluation.report import CandidateOutcome, Report
from speeder_engine.evaluation.results import curve_of, group_rows, paired_rows, rows_of

USERS = 120


def _report(seed, name="speeder", uses_time=False, on_lists=True):
    rng = np.random.default_rng(seed)
    outcome = CandidateOutcome(rng.integers(0, 3, USERS).astype(np.int32), rng.random(USERS) < 0.8)
    ranks = rng.integers(0, 25, USERS).astype(np.int32)
    return Report(name, uses_time, np.arange(USERS, dtype=np.int32), ranks, {}, outcome if on_lists else None)


@pytest.fixture
def seeds():
    return [_report(seed) for seed in range(3)]


def test_a_row_is_the_mean_over_seeds_with_an_interval_over_users(seeds):
    rows = rows_of(seeds, "speeder", "declared")
    assert [row["metric"] for row in rows] == ["vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr"]
    for row in rows:
        found = mean_interval(np.stack([report.values(row["metric"]) for report in seeds]))
        assert found.mean == pytest.approx(np.mean([report.values(row["metric"]).mean() for report in seeds]))
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((found.mean, found.low, found.high))
        named = {"system": "speeder", "variant": "declared", "uses_time": False, "metric": row["metric"], "seeds": 3}
        assert row.keys() == named.keys() | {"mean", "low", "high"} and row.items() >= named.items()
    assert json.loads(json.dumps(rows)) == rows


def test_without_lists_there_are_no_rows_of_theirs(seeds):
    rows = rows_of([*seeds, _report(3, on_lists=False)], "speeder", "declared")
    assert [row["metric"] for row in rows] == ["hr@1", "hr@10", "ndcg@10", "mrr"]


def test_paired_rows_take_seeds_of_both(seeds):
    base = [_report(seed, "sasrec") for seed in (7, 8)]
    rows = paired_rows(seeds, "speeder", "declared", base, "sasrec")
    assert [row["metric"] for row in rows] == ["hr@10", "ndcg@10", "vhr@1"]
    for row in rows:
        found = paired_difference(seeds, base, row["metric"])
        assert (row["mean"], row["low"], row["high"]) == (found.mean, found.low, found.high)
        assert (
            row.items() >= {"system": "speeder", "variant": "declared", "uses_time": False, "against": "sasrec"}.items()
        )


def test_group_rows_cover_every_user_once(seeds, make_queries):
    grouping = by_length(make_queries([[0] * (user % 9) for user in range(USERS)], [0] * USERS))
    rows = [row for row in group_rows(seeds, "speeder", "declared", grouping) if row["metric"] == "hr@10"]
    assert [row["group"] for row in rows] == ["up to 5", "6-10"]
    assert sum(row["num_users"] for row in rows) == USERS
    whole = next(row["mean"] for row in rows_of(seeds, "speeder", "declared") if row["metric"] == "hr@10")
    assert sum(row["mean"] * row["num_users"] for row in rows) / USERS == pytest.approx(whole)
    assert all(row["low"] <= row["mean"] <= row["high"] and row["by"] == "length" for row in rows)


def test_a_curve_has_a_point_for_each_x(seeds):
    curve = curve_of("window", [10, 50], {"real": [seeds, seeds[:1]]}, "mrr")
    assert curve["x"] == [10, 50] and curve["name"] == "window"
    assert curve["series"]["real"]["mean"][1] == pytest.approx(seeds[0].values("mrr").mean())
    assert curve["series"]["real"]["low"][0] < curve["series"]["real"]["high"][0]
    with pytest.raises(DataError, match="curve window: real has 1 points, x has 2"):
        curve_of("window", [10, 50], {"real": [seeds]}, "mrr")


def test_reports_of_two_systems_make_no_row(seeds):
    with pytest.raises(DataError, match="both with and without"):
        rows_of([*seeds, _report(3, uses_time=True)], "speeder", "declared")
    with pytest.raises(DataError, match="its reports are none"):
        rows_of([], "speeder", "declared")
