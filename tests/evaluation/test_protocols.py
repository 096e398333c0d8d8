import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from speeder_engine.data.candidates import CandidateLists
from speeder_engine.data.splits import Queries
from speeder_engine.errors import ConfigError, DataError, SpeederWarning
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.scorer import CatalogueScorer
from speeder_engine.runs import offsets_of, ranges


@dataclass
class Fixed(CatalogueScorer):
    """User u's scores are table[u]."""

    table: np.ndarray
    name = "fixed"
    uses_time = False

    def scores(self, queries):
        return self.table[queries.users]


@dataclass
class TwoHeads:
    """Another opinion on candidates: those of `listed`, -inf elsewhere."""

    table: np.ndarray
    listed: np.ndarray
    name = "two heads"
    uses_time = True

    def scores(self, queries):
        return self.table[queries.users]

    def candidate_scores(self, queries, candidates):
        return np.take_along_axis(self.listed[queries.users], candidates, axis=1)


def _lists(queries, num_items, num_candidates, rng):
    rows = np.empty((len(queries), num_candidates), np.int32)
    slots = rng.integers(0, num_candidates, len(queries)).astype(np.int32)
    for query, target in enumerate(queries.targets):
        others = np.delete(np.arange(num_items, dtype=np.int32), target)
        rows[query] = np.insert(rng.choice(others, num_candidates - 1, replace=False), slots[query], target)
    return CandidateLists(rows, slots, queries.users, 0)


def _permuted(queries, order):
    events = ranges(queries.offsets[order], queries.offsets[order + 1])
    offsets = offsets_of(queries.lengths[order])
    return Queries(queries.users[order], offsets, queries.rows[events], None, queries.targets[order], None)


@pytest.fixture
def case(make_queries):
    rng = np.random.default_rng(0)
    histories = [rng.choice(30, rng.integers(0, 12)).tolist() for _ in range(57)]
    queries = make_queries(histories, rng.integers(0, 30, 57))
    table = rng.integers(0, 15, (57, 30)).astype(np.float32)
    return queries, table, _lists(queries, 30, 8, rng)


def test_every_figure_equals_plain_python(case):
    queries, table, lists = case
    report = evaluate(Fixed(table), queries, lists, ks=(1, 5), batch_size=10)
    ranks, shown, correct = [], set(), []
    for query, target in enumerate(queries.targets.tolist()):
        banned = set(queries.history(query).tolist()) - {target}
        order = sorted((row for row in range(30) if row not in banned), key=lambda row: (-table[query, row], row))
        ranks.append(order.index(target))
        shown |= set(order[:10])
        best = min(lists.rows[query].tolist(), key=lambda row: (-table[query, row], row))
        correct.append(best == target)
    assert report.ranks.tolist() == ranks
    assert report.values("vhr@1").tolist() == correct
    assert report.metrics == pytest.approx(
        {
            "hr@1": np.mean([rank < 1 for rank in ranks]),
            "hr@5": np.mean([rank < 5 for rank in ranks]),
            "ndcg@5": np.mean([1 / np.log2(rank + 2) if rank < 5 else 0 for rank in ranks]),
            "mrr": np.mean([1 / (rank + 1) for rank in ranks]),
            "coverage@10": len(shown) / 30,
            "vhr@1": np.mean(correct),
            "valid_ratio": 1,
            "hr@1_valid": np.mean(correct),
        }
    )
    for name in ("hr@1", "ndcg@5", "mrr", "vhr@1", "valid_ratio"):
        assert report.values(name).mean() == pytest.approx(report.metrics[name])


def test_batches_and_the_order_of_queries_change_nothing(case):
    queries, table, lists = case
    whole = evaluate(Fixed(table), queries, lists)
    order = np.random.default_rng(1).permutation(len(queries))
    shuffled = evaluate(Fixed(table), _permuted(queries, order), lists.take(order), batch_size=7)
    assert shuffled.metrics == pytest.approx(whole.metrics, abs=1e-12)
    np.testing.assert_array_equal(shuffled.ranks, whole.ranks[order])
    np.testing.assert_array_equal(shuffled.users, whole.users[order])


def test_a_head_for_candidates_is_asked_and_its_silence_counts(case):
    queries, table, lists = case
    listed = np.full(table.shape, -np.inf, np.float32)
    listed[np.arange(0, 57, 3), queries.targets[::3]] = 1  # right
    wrong = lists.rows[1::3][np.arange(19), (lists.target_slot[1::3] + 1) % 8]
    listed[np.arange(1, 57, 3), wrong] = 1
    report = evaluate(TwoHeads(table, listed), queries, lists)
    expected = {"vhr@1": 1 / 3, "valid_ratio": 2 / 3, "hr@1_valid": 1 / 2}
    assert {name: report.metrics[name] for name in expected} == pytest.approx(expected)
    assert report.uses_time
    np.testing.assert_array_equal(report.ranks, evaluate(Fixed(table), queries, None).ranks)


def test_the_same_score_for_all_items_is_told_and_ranks_by_row(case):
    queries, table, lists = case
    table[4:7] = 2.5
    with pytest.warns(SpeederWarning, match="same score in 3 of 57 queries"):
        report = evaluate(Fixed(table), queries, lists, batch_size=5)
    before = set(range(queries.targets[5])) - set(queries.history(5).tolist())
    assert report.ranks[5] == len(before)


def test_a_target_without_a_score_is_a_miss_everywhere(make_queries):
    queries = make_queries([[0], [0]], [1, 2])
    nothing, something = [0, -np.inf, -np.inf, -np.inf], [0, 1, 2, -np.inf]
    report = evaluate(Fixed(np.array([nothing, something], np.float32)), queries, None, ks=(20,))
    assert report.metrics == {"hr@20": 0.5, "ndcg@20": 0.5, "mrr": 0.5, "coverage@10": 2 / 4}


def test_what_does_not_fit_is_refused(case):
    queries, table, lists = case
    scorer = Fixed(table)
    with pytest.raises(DataError, match="belong to other queries"):
        evaluate(scorer, queries, lists.take(np.arange(57)[::-1]))
    with pytest.raises(DataError, match="belong to other queries"):
        evaluate(scorer, replace(queries, targets=(queries.targets + 1) % 30), lists)
    with pytest.raises(DataError, match="no queries"):
        evaluate(scorer, queries.slice(0, 0), None)
    with pytest.raises(DataError, match="several queries"):
        evaluate(scorer, replace(queries, users=queries.users // 2), None)
    with pytest.raises(DataError, match="the queries know more"):
        evaluate(Fixed(table[:, :3]), queries, None)
    with pytest.raises(DataError, match="NaN"):
        evaluate(Fixed(np.where(table == 3, np.nan, table)), queries, None)
    with pytest.raises(DataError, match="shape"):
        evaluate(Fixed(table[..., None]), queries, None)
    for wrong in ({"ks": ()}, {"ks": (0, 1)}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            evaluate(scorer, queries, None, **wrong)


def test_a_report_is_json(case):
    queries, table, lists = case
    report = evaluate(Fixed(table), queries, lists)
    assert json.loads(json.dumps(report.to_json())) == {
        "system": "fixed",
        "uses_time": False,
        "num_users": 57,
        "metrics": report.metrics,
    }
