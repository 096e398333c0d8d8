"""8-bit linear layers: the reference against fp32 weights, the kernels, interpreted, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, SLACK, huge

from speeder_engine.triton_kernels import linear_w8 as module
from speeder_engine.triton_kernels.language import tl, triton
from speeder_engine.triton_kernels.linear_w8 import (
    launch_linear_w8,
    launch_linear_w8_rows,
    linear_w8,
    linear_w8_ref,
    linear_w8_rows,
)
from speeder_engine.triton_kernels.quantize_rows import (
    W8Weight,
    launch_quantize_rows,
    quantize_rows,
    quantize_rows_ref,
    quantize_weight,
)

KINDS = ["int8", "fp8"]


def make_case(num_rows, size, outputs, kind, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, size, generator=generator).to(dtype)
    weight = quantize_weight(torch.randn(outputs, size, generator=generator) / size**0.5, kind)
    return x, weight, torch.randn(outputs, generator=generator).to(dtype)


def launched(x, weight, bias=None, gated=False, quantize=False):
    """`quantize`: x is brought to the weight's kind first."""
    if not quantize:
        return launch_linear_w8(x, weight, bias, gated)
    return launch_linear_w8_rows(launch_quantize_rows(x, weight.kind), weight, x.dtype, bias, gated)


def computed(x, weight, bias=None, gated=False, quantize=False):
    if not quantize:
        return linear_w8(x, weight, bias, gated)
    return linear_w8_rows(quantize_rows(x, weight.kind), weight, x.dtype, bias, gated)


def assert_near(found, x, weight, bias, gated, quantize):
    """To the reference in fp32, of the same 8-bit rows: two steps of the type."""
    if quantize:
        x = quantize_rows_ref(x, weight.kind).dequantized()
    best = linear_w8_ref(x.float(), weight, bias.float(), gated)
    torch.testing.assert_close(found.float(), best, atol=2 * SLACK[found.dtype], rtol=2 * SLACK[found.dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
def test_the_kernel_computes_the_same(kind, dtype, gated, quantize):
    x, weight, bias = make_case(19, 150, 70, kind, dtype)
    x[3] = 0
    found = launched(x, weight, bias, gated, quantize)
    assert found.dtype == dtype and found.shape == (19, 35 if gated else 70)
    assert_near(found, x, weight, bias, gated, quantize)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 9), st.sampled_from(KINDS), st.booleans(), st.booleans())
def test_any_shape(num_rows, size, half, kind, gated, quantize):
    x, weight, bias = make_case(num_rows, size, 2 * half, kind)
    assert_near(launched(x, weight, bias, gated, quantize), x, weight, bias, gated, quantize)


@pytest.mark.parametrize("num_rows", [30, 60, 130])
def test_many_rows(num_rows):
    x, weight, bias = make_case(num_rows, 70, 66, "int8", torch.float16)
    assert_near(launched(x, weight, bias, False, True), x, weight, bias, False, True)


@pytest.mark.parametrize("num_rows", [1, 16, 32, 48, 64, 128, 512])
@pytest.mark.parametrize("width", [896, 3584, 18944])
def test_tiles_fit_their_rows_and_fill_a_gpu_where_they_can(num_rows, width):
    options = module.linear_options(num_rows, width, 2)
    programs = -(-num_rows // options["BLOCK_ROWS"]) * -(-width // options["BLOCK_OUT"])
    assert options["BLOCK_ROWS"] == next(rows for rows in (16, 32, 64, 128) if rows >= min(num_rows, 128))
    assert programs >= 132 or options["BLOCK_OUT"] == (16 if num_rows <= 32 else 32)


def test_every_fp8_number_and_every_middle_between_two():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.cat([x, -x])[None].contiguous()  # the largest is 448: the scale is 1
    found = launch_quantize_rows(x, "fp8")
    assert found.scales.item() == 1
    assert torch.equal(found.values.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    every = W8Weight(codes.to(torch.float8_e4m3fn)[None], torch.ones(1))  # one output, read number by number
    assert torch.equal(launched(torch.eye(127), every)[:, 0], codes)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.015), ("fp8", 0.05)])
def test_the_error_of_a_layer(kind, bound):
    torch.manual_seed(0)
    x, wide = torch.randn(64, 512), torch.randn(256, 512) / 512**0.5
    exact = x @ wide.T
    for quantize in (False, True):
        found = computed(x, quantize_weight(wide, kind), quantize=quantize)
        assert (found - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("compute", [computed, launched])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loud_neighbour_changes_nothing(compute, kind):
    x, weight, bias = make_case(6, 64, 24, kind)
    before = compute(x, weight, bias, False, True)
    x[1] *= 1000
    changed = (compute(x, weight, bias, False, True) != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, False, False]


def test_without_bias_and_without_outputs():
    x, weight, _ = make_case(3, 40, 10, "int8")
    assert_near(launched(x, weight), x, weight, torch.zeros(10), False, False)
    nothing = W8Weight(weight.values[:0], weight.scales[:0])
    assert launched(x, nothing).shape == linear_w8(x, nothing).shape == (3, 0)


@triton.jit
def one_tile_kernel(x, weight, out, first, SIZE: tl.constexpr):
    rows, outputs = tl.arange(0, 16), first + tl.arange(0, 16)
    real, made = rows < 1, outputs < first + 2
    found = module._products(x, weight, rows, outputs, real, made, SIZE, 64, False, False, False, True)
    tl.store(out + rows[:, None] * 16 + tl.arange(0, 16)[None, :], found)


def test_weights_beyond_two_to_the_31():
    weight = huge(2**21 + 2, 1024)
    weight[-2:] = torch.randint(-9, 9, (2, 1024), dtype=torch.int8)
    x, out = torch.randn(1, 1024), torch.zeros(16, 16)
    one_tile_kernel[(1,)](x, weight, out, 2**21, SIZE=1024)
    torch.testing.assert_close(out[0, :2], (x @ weight[-2:].float().T)[0], atol=1e-3, rtol=1e-5)
