"""Two-stage top-k against the exact one: recall, exact scores, and that `certain` never lies."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, SLACK

from speeder_engine.triton_kernels.quantize_rows import W8Weight
from speeder_engine.triton_kernels.top_scores import Answerable, top_scores_ref
from speeder_engine.triton_kernels.top_scores_two_stage import (
    CoarseTable,
    exact_top_ref,
    launch_exact_top,
    top_scores_two_stage,
)

K = 20


def made_table(kind, num_items, size, generator):
    """Of Gaussian tokens, or of a few directions with an eighth of noise, as item tokens are."""
    noise = torch.randn(num_items, size, generator=generator)
    if kind == "random":
        return noise
    centres = torch.randn(40, size // 4, generator=generator) @ torch.randn(size // 4, size, generator=generator)
    return centres[torch.randint(40, (num_items,), generator=generator)] / (size / 4) ** 0.5 + noise / 8


def make_case(kind, num_items=4000, size=64, num_users=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    table = made_table(kind, num_items, size, generator).to(dtype)
    rows = torch.randint(num_items, (num_users,), generator=generator)
    vectors = (table[rows].float() + torch.randn(num_users, size, generator=generator) / 2).to(dtype)
    rng = np.random.default_rng(seed)
    excluded = [np.unique(rng.integers(0, num_items, 9)).astype(np.int32) for _ in range(num_users)]
    available = torch.from_numpy(rng.random(num_items) > 0.1)
    given_ = Answerable.build(available, excluded, [None] * num_users)
    return vectors, table, torch.randn(num_items, generator=generator) / 8, given_


def recall(found, expected):
    return np.mean([len(set(a.tolist()) & set(b.tolist())) / len(b) for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize(("kind", "certain"), [("random", True), ("clustered", False)])
def test_recall(kind, certain, record_property):
    case = make_case(kind)
    exact = case[0].double() @ case[1].double().T + case[2].double()
    expected = top_scores_ref(*case, K)
    scores, rows, known = top_scores_two_stage(*case, K, CoarseTable.build(case[1]))
    found = recall(rows, expected[1])
    record_property("recall", float(found))  # workers of a parallel run send it
    print(f"{kind}: recall {found:.4f}, {known.float().mean():.0%} certain")
    assert found == 1 and bool(known.all()) >= certain
    torch.testing.assert_close(scores.double(), exact.gather(1, rows), atol=1e-5, rtol=1e-5)


def coarser(table, step):
    """Of a table [I, d]: whole multiples of `step` instead of whole numbers."""
    made = CoarseTable.build(table)
    values = (made.tokens.values.float() / step).round().clamp(-(127 // step), 127 // step) * step
    tokens = W8Weight(values.to(torch.int8), made.tokens.scales)
    worst, norms = (table.float() - tokens.dequantized()).norm(dim=1).amax(), tokens.dequantized().norm(dim=1).amax()
    return CoarseTable(tokens, worst, torch.maximum(norms, made.largest_norm))


def test_more_candidates_find_more():
    case = make_case("random")
    expected, coarse = top_scores_ref(*case, K), coarser(case[1], 48)
    found = [recall(top_scores_two_stage(*case, K, coarse, kept)[1], expected[1]) for kept in (K, 8 * K, 4000)]
    assert found == sorted(found) and found[0] < 0.9 and found[2] == 1.0


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["random", "clustered"]), st.sampled_from([1, 16, 60]), st.integers(1, 60), st.integers(0, 999))
def test_certain_is_certain(kind, step, candidates, seed):
    case = make_case(kind, 200, 16, 8, seed)
    expected = top_scores_ref(*case, 5)
    scores, rows, known = top_scores_two_stage(*case, 5, coarser(case[1], step), candidates)
    assert torch.equal(rows[known], expected[1][known])
    torch.testing.assert_close(scores[known], expected[0][known], atol=1e-5, rtol=1e-5)


def test_few_may_be_answered():
    vectors, table, prior, given_ = make_case("random", 300, 16, 3)
    allowed = np.array([7, 9, 200], np.int32)
    given_ = Answerable.build(given_.available | True, [np.array([9], np.int32)] * 3, [allowed] * 3)
    scores, rows, known = top_scores_two_stage(vectors, table, prior, given_, 5, CoarseTable.build(table), 10)
    assert known.all() and torch.isneginf(scores[:, 2:]).all()
    assert all(set(found) == {7, 200} for found in rows[:, :2].tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_finds_the_same(dtype):
    vectors, table, prior, _ = make_case("random", 150, 70, 3, dtype=dtype)
    rows = torch.stack([torch.randperm(150)[:37] for _ in range(3)])
    found = torch.randn(3, 37)
    found[:, 30:] = float("-inf")
    found[2] = float("-inf")
    expected = exact_top_ref(vectors, table, prior, found, rows, 33)
    scores, best = launch_exact_top(vectors, table, prior, found, rows, 33)
    assert torch.equal(best, expected[1])
    torch.testing.assert_close(scores, expected[0], atol=1e-4, rtol=SLACK[torch.float32])


def test_ties_go_to_lower_rows():
    vectors, table, prior = torch.ones(1, 4), torch.ones(30, 4), torch.zeros(30)
    rows = torch.randperm(30)[None, :24].contiguous()
    for find in (exact_top_ref, launch_exact_top):
        assert torch.equal(find(vectors, table, prior, torch.ones(1, 24), rows, 6)[1], rows.sort().values[:, :6])
