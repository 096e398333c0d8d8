"""Factors of who follows whom: the counts against a double loop, the factors against numpy's decomposition."""

from itertools import pairwise

import numpy as np
import pytest

from speeder_engine.encoders.features import Features
from speeder_engine.encoders.neighbours import DISCOUNTS, WINDOW, fit_neighbours, fold_in, following
from speeder_engine.errors import ConfigError

NUM_ITEMS = 30


@pytest.fixture(scope="module")
def histories():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 25, 60)
    rows = rng.integers(0, NUM_ITEMS - 1, lengths.sum()).astype(np.int32)  # the last item has no event
    return np.concatenate([[0], np.cumsum(lengths)]), rows


def matrix(histories):
    offsets, rows = histories
    counts, found = np.bincount(rows, minlength=NUM_ITEMS), np.zeros((NUM_ITEMS, NUM_ITEMS))
    for start, end in pairwise(offsets):
        for i in range(start, end):
            for j in range(i + 1, min(i + WINDOW + 1, end)):
                found[rows[i], rows[j]] += 1
    taken = np.maximum(counts, 1)
    return found * taken[:, None] ** -DISCOUNTS[0] * taken[None] ** -DISCOUNTS[1]


def test_counts_and_discounts(histories):
    offsets, rows = histories
    found = following(offsets, rows, NUM_ITEMS, np.bincount(rows, minlength=NUM_ITEMS)).to_dense().numpy()
    np.testing.assert_allclose(found, matrix(histories), rtol=1e-5)


def test_factors_give_the_best_matrix_of_their_rank(histories):
    offsets, rows = histories
    rank = 8
    features = fit_neighbours(offsets, rows, NUM_ITEMS, rank)
    left, right = np.split(features.values.astype(np.float64), 2, axis=1)
    u, s, v = np.linalg.svd(matrix(histories))
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    made = left @ right.T
    made *= (made * best).sum() / (made * made).sum()  # the vectors are scaled
    np.testing.assert_allclose(made, best, atol=1e-3 * np.abs(best).max())
    assert not features.present[-1] and features.present[:-1].all()
    assert abs(features.values[:-1].std() - 1) < 1e-3
    assert np.array_equal(features.values, fit_neighbours(offsets, rows, NUM_ITEMS, rank).values)


def test_new_items_are_folded_in_by_least_squares(histories):
    """Known vectors that were tuned, two new items and one without events, against numpy's least squares."""
    offsets, rows = histories
    fitted = fit_neighbours(offsets, rows, NUM_ITEMS, 4)
    new = np.isin(np.arange(NUM_ITEMS), [3, 17])
    drift = np.random.default_rng(1).normal(size=fitted.values.shape) * 0.1
    known = fitted.present & ~new
    tuned = Features.of_present((fitted.values + drift)[known].astype(np.float32), known)
    folded = fold_in(offsets, rows, tuned, new)
    np.testing.assert_array_equal(folded.present, new)
    left, right = np.split(tuned.values[known].astype(np.float64), 2, axis=1)
    counted, model = matrix(histories), left @ right.T
    (scale,), *_ = np.linalg.lstsq(model.reshape(-1, 1), counted[np.ix_(known, known)].ravel())
    lefts = np.linalg.lstsq(scale * right, counted[np.ix_(new, known)].T)[0].T
    rights = np.linalg.lstsq(scale * left, counted[np.ix_(known, new)])[0].T
    np.testing.assert_allclose(folded.values[new], np.concatenate([lefts, rights], axis=1), rtol=1e-4, atol=1e-5)


def test_an_item_with_an_old_one_s_neighbours_gets_nearly_its_vector():
    """Later histories have item 29 wherever item 7 would stand: walks round a circle of the other items."""
    rng = np.random.default_rng(0)
    walks = (rng.integers(29, size=(800, 1)) + np.cumsum(rng.integers(1, 3, (800, 12)), axis=1)) % 29
    fitted = fit_neighbours(np.arange(401) * 12, walks[:400].ravel(), NUM_ITEMS, 10)
    assert not fitted.present[29]
    walks[400:][walks[400:] == 7] = 29
    vector = fold_in(np.arange(801) * 12, walks.ravel(), fitted, np.arange(NUM_ITEMS) == 29).values[29]
    lengths = np.linalg.norm(fitted.values, axis=1)
    likeness = fitted.values @ vector / np.maximum(lengths, 1e-12) / np.linalg.norm(vector)
    assert likeness.argmax() == 7 and likeness[7] > 0.97
    assert np.sort(likeness)[-2] < 0.95
    # with half of the share that 7 had, the discount of its own count leaves a vector of .7 of the length
    assert 0.6 < np.linalg.norm(vector) / lengths[7] < 0.85


def test_nothing_to_fold_in_with_is_nothing_and_not_infinite(histories):
    new = np.arange(NUM_ITEMS) == 3
    nobody = Features(np.zeros((NUM_ITEMS, 8), np.float32), np.zeros(NUM_ITEMS, bool))
    assert not fold_in(*histories, nobody, new).values.any()


def test_more_factors_than_items_are_refused(histories):
    with pytest.raises(ConfigError, match="31 factors of 30 items"):
        fit_neighbours(*histories, NUM_ITEMS, NUM_ITEMS + 1)
