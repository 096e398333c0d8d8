"""The kernel that finds and keeps h(last), interpreted, against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, huge

from speeder_engine.triton_kernels.keep_last import keep_last, keep_last_ref, launch_keep_last

SCRATCH = 8
SHAPES = [(5, 4, 33), (1, 1, 1), (7, 8, 1030), (0, 3, 16), (3, 0, 4)]


def make_case(num_reads, num_users, size, dtype, seed=0):
    """Sessions with slots of their own, read where nothing is new; the last slot is for what nobody keeps."""
    draw = torch.Generator().manual_seed(seed)
    is_new = torch.rand(num_users, generator=draw) < (0.5 if num_reads else 0)
    slots = torch.randperm(SCRATCH, generator=draw)[:num_users]
    return (
        torch.randn(num_reads, size, generator=draw).to(dtype),
        torch.randint(0, max(num_reads, 1), (num_users,), generator=draw),
        is_new,
        torch.randn(SCRATCH + 1, size, generator=draw).to(dtype),
        slots,
        torch.where(is_new, slots, SCRATCH),
    )


def assert_same(case):
    """Nothing is computed, so every bit is; the slot that nobody reads is anybody's."""
    kept = case[3].clone()
    found = launch_keep_last(*case)
    assert torch.equal(found, keep_last_ref(*case[:3], kept, *case[4:]))
    assert torch.equal(case[3][:SCRATCH], kept[:SCRATCH])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_reads", "num_users", "size"), SHAPES)
def test_equals_the_reference(num_reads, num_users, size, dtype):
    assert_same(make_case(num_reads, num_users, size, dtype))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 6), st.integers(0, SCRATCH), st.integers(1, 70), st.integers(0, 99))
def test_any_shape(num_reads, num_users, size, seed):
    assert_same(make_case(num_reads, num_users, size, torch.bfloat16, seed))


def test_slots_beyond_two_to_the_31():
    kept = huge(2**21 + 2, 1024)
    hidden = torch.randint(-9, 9, (2, 1024), dtype=torch.int8)
    kept[2**21] = hidden[0] - 1
    users = torch.tensor([0, 1]), torch.tensor([False, True])
    found = launch_keep_last(hidden, *users, kept, torch.tensor([2**21, 0]), torch.tensor([0, 2**21 + 1]))
    assert torch.equal(found, torch.stack([hidden[0] - 1, hidden[1]]))
    assert torch.equal(kept[2**21 + 1], hidden[1]) and torch.equal(kept[0], hidden[0] - 1)


def test_on_a_cpu_it_is_torch():
    case = make_case(5, 4, 8, torch.float32)
    assert torch.equal(keep_last(*case), keep_last_ref(*case))
