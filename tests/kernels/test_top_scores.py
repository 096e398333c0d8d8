"""Catalogue top-k: the reference against numpy's lexsort, the kernels, interpreted, against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, huge

from speeder_engine.triton_kernels import top_scores as module
from speeder_engine.triton_kernels.language import tl, triton
from speeder_engine.triton_kernels.top_scores import (
    MAX_K,
    Answerable,
    RowLists,
    launch_top_scores,
    stable_top,
    top_scores,
    top_scores_ref,
)


def answerable(num_users, num_items, seed=0, limited=0.5, hidden=0.2):
    """Lists of every length, empty ones too."""
    rng = np.random.default_rng(seed)

    def lists(most):
        return [
            np.unique(rng.integers(0, num_items, rng.integers(0, most + 1))).astype(np.int32) for _ in range(num_users)
        ]

    available = torch.from_numpy(rng.random(num_items) >= hidden)
    allowed = [each if rng.random() < limited else None for each in lists(num_items)]
    return Answerable.build(available, lists(min(20, num_items)), allowed)


def as_mask(given, num_users):
    """bool [B, I], true for what is not answered, entry by entry."""
    mask = ~given.available.expand(num_users, -1).clone()
    for b in range(num_users):
        start, stop = given.excluded.starts[b : b + 2].tolist()
        mask[b, given.excluded.rows[start:stop].long()] = True
        if given.limited is not None and given.limited[b]:
            start, stop = given.allowed.starts[b : b + 2].tolist()
            named = set(given.allowed.rows[start:stop].tolist())
            mask[b] |= torch.tensor([i not in named for i in range(mask.shape[1])], dtype=torch.bool)
    return mask


def make_case(num_users, num_items, size, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    vectors, table = (torch.randn(n, size, generator=generator).to(dtype) for n in (num_users, num_items))
    prior = torch.randn(num_items, generator=generator)
    return vectors, table, prior, answerable(num_users, num_items, seed, **options)


def assert_equal(found, expected):
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-5)


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


@pytest.mark.parametrize("k", [1, 7, 50, 80])
def test_masked_items_come_last_and_the_prior_counts(k):
    vectors, table, prior, given = make_case(4, 50, 8)
    values, rows = top_scores(vectors, table, prior, given, k)
    exact, mask = vectors.double() @ table.double().T + prior.double(), as_mask(given, 4)
    assert values.shape == rows.shape == (4, min(k, 50))
    for b in range(4):
        best = [i for i in np.argsort(-exact[b].numpy()) if not mask[b, i]][:k]
        count = len(best)
        assert rows[b, :count].tolist() == best
        torch.testing.assert_close(values[b, :count].double(), exact[b, best], atol=1e-5, rtol=1e-5)
        assert torch.isinf(values[b, count:]).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
def test_hidden_is_what_a_mask_would_hide(num_users, num_items, seed, limited):
    given_, scores = answerable(num_users, num_items, seed, limited), torch.randn(num_users, num_items)
    masked = scores.masked_fill(as_mask(given_, num_users), float("-inf"))
    assert torch.equal(given_.hide(scores.clone()), masked)


def test_a_users_scores_do_not_depend_on_the_others():
    vectors, table, prior, given = make_case(21, 300, 24, limited=0.0)
    nobody = RowLists.build([np.empty(0, np.int32)], torch.device("cpu"))
    together = top_scores(vectors, table, prior, Answerable.build(given.available, [nobody.rows.numpy()] * 21, []), 9)
    for b in (0, 20):
        alone = top_scores(vectors[b : b + 1], table, prior, Answerable(given.available, nobody), 9)
        assert all(torch.equal(ours, theirs[b : b + 1]) for ours, theirs in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_users", "num_items", "size", "k"),
    [(3, 300, 40, 10), (17, 130, 64, 20), (1, 1, 8, 5), (2, 9, 70, 30)],
)
def test_the_kernel_finds_the_same(num_users, num_items, size, k, dtype):
    vectors, table, prior, given = make_case(num_users, num_items, size, dtype)
    # the reference rounds a product to the type of its vectors before it adds the prior, the kernel doesn't
    expected = top_scores_ref(vectors.float(), table.float(), prior, given, k)
    assert_equal(launch_top_scores(vectors, table, prior, given, k), expected)


def test_the_kernel_finds_as_many_as_fit():
    vectors, table, prior, given = make_case(2, 600, 16)
    expected = top_scores_ref(vectors, table, prior, given, MAX_K)
    assert_equal(launch_top_scores(vectors, table, prior, given, MAX_K), expected)
    with pytest.raises(AssertionError, match="fit into registers"):
        launch_top_scores(vectors, table, prior, given, MAX_K + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_tables_have_a_scale_a_row(dtype):
    vectors, _, prior, given = make_case(3, 200, 48, dtype)
    table, scales = torch.randint(-127, 128, (200, 48), dtype=torch.int8), torch.rand(200) * 0.01
    expected = top_scores_ref(vectors, table, prior, given, 12, scales)
    assert_equal(launch_top_scores(vectors, table, prior, given, 12, scales), expected)
    wide = top_scores_ref(vectors.float(), table * scales[:, None], prior, given, 12)
    assert torch.equal(expected[1], wide[1])


@pytest.mark.parametrize("programs", [1, 1024])
def test_ties_go_to_lower_rows_however_the_catalogue_is_divided(programs, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.integers(-1, 2, (2, 8)).astype(np.float32))
    table = torch.from_numpy(rng.integers(-1, 2, (700, 8)).astype(np.float32))
    table[::3] = -0.0  # equal to 0.0
    given = answerable(2, 700)
    found = launch_top_scores(vectors, table, torch.zeros(700), given, 40)
    expected = top_scores_ref(vectors, table, torch.zeros(700), given, 40)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_where_nothing_may_be_answered_rows_come_in_order():
    vectors, table, prior, _ = make_case(2, 40, 8)
    nothing = Answerable.build(torch.zeros(40, dtype=torch.bool), [np.empty(0, np.int32)] * 2, [None, None])
    scores, rows = launch_top_scores(vectors, table, prior, nothing, 6)
    assert torch.isneginf(scores).all() and torch.equal(rows, torch.arange(6).expand(2, 6))


def test_nobody_asks_and_nothing_is_there():
    for num_users, num_items in ((0, 5), (2, 0)):
        given = Answerable.build(torch.ones(num_items, dtype=torch.bool), [np.empty(0, np.int32)] * num_users, [])
        case = (torch.ones(num_users, 4), torch.ones(num_items, 4), torch.zeros(num_items), given, 3)
        for find in (launch_top_scores, top_scores_ref):
            scores, rows = find(*case)
            assert scores.shape == rows.shape == (num_users, min(3, num_items))


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 4), st.integers(1, 150), st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_any_shape(num_users, num_items, size, k, seed):
    case = make_case(num_users, num_items, size, seed=seed)
    assert_equal(launch_top_scores(*case, k), top_scores_ref(*case, k))


class Constants:
    """In place of a kernel: notes the constants of each launch, of which each is a compilation."""

    def __init__(self):
        self.met = set()

    def __getitem__(self, grid):
        return lambda *args, **constants: self.met.add(tuple(constants.items()))


def merges_of(num_users, num_items, k):
    """Those of a search, by its lists alone."""
    block = module.partial_options(k, 2, 2, alone=num_users == 1)["BLOCK_ITEMS"]
    num_lists = triton.cdiv(num_items, block * module.tiles_of_program(num_items, num_users, block))
    lists = torch.empty(1, num_lists, k, dtype=torch.int64)
    module.merge_lists(lists, torch.empty(1, k), torch.empty(1, k, dtype=torch.int64))


@pytest.mark.parametrize("capacity", [300, 3000, 20_000, 100_000, 9_000_000])
@pytest.mark.parametrize("k", [16, 32, 64, 128, 256])
def test_a_growing_catalogue_needs_no_merge_that_the_warm_up_has_not_met(capacity, k, monkeypatch):
    kernel, met = Constants(), Constants()
    monkeypatch.setattr(module, "_merge_lists_kernel", kernel)
    for num_items in {*np.geomspace(1, capacity, 300).astype(int).tolist()}:
        for num_users in (1, 2, 16, 17, 64, 300, 3000):
            merges_of(num_users, num_items, k)
    monkeypatch.setattr(module, "_merge_lists_kernel", met)
    module.precompile_merges(k, capacity, torch.device("cpu"))
    assert met.met == kernel.met


@triton.jit
def one_tile_kernel(vectors, table, scores, first, SIZE: tl.constexpr):
    users, items = tl.arange(0, 16), tl.arange(0, 128)
    found = module._products(vectors, table, users, users < 1, first, items < 2, SIZE, 64, True)
    tl.store(scores + users[:, None] * 128 + items[None, :], found)


def test_tables_beyond_two_to_the_31():
    size = 1024
    table = huge(2**21 + 2, size)
    table[-2:] = torch.randint(-9, 9, (2, size), dtype=torch.int8)
    vectors, scores = torch.randn(1, size), torch.zeros(16, 128)
    one_tile_kernel[(1,)](vectors, table, scores, 2**21, SIZE=size)
    torch.testing.assert_close(scores[0, :2], (vectors @ table[-2:].float().T)[0], atol=1e-3, rtol=1e-5)
