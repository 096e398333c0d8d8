"""Rows in 8 bits: the kernel, interpreted, against the reference, and what rounding costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, SLACK

from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.quantize_rows import (
    launch_quantize_normed_rows,
    launch_quantize_rows,
    quantize_normed_rows_ref,
    quantize_rows_ref,
    quantize_weight,
)

KINDS = ["int8", "fp8"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_become_the_same_eight_bits(kind, dtype):
    x = (torch.randn(5, 2100) * torch.tensor([1, 1e3, 1e-3, 0, 1e-2])[:, None]).to(dtype)
    found, expected = launch_quantize_rows(x, kind), quantize_rows_ref(x, kind)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_within_half_a_step(kind):
    wide = torch.randn(30, 200) * torch.logspace(-3, 3, 30)[:, None]
    wide[7] = 0
    weight = quantize_weight(wide, kind)
    error, largest = (weight.dequantized() - wide).abs(), wide.abs().amax(1, keepdim=True)
    # int8: half of 1/127 of the row's largest; e4m3: half of the last of 3 bits, or of the smallest step 2 ** -9
    bound = largest / 254 if kind == "int8" else torch.maximum(wide.abs() / 16, largest / 448 * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (weight.values.float()[7] == 0).all() and torch.isfinite(weight.scales).all()


def assert_normed(num_rows, size, kind, dtype, adds):
    """A step of 8 bits from the reference's, whose norm is rounded to the type first; the sum is the same."""
    draw = torch.Generator().manual_seed(num_rows + size)
    x, residual = ((torch.randn(num_rows, size, generator=draw) * 3).to(dtype) for _ in range(2))
    norm = Norm(torch.randn(size, generator=draw).to(dtype), 1e-5)
    given = (x, kind, norm, residual if adds else None)
    (total, found), (expected, best) = launch_quantize_normed_rows(*given), quantize_normed_rows_ref(*given)
    assert total is x if not adds else torch.allclose(total.float(), expected.float(), rtol=SLACK[dtype], atol=1e-6)
    wide, largest = best.dequantized(), best.dequantized().abs().amax(1, keepdim=True)
    step = largest / 127 if kind == "int8" else torch.maximum(wide.abs() / 8, largest / 448 * 2**-9)
    assert ((found.dequantized() - wide).abs() <= step + 2 * SLACK[dtype] * largest).all()
    assert (found.dequantized() - wide).abs().mean() <= 2 * (SLACK[dtype] + 2e-3) * largest.mean()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(3, 37), (2, 2100), (1, 1)])
def test_a_sum_under_a_norm(num_rows, size, dtype, kind, adds):
    assert_normed(num_rows, size, kind, dtype, adds)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 5), st.integers(1, 90), st.sampled_from(KINDS), st.booleans())
def test_any_shape(num_rows, size, kind, adds):
    assert_normed(num_rows, size, kind, torch.float32, adds)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_columns(kind):
    norm = Norm(torch.ones(8), 1e-5)
    assert launch_quantize_normed_rows(torch.ones(0, 8), kind, norm)[1].values.shape == (0, 8)
    found, expected = launch_quantize_rows(torch.ones(3, 0), kind), quantize_rows_ref(torch.ones(3, 0), kind)
    assert torch.equal(found.scales, expected.scales)
