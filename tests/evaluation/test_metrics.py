import numpy as np
import pytest

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import (
    UNRANKED,
    candidate_metrics,
    candidate_ranks,
    check_scores,
    full_metrics,
    hit,
    mask_history,
    ndcg,
    per_user,
    reciprocal_rank,
    target_ranks,
    top_k,
)


def _scores(*rows):
    return np.array(rows, np.float32)


def _rows(*rows):
    return np.array(rows, np.int32)


def test_values_worked_out_by_hand():
    ranks = _rows(0, 2, 10, UNRANKED)
    assert hit(ranks, 10).tolist() == [1, 1, 0, 0]
    # 1 / log2(2), 1 / log2(4)
    assert ndcg(ranks, 10).tolist() == [1, 0.5, 0, 0]
    assert reciprocal_rank(ranks).tolist() == [1, 1 / 3, 1 / 11, 0]
    assert full_metrics(ranks, (1, 3)) == {"hr@1": 0.25, "hr@3": 0.5, "ndcg@3": 0.375, "mrr": (1 + 1 / 3 + 1 / 11) / 4}


def test_of_equal_scores_the_lower_row_stands_first():
    scores = _scores([3, 5, 5, 5, 1])
    assert [target_ranks(scores, _rows(row)).item() for row in range(5)] == [3, 0, 1, 2, 4]
    assert top_k(scores, 3).tolist() == [[1, 2, 3]]
    # in a list it is the rows that decide, not the slots
    candidates = _rows([7, 3, 9])
    equal = _scores([1, 1, 1])
    assert [candidate_ranks(equal, candidates, _rows(slot)).item() for slot in range(3)] == [1, 0, 2]


def test_a_scorer_that_tells_nothing_apart_is_at_chance():
    rng = np.random.default_rng(0)
    num_queries, num_items = 20_000, 50
    targets = rng.integers(0, num_items, num_queries).astype(np.int32)
    ranks = target_ranks(np.zeros((num_queries, num_items), np.float32), targets)
    assert hit(ranks, 1).mean() == pytest.approx(1 / num_items, abs=0.005)
    candidates = rng.permuted(np.tile(np.arange(num_items, dtype=np.int32), (num_queries, 1)), axis=1)[:, :20]
    slots = rng.integers(0, 20, num_queries).astype(np.int32)
    found = candidate_ranks(np.zeros((num_queries, 20), np.float32), candidates, slots)
    assert hit(found, 1).mean() == pytest.approx(1 / 20, abs=0.007)


def test_ranks_equal_a_full_stable_sort():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, (200, 40)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    targets = rng.integers(0, 40, 200).astype(np.int32)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = np.where(
        np.isneginf(scores[np.arange(200), targets]), UNRANKED, (order == targets[:, None]).argmax(axis=1)
    )
    np.testing.assert_array_equal(target_ranks(scores, targets), expected)
    finite = np.isfinite(np.take_along_axis(scores, order, axis=1))
    np.testing.assert_array_equal(top_k(scores, 35), np.where(finite, order, -1)[:, :35])


def test_top_k_of_fewer_items_than_k():
    assert top_k(_scores([1, 2], [-np.inf, 0], [-np.inf, -np.inf]), 10).tolist() == [[1, 0], [1, -1], [-1, -1]]


def test_the_history_is_masked_but_a_repeated_target_is_not():
    scores = _scores([9, 8, 7, 6], [9, 8, 7, 6])
    scores.setflags(write=False)
    masked = mask_history(scores, np.array([0, 3, 5]), _rows(0, 1, 0, 1, 2), _rows(3, 1))
    assert masked.tolist() == [[-np.inf, -np.inf, 7, 6], [9, 8, -np.inf, 6]]
    assert target_ranks(masked, _rows(3, 1)).tolist() == [1, 1]


def test_vhr_is_valid_ratio_times_the_hits_of_the_valid():
    ranks, valid = _rows(0, 0, 3, UNRANKED), np.array([True, True, True, False])
    assert candidate_metrics(ranks, valid) == {"vhr@1": 0.5, "valid_ratio": 0.75, "hr@1_valid": 2 / 3}
    # the best of its list, but the answer was none
    assert candidate_metrics(_rows(0, 0), np.array([True, False])) == {
        "vhr@1": 0.5,
        "valid_ratio": 0.5,
        "hr@1_valid": 1,
    }
    assert candidate_metrics(_rows(UNRANKED), np.array([False])) == {"vhr@1": 0, "valid_ratio": 0, "hr@1_valid": 0}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad):
    scores = np.zeros((3, 4), np.float32)
    check_scores(scores, (3, 4), "here")
    scores[2, 1] = bad
    with pytest.raises(DataError, match=r"here: 1 scores are NaN or \+inf, first in query 2"):
        check_scores(scores, (3, 4), "here")
    with pytest.raises(DataError, match="shape"):
        check_scores(scores, (3, 5), "here")


@pytest.mark.parametrize("name", ["hr", "hr@0", "hr@x", "coverage@10", "hr@1_valid", ""])
def test_metrics_without_a_value_per_user_are_refused(name):
    with pytest.raises(ConfigError, match="no value per user"):
        per_user(name, _rows(0))


def test_torchmetrics_computes_the_same():
    torch = pytest.importorskip("torch")
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    rng = np.random.default_rng(2)
    num_queries, num_items = 120, 60
    # its reciprocal rank takes a score of 0 or less as not retrieved: probabilities only
    scores = rng.uniform(0.01, 1, (num_queries, num_items)).astype(np.float32)
    targets = rng.integers(0, num_items, num_queries).astype(np.int32)
    relevant = np.zeros(scores.shape, dtype=bool)
    relevant[np.arange(num_queries), targets] = True
    batch = (
        torch.from_numpy(scores).flatten(),
        torch.from_numpy(relevant).flatten(),
        torch.arange(num_queries).repeat_interleave(num_items),
    )
    ours = full_metrics(target_ranks(scores, targets), (1, 5, 10))
    theirs = {"mrr": retrieval.RetrievalMRR()(*batch)}
    theirs |= {f"hr@{k}": retrieval.RetrievalHitRate(top_k=k)(*batch) for k in (1, 5, 10)}
    theirs |= {f"ndcg@{k}": retrieval.RetrievalNormalizedDCG(top_k=k)(*batch) for k in (5, 10)}
    assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, abs=1e-6)
    assert target_ranks(scores - 2, targets).tolist() == target_ranks(scores, targets).tolist()
