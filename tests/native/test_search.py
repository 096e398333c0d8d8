"""The native search against the reference in torch: masks, lists, ties; bitwise the same in any company."""

import os
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine import _cpu
from speeder_engine.native.search import native_top_scores
from speeder_engine.triton_kernels.top_scores import Answerable, top_scores_ref

KERNELS = [name for name in ("avx512", "avx2", "plain") if _cpu.has_kernels(name)]
quick = settings(deadline=None, max_examples=40, database=None)
by_kernels = pytest.mark.parametrize("isa", KERNELS)


def make(num_users, num_items, size, dtype, seed, *, whole=False):
    """whole: small integers, so that scores are exact and many are equal."""
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: rng.integers(-2, 3, shape)) if whole else (lambda *shape: rng.normal(size=shape))
    vectors, table = (torch.from_numpy(draw(n, size)).to(dtype) for n in (num_users, num_items))
    prior = torch.from_numpy(draw(num_items)).float()

    def lists(most):
        drawn = [rng.integers(0, num_items, rng.integers(0, most + 1)) for _ in range(num_users)]
        return [np.unique(each).astype(np.int32) for each in drawn]

    allowed = [each if rng.random() < 0.3 else None for each in lists(num_items)]
    available = torch.from_numpy(rng.random(num_items) < 0.9)
    return vectors, table, prior, Answerable.build(available, lists(min(9, num_items)), allowed)


@by_kernels
@quick
@given(st.integers(1, 9), st.integers(1, 700), st.integers(1, 70), st.integers(1, 60), st.integers(0, 10**6))
def test_equal_scores_stand_by_row(isa, num_users, num_items, size, k, seed):
    given = make(num_users, num_items, size, torch.float32, seed, whole=True)
    scores, rows = native_top_scores(*given, k, isa)
    expected, expected_rows = top_scores_ref(*given, k)
    assert torch.equal(scores, expected)
    there = expected > float("-inf")
    assert torch.equal(rows[there], expected_rows[there])


@by_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 33, 96, 200])
def test_scores_are_those_of_fp64(isa, dtype, size):
    vectors, table, prior, answerable = make(6, 500, size, dtype, size)
    scores, rows = native_top_scores(vectors, table, prior, answerable, 500, isa)
    exact = answerable.hide(vectors.double() @ table.double().T + prior.double())
    there = scores > float("-inf")
    assert torch.equal(there.sum(1), (exact > float("-inf")).sum(1))
    assert (scores - exact.gather(1, rows))[there].abs().max() <= 1e-5 * size**0.5
    for b in range(6):  # nothing twice
        assert len(set(rows[b][there[b]].tolist())) == int(there[b].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_does_not_depend_on_who_else_asks(dtype):
    vectors, table, prior, answerable = make(9, 2000, 96, dtype, 3)
    open_to_all = Answerable.build(answerable.available, [np.empty(0, np.int32)] * 9, [None] * 9)
    scores, rows = native_top_scores(vectors, table, prior, open_to_all, 20, KERNELS[0])
    for count in range(1, 9):
        few = Answerable.build(answerable.available, [np.empty(0, np.int32)] * count, [None] * count)
        part = native_top_scores(vectors[:count], table, prior, few, 20, KERNELS[0])
        assert torch.equal(part[0], scores[:count]) and torch.equal(part[1], rows[:count])


@by_kernels
@quick
@given(st.integers(1, 700), st.lists(st.integers(1, 900), min_size=1, max_size=9), st.integers(0, 10**6))
def test_each_user_gets_as_many_as_it_asks_for(isa, num_items, depths, seed):
    given = make(len(depths), num_items, 33, torch.float32, seed, whole=True)
    scores, rows = native_top_scores(*given, depths, isa)
    assert scores.shape == rows.shape == (len(depths), min(max(depths), num_items))
    expected, expected_rows = native_top_scores(*given, max(depths), isa)
    for b, depth in enumerate(depths):
        assert torch.equal(scores[b, :depth], expected[b, :depth])
        assert torch.equal(rows[b, :depth], expected_rows[b, :depth])


def test_who_asks_for_few_is_not_searched_as_deep_as_another():
    vectors, table, prior, _ = make(8, 60_000, 8, torch.float32, 0)
    open_to_all = Answerable.build(torch.ones(60_000, dtype=torch.bool), [np.empty(0, np.int32)] * 8, [None] * 8)

    def seconds(depths):
        found = []
        for _ in range(5):
            start = time.perf_counter()
            native_top_scores(vectors, table, prior, open_to_all, depths, KERNELS[0])
            found.append(time.perf_counter() - start)
        return min(found)

    assert seconds([30_000] + [10] * 7) < seconds([30_000] * 8) / 2


def test_many_answers_are_merged_by_all_threads():
    vectors, table, prior, answerable = make(5, 20_000, 40, torch.float32, 1, whole=True)
    given, depths = (vectors, table, prior, answerable), [20_000, 3, 9_000, 20_000, 1]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            scores, rows = native_top_scores(*given, depths, KERNELS[0])
            found.append([(scores[b, :k], rows[b, :k]) for b, k in enumerate(depths)])
    finally:
        torch.set_num_threads(before)
    expected, _ = top_scores_ref(*given, 20_000)
    for b, (ours, alone) in enumerate(zip(found[1], found[0], strict=True)):
        assert torch.equal(ours[0], alone[0]) and torch.equal(ours[1], alone[1])
        assert torch.equal(ours[0], expected[b, : depths[b]])


def test_threads_do_not_change_an_answer():
    given = make(3, 50_000, 40, torch.float32, 1, whole=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(native_top_scores(*given, 300, KERNELS[0]))
    finally:
        torch.set_num_threads(before)
    for scores, rows in found[1:]:
        assert torch.equal(scores, found[0][0]) and torch.equal(rows, found[0][1])


def test_nobody_asks_and_nothing_to_find():
    vectors, table, prior, _ = make(2, 10, 8, torch.float32, 0)
    nothing = Answerable.build(torch.zeros(10, dtype=torch.bool), [np.empty(0, np.int32)] * 2, [None] * 2)
    scores, rows = native_top_scores(vectors, table, prior, nothing, 3, KERNELS[0])
    assert torch.equal(scores, torch.full((2, 3), float("-inf"))) and torch.equal(rows, torch.zeros(2, 3).long())
    nobody = Answerable.build(torch.ones(10, dtype=torch.bool), [], [])
    assert native_top_scores(vectors[:0], table, prior, nobody, 3, KERNELS[0])[0].shape == (0, 3)


def test_a_list_beyond_the_table_is_refused():
    vectors, table, prior, _ = make(1, 10, 8, torch.float32, 0)
    wrong = Answerable.build(torch.ones(10, dtype=torch.bool), [np.array([10], np.int32)], [None])
    with pytest.raises(ValueError, match="no item's"):
        native_top_scores(vectors, table, prior, wrong, 3, KERNELS[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_computes_too():
    """The threads of a pool are not copied by fork: the child makes its own."""
    given = make(3, 30_000, 40, torch.float32, 1)
    expected = native_top_scores(*given, 10, KERNELS[0])
    child = os.fork()
    if child == 0:
        found = native_top_scores(*given, 10, KERNELS[0])
        os._exit(0 if torch.equal(found[0], expected[0]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
