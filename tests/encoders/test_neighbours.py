"""Factors of who follows whom: the counts against a double loop, the factors against numpy's decomposition."""

from itertools import pairwise

import numpy as np
import pytest

from speeder_engine.encoders.neighbours import DISCOUNTS, WINDOW, fit_neighbours, following
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


def test_more_factors_than_items_are_refused(histories):
    with pytest.raises(ConfigError, match="31 factors of 30 items"):
        fit_neighbours(*histories, NUM_ITEMS, NUM_ITEMS + 1)
