"""Catalogue top-k against numpy's lexsort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine.triton_kernels.top_scores import stable_top, top_scores


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 6), st.integers(0, 10_000))
def test_equal_scores_come_in_row_order(num_items, k, num_values, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, num_values, (3, num_items)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = -np.inf
    k = min(k, num_items)
    values, rows = stable_top(torch.from_numpy(scores), k)
    for b in range(3):
        order = np.lexsort((np.arange(num_items), -scores[b]))[:k]
        np.testing.assert_array_equal(rows[b], order)
        np.testing.assert_array_equal(values[b], scores[b, order])


def test_vectors_behind_the_mask_are_padding():
    vectors, table = torch.zeros(16, 8), torch.randn(50, 8)
    vectors[0] = 1.0
    values, rows = top_scores(vectors, table, torch.zeros(50), torch.zeros(1, 50, dtype=torch.bool), 5)
    assert values.shape == rows.shape == (1, 5)
    assert rows[0].tolist() == table.sum(dim=1).topk(5).indices.tolist()


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_masked_items_come_last_and_the_prior_counts(k):
    torch.manual_seed(0)
    vectors, table, prior = torch.randn(4, 8), torch.randn(50, 8), torch.randn(50)
    mask = torch.rand(4, 50) < 0.3
    values, rows = top_scores(vectors, table, prior, mask, k)
    exact = vectors.double() @ table.double().T + prior.double()
    assert values.shape == rows.shape == (4, min(k, 50))
    for b in range(4):
        allowed = [i for i in np.argsort(-exact[b].numpy()) if not mask[b, i]][:k]
        count = len(allowed)
        assert rows[b, :count].tolist() == allowed
        torch.testing.assert_close(values[b, :count].double(), exact[b, allowed], atol=1e-5, rtol=1e-5)
        assert torch.isinf(values[b, count:]).all()
