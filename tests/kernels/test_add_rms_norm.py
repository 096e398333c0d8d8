"""Residual sum and norm in one kernel, interpreted, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near

from speeder_engine.triton_kernels.add_rms_norm import (
    add_rms_norm_ref,
    launch_add_rms_norm,
    launch_rms_norm,
    rms_norm_ref,
)


def check(rows, size, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(size)
    residual, x = ((scale * torch.randn(rows, size, generator=generator)).to(dtype) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(dtype) + 0.5
    found = launch_add_rms_norm(residual, x, weight, 1e-5)
    assert_as_near(found, lambda *tensors: add_rms_norm_ref(*tensors, 1e-5), residual, x, weight, slack=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(3, 48), (1, 1), (2, 1000), (0, 8)])
def test_equals_the_reference(rows, size, dtype):
    check(rows, size, dtype)


def test_large_rows_do_not_overflow():
    # squares beyond fp16
    check(2, 40, torch.float16, scale=3000.0)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 4), st.integers(1, 130), st.sampled_from(DTYPES))
def test_any_shape(rows, size, dtype):
    check(rows, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, [2, 0, 2, 4], []])
def test_the_norm_alone_of_some_rows(rows, dtype):
    x, weight = torch.randn(5, 37).to(dtype), torch.randn(37).to(dtype)
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    found = launch_rms_norm(x, weight, 1e-5, rows)
    assert_as_near(found, lambda x, weight: rms_norm_ref(x, weight, 1e-5, rows), x, weight, slack=2)
