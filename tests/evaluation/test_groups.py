import numpy as np
import pytest

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.groups import GROUPINGS, by_length, by_popularity, check_groupings, grouped
from speeder_engine.evaluation.report import CandidateOutcome, Report

NUM_ITEMS = 40


@pytest.fixture
def case(make_queries):
    """300 users with histories of 0 to 250 items, and a report on them."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(0, 30, 250), rng.integers(30, 250, 50)])
    queries = make_queries([rng.integers(0, NUM_ITEMS, n).tolist() for n in lengths], rng.integers(0, NUM_ITEMS, 300))
    outcome = CandidateOutcome(rng.integers(0, 4, 300).astype(np.int32), rng.random(300) < 0.9)
    report = Report("a", False, queries.users, rng.integers(0, 30, 300).astype(np.int32), {}, outcome)
    return queries, report


def by_hand(report, group_of):
    """The metrics of each group, user by user."""
    users = {}
    for q, name in enumerate(group_of):
        users.setdefault(name, []).append(q)
    found = {}
    for name, members in users.items():
        ranks = [int(report.ranks[q]) for q in members]
        correct = [report.on_candidates.valid[q] and report.on_candidates.ranks[q] == 0 for q in members]
        found[name] = (
            len(members),
            {
                "vhr@1": sum(map(bool, correct)) / len(members),
                "hr@10": sum(rank < 10 for rank in ranks) / len(members),
                "ndcg@10": sum(1 / np.log2(rank + 2) for rank in ranks if rank < 10) / len(members),
                "mrr": sum(1 / (rank + 1) for rank in ranks) / len(members),
            },
        )
    return found


def length_name(length):
    for low, high in ((6, 10), (11, 20), (21, 50), (51, 200)):
        if low <= length <= high:
            return f"{low}-{high}"
    return "up to 5" if length <= 5 else "over 200"


def popularity_name(item, counts):
    """Of all events, how many belong to items with more of them than this one has."""
    if counts[item] == 0:
        return "cold"
    ahead = sum(count for count in counts if count > counts[item])
    return ("head", "mid", "tail")[3 * ahead // sum(counts)]


def check(found, expected):
    assert {each.group: each.num_users for each in found} == {name: num for name, (num, _) in expected.items()}
    for each in found:
        assert each.metrics == pytest.approx(expected[each.group][1])


def test_lengths_as_by_hand(case):
    queries, report = case
    found = grouped(report, by_length(queries))
    check(found, by_hand(report, [length_name(len(queries.history(q))) for q in range(len(queries))]))
    assert [each.group for each in found] == ["up to 5", "6-10", "11-20", "21-50", "51-200", "over 200"]


def test_popularity_as_by_hand(case):
    queries, report = case
    counts = np.random.default_rng(1).geometric(0.1, NUM_ITEMS) - 1
    counts[:5] = 0
    counts[5:9] = 3  # equally popular ones are not parted
    found = grouped(report, by_popularity(queries, counts))
    check(found, by_hand(report, [popularity_name(item, counts.tolist()) for item in queries.targets.tolist()]))
    assert [each.group for each in found] == ["cold", "head", "mid", "tail"]


def test_groups_without_users_and_metrics_without_lists_are_left_out(make_queries):
    queries = make_queries([[1], [2]], [0, 3])
    report = Report("a", False, queries.users, np.zeros(2, np.int32), {})
    assert [each.group for each in grouped(report, by_length(queries))] == ["up to 5"]
    found = grouped(report, by_popularity(queries, np.zeros(NUM_ITEMS, np.int64)))
    assert [(each.group, each.num_users) for each in found] == [("cold", 2)]
    assert found[0].metrics == {"hr@10": 1, "ndcg@10": 1, "mrr": 1}


def test_popularity_counts_training_events(make_split):
    split = make_split([[0, 0, 0, 1, 2], [0, 0, 3, 4]])
    grouping = GROUPINGS["popularity"](split, split.queries("test"))
    assert [grouping.names[group] for group in grouping.of_user] == ["cold", "cold"]
    grouping = GROUPINGS["popularity"](split, split.queries("validation"))
    assert [grouping.names[group] for group in grouping.of_user] == ["cold", "cold"]


def test_what_does_not_fit_is_refused(case):
    queries, report = case
    with pytest.raises(DataError, match="other users than those grouped by length"):
        grouped(report, by_length(queries.slice(0, 299)))
    with pytest.raises(ConfigError, match="by: 'age' is no way"):
        check_groupings(["length", "age"])
