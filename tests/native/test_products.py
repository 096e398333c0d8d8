"""Packed products of every instruction set against torch in fp64 and exact integers; a row depends on itself alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine import _cpu

KERNELS = [name for name in ("avx512", "avx2", "plain") if _cpu.has_kernels(name)]
TYPES = ("float32", "bfloat16", "int8")
quick = settings(deadline=None, max_examples=25, database=None)
by_kernels = pytest.mark.parametrize("isa", KERNELS)


class Case:
    """A layer and rows for it; int8 is checked against integers that numpy multiplies."""

    def __init__(self, outputs, inputs, num_rows, kind, isa, *, gated=False, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(outputs, inputs, generator=generator)
        self.bias = torch.randn(outputs, generator=generator) if bias else None
        self.rows = torch.randn(num_rows, inputs, generator=generator) * 3
        self.kind, self.gated = kind, gated
        address = 0 if self.bias is None else self.bias.data_ptr()
        given = (self.weight.data_ptr(), "float32", outputs, inputs)
        self.linear = _cpu.Linear(given, address, kind, gated, isa, 2)

    def run(self, rows=None):
        rows = self.rows if rows is None else rows
        out = torch.full((rows.shape[0], self.weight.shape[0] // (2 if self.gated else 1)), torch.nan)
        self.linear.run(rows.contiguous().data_ptr(), rows.shape[0], out.data_ptr())
        return out

    def expected(self):
        """In fp64, from weights and rows as they are stored."""
        if self.kind == "int8":
            row_scale, weight_scale = (quantized(each)[1] for each in (self.rows, self.weight))
            product = (quantized(self.rows)[0] @ quantized(self.weight)[0].T) * row_scale * weight_scale.T
        else:
            stored = [each.to(getattr(torch, self.kind)).double() for each in (self.rows, self.weight)]
            product = stored[0] @ stored[1].T
        if self.bias is not None:
            product = product + self.bias.double()
        if not self.gated:
            return product
        gate, up = product.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up


def quantized(matrix):
    """Whole numbers in fp64, and the scale of each row."""
    scale = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return (matrix / scale).round().double(), scale.double()


def on_borders(matrix):
    """1 where a value lies so near the border between two whole numbers that fp32 may round it either way."""
    exact = matrix.double() * 127 / matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-30).double()
    return ((exact - exact.floor() - 0.5).abs() < 1e-4).double()


def turned_by_borders(rows, weight):
    """[R, O]: what a product in int8 may differ by where such values are rounded the other way; mostly zero."""
    (whole_rows, row_scale), (whole_weight, weight_scale) = quantized(rows), quantized(weight)
    by_rows = on_borders(rows) @ (whole_weight.abs() + 1).T
    return (by_rows + (whole_rows.abs() + 1) @ on_borders(weight).T) * row_scale * weight_scale.T


def rounding(rows, weight, bias, kind):
    """[R, O]: what fp32 loses but for unlikely chance (Higham and Mary 2019): a few sqrt(n) u |x| |w| of n terms.

    Sums of whole numbers are exact; they are scaled, and a bias is added.
    """
    if kind == "int8":
        (whole_rows, row_scale), (whole_weight, weight_scale) = quantized(rows), quantized(weight)
        terms, roundings = ((whole_rows @ whole_weight.T) * row_scale * weight_scale.T).abs(), 8
    else:
        terms, roundings = rows.double().abs() @ weight.double().abs().T, 3 * rows.shape[1] ** 0.5 + 2
    return roundings * 2.0**-24 * (terms if bias is None else terms + bias.double().abs())


@by_kernels
@pytest.mark.parametrize("kind", TYPES)
@quick
@given(st.integers(1, 70), st.integers(1, 100), st.integers(1, 35), st.booleans(), st.integers(0, 10**6))
def test_products_of_all_shapes(isa, kind, outputs, inputs, num_rows, bias, seed):
    case = Case(outputs, inputs, num_rows, kind, isa, bias=bias, seed=seed)
    allowed = rounding(case.rows, case.weight, case.bias, kind)
    if kind == "int8":
        allowed += turned_by_borders(case.rows, case.weight)
    assert ((case.run().double() - case.expected()).abs() <= allowed).all()


@by_kernels
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [1, 16, 37, 64])
def test_gated_products(isa, kind, size):
    case = Case(2 * size, 45, 19, kind, isa, gated=True)
    expected = case.expected()
    assert (case.run().double() - expected).abs().max().item() <= 2e-4 * max(1.0, expected.abs().max().item())


@by_kernels
@pytest.mark.parametrize("kind", TYPES)
def test_long_sums_go_on_from_block_to_block(isa, kind):
    """More inputs than one block of a panel holds, in every type."""
    case = Case(40, 9000, 5, kind, isa)
    expected = case.expected()
    assert (case.run().double() - expected).abs().max().item() <= 1e-4 * expected.abs().max().item()


@by_kernels
@pytest.mark.parametrize("kind", TYPES)
def test_a_row_is_bitwise_the_same_in_any_company(isa, kind):
    case = Case(70, 300, 61, kind, isa)
    whole = case.run()
    rng = np.random.default_rng(0)
    for count in range(1, 62):
        chosen = torch.from_numpy(rng.choice(61, count, replace=False))
        assert torch.equal(case.run(case.rows[chosen]), whole[chosen])


def test_int8_rows_do_not_leak_into_one_another():
    case = Case(64, 128, 8, "int8", KERNELS[0])
    alone = case.run()
    loud = case.rows.clone()
    loud[3] *= 1000
    kept = [i for i in range(8) if i != 3]
    assert torch.equal(case.run(loud)[kept], alone[kept])


@pytest.mark.skipif(len(KERNELS) < 2, reason="one set of kernels only")
@pytest.mark.parametrize("gated", [False, True])
def test_int8_sums_are_exact_whatever_computes_them(gated):
    found = [Case(64, 600, 9, "int8", isa, gated=gated).run() for isa in KERNELS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=2e-6)


def test_weights_of_bf16_are_read_as_they_are():
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    rows = torch.randn(3, 64).bfloat16().float()
    out = torch.empty(3, 32)
    linear = _cpu.Linear((weight.data_ptr(), "bfloat16", 32, 64), 0, "bfloat16", False, KERNELS[0], 1)
    linear.run(rows.data_ptr(), 3, out.data_ptr())
    error = (out.double() - rows.double() @ weight.double().T).abs()
    assert (error <= rounding(rows, weight, None, "bfloat16")).all()


def test_zero_rows_and_zero_weights():
    case = Case(32, 32, 2, "int8", KERNELS[0], bias=False)
    assert torch.equal(case.run(torch.zeros(2, 32)), torch.zeros(2, 32))
    weight = torch.zeros(8, 16)
    out = torch.full((1, 8), torch.nan)
    linear = _cpu.Linear((weight.data_ptr(), "float32", 8, 16), 0, "int8", False, KERNELS[0], 1)
    linear.run(torch.randn(1, 16).data_ptr(), 1, out.data_ptr())
    assert torch.equal(out, torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float16", KERNELS[0]), "none of float32, bfloat16, int8"),
        (("float32", "amx"), "this machine has no 'amx'"),
    ],
)
def test_unknown_types_and_kernels_are_refused(arguments, message):
    weight = torch.zeros(8, 16)
    kind, isa = arguments
    with pytest.raises(ValueError, match=message):
        _cpu.Linear((weight.data_ptr(), "float32", 8, 16), 0, kind, False, isa, 1)
