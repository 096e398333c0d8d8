"""Fused linear layers of few rows, interpreted, against their reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bounds import DTYPES, assert_as_near, huge

from speeder_engine.triton_kernels import few_rows as module
from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.few_rows import few_rows_options, make_counters, suits
from speeder_engine.triton_kernels.fused_linear import fused_linear, fused_linear_ref, launch_fused_linear
from speeder_engine.triton_kernels.language import tl, triton
from speeder_engine.triton_kernels.quantize_rows import W8Weight, quantize_weight

AROUND = ["factor", "norm and bias", "norm, gated", "residual and bias"]
MATRICES = [(896, 1152, False), (4864, 896, False), (8960, 1536, False), (18944, 3584, False)]
MATRICES += [(896, 4864, True), (3584, 18944, True)]
STORED = [None, "int8", "fp8"]


def make_case(num_rows, size, outputs, around, stored=None, dtype=torch.float32):
    """Arguments of `fused_linear`, a matrix as what it is quantised to; the norm's weight is no one's neighbour's."""
    draw = torch.Generator().manual_seed(num_rows + size + outputs)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    weight = normal(outputs, size) / size**0.5
    case = {"x": (normal(num_rows, size) * 3).to(dtype), "counters": make_counters(torch.device("cpu"))}
    case["weight"] = weight.to(dtype) if stored is None else quantize_weight(weight, stored)
    if "bias" in around:
        case["bias"] = normal(outputs).to(dtype)
    if "norm" in around:
        case["norm"] = Norm(normal(size).to(dtype), 1e-5)
    if "residual" in around:
        case["residual"] = normal(num_rows, outputs).to(dtype)
    return case | {"gated": "gated" in around, "factor": 0.3 if "factor" in around else 1.0}


def assert_near(case):
    """Of the case's tensors, those that a lower type would change."""
    norm, weight = case.get("norm"), case["weight"]
    names = [name for name in ("x", "bias", "residual") if name in case]
    tensors = [case[name] for name in names] + ([] if norm is None else [norm.weight])
    tensors += [] if isinstance(weight, W8Weight) else [weight]

    def reference(*given):
        given = list(given)
        fresh = case if isinstance(weight, W8Weight) else case | {"weight": given.pop()}
        fresh = fresh if norm is None else fresh | {"norm": Norm(given.pop(), norm.eps)}
        return fused_linear_ref(**fresh | dict(zip(names, given, strict=True)))

    found = launch_fused_linear(**case)
    assert_as_near(found, reference, *tensors, slack=2)
    assert not case["counters"].any()
    return found


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, around, stored):
    found = assert_near(make_case(19, 550, 70, around, stored, dtype))
    assert found.shape == (19, 35 if "gated" in around else 70)


@pytest.mark.parametrize("num_rows", [1, 16, 33, 64, 65, 128])
def test_every_block_of_rows(num_rows):
    for around in AROUND[1:]:
        assert_near(make_case(num_rows, 300, 34, around, None, torch.bfloat16))


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 20), st.integers(1, 600), st.integers(1, 40), st.sampled_from(AROUND), st.sampled_from(STORED))
def test_any_shape(num_rows, size, half, around, stored):
    assert_near(make_case(num_rows, size, 2 * half, around, stored))


def test_no_outputs():
    case = make_case(3, 40, 0, "factor", "int8")
    assert launch_fused_linear(**case).shape == fused_linear(**case).shape == (3, 0)


@pytest.mark.parametrize("around", AROUND)
def test_a_loud_neighbour_changes_nothing(around):
    case = make_case(6, 600, 24, around)
    before = launch_fused_linear(**case)
    case["x"][1] *= 1000
    changed = (launch_fused_linear(**case) != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, False, False]


def test_a_matrix_that_is_cut_adds_up_to_the_same_bits():
    """Whichever part arrives last: on a GPU that is another one each time; the interpreter knows one order."""
    case = make_case(40, 2048, 64, "norm and bias")
    assert few_rows_options(40, 2048, 64, False, 4)["SPLITS"] == 9
    first = launch_fused_linear(**case)
    assert all(torch.equal(launch_fused_linear(**case), first) for _ in range(3))
    assert not case["counters"].any()


@pytest.mark.parametrize(
    ("size", "width", "gated"),
    [
        (896, 1152, False),
        (896, 4864, True),
        (4864, 896, False),
        (3584, 18944, True),
        (18944, 3584, False),
        (8960, 1536, False),
    ],
)
def test_tiles_fill_a_gpu_and_only_rows_follow_the_rows(size, width, gated):
    found = [few_rows_options(num_rows, size, width, gated, 2) for num_rows in (1, 16, 17, 32, 33, 64, 65, 128)]
    assert [options["BLOCK_ROWS"] for options in found] == [16, 16, 32, 32, 64, 64, 128, 128]
    cuts = {(options["BLOCK_OUT"], options["SPLITS"], options["PART"]) for options in found}
    assert len(cuts) == 1
    ((outputs, splits, part),) = cuts
    tiles = -(-width // outputs)
    assert part * splits >= size > part * (splits - 1) and all(part % options["BLOCK_SIZE"] == 0 for options in found)
    # three quarters of a large GPU's multiprocessors have a program, or parts are as short as they may be
    assert tiles * splits >= 96 or size // (splits + 1) < module.LEAST_PART


def test_a_row_of_another_kind_goes_elsewhere(monkeypatch):
    rows = torch.zeros(128, 8, dtype=torch.bfloat16)
    assert not suits(rows)  # on a CPU
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    assert suits(rows) and not suits(torch.cat([rows, rows])) and not suits(rows.half()) and not suits(rows.float())


def test_a_gradient_goes_through_the_reference():
    case = make_case(3, 40, 10, "norm, gated")
    case["x"].requires_grad_()
    fused_linear(**case).sum().backward()
    assert case["x"].grad is not None


@triton.jit
def one_tile_kernel(x, weight, out, first, width, SIZE: tl.constexpr, GATED: tl.constexpr):
    rows, outputs = tl.arange(0, 16), first + tl.arange(0, 16)
    real, made = rows < 1, outputs < first + 2
    paired = outputs + width
    total, up, _ = module.sums_of(
        x, None, weight, rows, outputs, paired, real, made, 0, SIZE, GATED, False, True, 64, SIZE
    )
    tl.store(out + rows[:, None] * 16 + tl.arange(0, 16)[None, :], up if GATED else total)


@pytest.mark.parametrize("gated", [False, True])
def test_weights_beyond_two_to_the_31(gated):
    weight = huge(2**21 + 2, 1024)
    weight[-2:] = torch.randint(-9, 9, (2, 1024), dtype=torch.int8)
    x, out = torch.randn(1, 1024), torch.zeros(16, 16)
    first = 2**21 // 2 if gated else 2**21
    one_tile_kernel[(1,)](x, weight, out, first, first, SIZE=1024, GATED=gated)
    torch.testing.assert_close(out[0, :2], (x @ weight[-2:].float().T)[0], atol=1e-3, rtol=1e-5)
