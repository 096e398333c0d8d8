"""Scores of named candidates: the kernel, interpreted, against its reference and the head that is trained."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge

from speeder_engine.config import HeadsConfig
from speeder_engine.models.heads import RankHead
from speeder_engine.triton_kernels.candidate_scores import (
    CandidateTable,
    RankedRows,
    candidate_scores,
    candidate_scores_ref,
    launch_candidate_scores,
)

NUM_ITEMS, NUM_USERS = 12, 3


def make_case(num_rows, size, dtype=torch.float32, ranked=True, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(dtype)

    available = torch.rand(NUM_ITEMS, generator=draw) < 0.7
    table = CandidateTable(normal(NUM_ITEMS, size), normal(NUM_ITEMS), available, normal())
    below = [torch.randint(0, most, (num_rows,), generator=draw) for most in (NUM_USERS, NUM_ITEMS)]
    rows = RankedRows(normal(num_rows, size), normal(size), normal(), normal()) if ranked else None
    return normal(NUM_USERS, size), *below, table, rows


def assert_near(vectors, users, items, table, ranked):
    there = table.available[items]

    def reference(vectors, tokens, beta, *rows):
        rows = RankedRows(*rows) if rows else None
        return candidate_scores_ref(vectors, users, items, table._replace(tokens=tokens, beta=beta), rows)[there]

    found = launch_candidate_scores(vectors, users, items, table, ranked)
    assert found.dtype == torch.float32 and (found[~there] == float("-inf")).all()
    assert_as_near(found[there], reference, vectors, table.tokens, table.beta, *(ranked or ()), slack=20)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(7, 33), (1, 1), (3, 1030), (0, 8)])
def test_equals_the_reference(num_rows, size, dtype, ranked):
    assert_near(*make_case(num_rows, size, dtype, ranked))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_any_shape(num_rows, size, dtype, ranked, seed):
    assert_near(*make_case(num_rows, size, dtype, ranked, seed))


def test_it_is_the_head_that_was_trained():
    vectors, users, items, table, ranked = make_case(6, 40)
    head = RankHead(40, 1.0, HeadsConfig())
    with torch.no_grad():
        for name in ("weight", "bias", "alpha"):
            getattr(head, name).copy_(getattr(ranked, name))
        retrieved = (vectors[users] * table.tokens[items]).sum(-1)
        scores = head(ranked.hidden, retrieved) + table.beta * table.prior[items]
    found, there = candidate_scores(vectors, users, items, table, ranked), table.available[items]
    torch.testing.assert_close(found[there], scores[there])
    assert there.any() and (found[~there] == float("-inf")).all()


def test_items_beyond_two_to_the_31():
    tokens = huge(2**21 + 2, 1024)
    tokens[-1] = torch.randint(-9, 9, (1024,), dtype=torch.int8)
    everywhere = torch.ones(2**21 + 2, dtype=torch.bool)
    table = CandidateTable(tokens, torch.zeros(2**21 + 2), everywhere, torch.zeros(()))
    vectors, zero = torch.randn(1, 1024), torch.zeros(1, dtype=torch.int64)
    found = launch_candidate_scores(vectors, zero, zero + 2**21 + 1, table)
    torch.testing.assert_close(found, vectors @ tokens[-1].float(), atol=1e-2, rtol=1e-5)
