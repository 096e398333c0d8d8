"""The rank head's kernel, interpreted, against its reference and the head that is trained."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge

from speeder_engine.config import HeadsConfig
from speeder_engine.models.heads import RankHead
from speeder_engine.triton_kernels.rank_scores import (
    RankedItems,
    RankWeights,
    launch_rank_scores,
    rank_scores,
    rank_scores_ref,
)

NUM_ITEMS, NUM_USERS = 12, 3


def make_case(num_rows, size, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    table = RankedItems(normal(NUM_ITEMS, size), normal(NUM_ITEMS), torch.rand(NUM_ITEMS, generator=draw) < 0.7)
    head = RankWeights(normal(size), normal(), normal(), normal())
    below = [torch.randint(0, most, (num_rows,), generator=draw) for most in (NUM_USERS, NUM_ITEMS)]
    return normal(num_rows, size), normal(NUM_USERS, size), *below, table, head


def assert_near(hidden, vectors, sequence, items, table, head):
    there = table.available[items]

    def reference(hidden, vectors, tokens, *weights):
        given = hidden, vectors, sequence, items, table._replace(tokens=tokens), RankWeights(*weights)
        return rank_scores_ref(*given)[there]

    found = launch_rank_scores(hidden, vectors, sequence, items, table, head)
    assert found.dtype == torch.float32 and (found[~there] == float("-inf")).all()
    assert_as_near(found[there], reference, hidden, vectors, table.tokens, *head, slack=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(7, 33), (1, 1), (3, 1030), (0, 8)])
def test_equals_the_reference(num_rows, size, dtype):
    assert_near(*make_case(num_rows, size, dtype))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
def test_any_shape(num_rows, size, dtype, seed):
    assert_near(*make_case(num_rows, size, dtype, seed))


def test_it_is_the_head_that_was_trained():
    hidden, vectors, sequence, items, table, weights = make_case(6, 40)
    head = RankHead(40, 1.0, HeadsConfig())
    with torch.no_grad():
        for name, value in weights._asdict().items():
            getattr(head, name).copy_(value)
        scores = head(hidden, (vectors[sequence] * table.tokens[items]).sum(-1)) + head.beta * table.prior[items]
    found = rank_scores(hidden, vectors, sequence, items, table, weights)
    there = table.available[items]
    torch.testing.assert_close(found[there], scores[there])
    assert there.any() and (found[~there] == float("-inf")).all()


def test_items_beyond_two_to_the_31():
    tokens = huge(2**21 + 2, 1024)
    tokens[-1] = torch.randint(-9, 9, (1024,), dtype=torch.int8)
    table = RankedItems(tokens, torch.zeros(2**21 + 2), torch.ones(2**21 + 2, dtype=torch.bool))
    head = RankWeights(torch.zeros(1024), torch.zeros(()), torch.ones(()), torch.zeros(()))
    hidden, vectors, zero = torch.zeros(1, 1024), torch.randn(1, 1024), torch.zeros(1, dtype=torch.int64)
    found = launch_rank_scores(hidden, vectors, zero, zero + 2**21 + 1, table, head)
    torch.testing.assert_close(found, vectors @ tokens[-1].float(), atol=1e-2, rtol=1e-5)
