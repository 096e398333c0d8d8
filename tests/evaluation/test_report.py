import numpy as np
import pytest

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.report import CandidateOutcome, Report


def _report(system, uses_time, **metrics):
    users = np.arange(2, dtype=np.int32)
    return Report(system, uses_time, users, users, {name.replace("_at_", "@"): each for name, each in metrics.items()})


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


def _saved(tmp_path, on_lists):
    users, ranks = np.array([3, 5, 9], np.int32), np.array([0, 2**31 - 1, 7], np.int32)
    outcome = CandidateOutcome(np.array([1, 0, 4], np.int32), np.array([True, False, True])) if on_lists else None
    report = Report("sasrec+itemknn", True, users, ranks, {"hr@10": 2 / 3, "mrr": 0.1}, outcome, {"seed": 1})
    report.save(tmp_path / "deeper" / "one.npz", {"variant": "declared", "lengths": [1, 2]})
    return report, tmp_path / "deeper" / "one.npz"


@pytest.mark.parametrize("on_lists", [True, False])
def test_a_file_gives_back_what_was_saved(tmp_path, on_lists):
    report, path = _saved(tmp_path, on_lists)
    found = Report.load(path)
    assert found.to_json() == report.to_json()
    assert found.notes == {"seed": 1, "variant": "declared", "lengths": [1, 2]}
    for metric in ("hr@10", "mrr", *(("vhr@1", "valid_ratio") if on_lists else ())):
        np.testing.assert_array_equal(found.values(metric), report.values(metric))
    np.testing.assert_array_equal(found.users, report.users)
    assert found.ranks.dtype == found.users.dtype == np.int32
    assert (found.on_candidates is None) is not on_lists
    assert [each.name for each in path.parent.iterdir()] == ["one.npz"]


def test_a_file_that_is_no_report_is_refused(tmp_path):
    _, path = _saved(tmp_path, True)
    whole = path.read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("other", b"not a report at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not a readable report"):
            Report.load(tmp_path / name)
    with pytest.raises(DataError, match="nowhere: not a readable report"):
        Report.load(tmp_path / "nowhere")
    np.savez(tmp_path / "foreign.npz", report=np.array('{"format": "speeder report 9"}'))
    with pytest.raises(DataError, match="format is 'speeder report 9'"):
        Report.load(tmp_path / "foreign.npz")
    np.savez(tmp_path / "pickled.npz", report=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="not a readable report"):
        Report.load(tmp_path / "pickled.npz")
