"""The interpreter that the tests of kernels run in gives the same bits as Triton's own."""

import numpy as np
import pytest
import torch
from interpreter import leave_plain
from triton.runtime import interpreter

from speeder_engine.triton_kernels.language import tl, triton


@triton.jit
def _halved(x, HALF: tl.constexpr):
    return x * HALF


@triton.jit
def _kernel(ints, floats, out, sums, stride, cols, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """Integers that overflow, pointers, masks, a device function, a reduction, a product, bf16 and fp8."""
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    mask = at < cols
    whole = tl.load(ints + row * stride + at, mask, 0)
    tl.store(ints + row * stride + at, whole * whole + 7, mask)
    x = tl.load(floats + row * stride + at, mask, 0.0).to(tl.float32)
    x = _halved(x + tl.sum(_halved(x, HALF), 0), HALF)
    tl.store(out + row * stride + at, x.to(tl.bfloat16), mask)
    square = x[:, None] * x[None, :]
    product = tl.dot(square, square, input_precision="ieee")
    tl.store(sums + row * BLOCK + at, tl.max(product.to(tl.float8e4nv).to(tl.float32), 1))


def run():
    generator = torch.Generator().manual_seed(0)
    ints = torch.randint(-(2**31), 2**31 - 1, (3, 20), generator=generator, dtype=torch.int32)
    floats = torch.randn(3, 20, generator=generator).bfloat16()
    out, sums = torch.zeros_like(floats), torch.zeros(3, 16)
    _kernel[(3,)](ints, floats, out, sums, 20, 13, BLOCK=16, HALF=0.5)
    return ints, out, sums


def test_the_same_bits_with_less_work(monkeypatch):
    calls = []
    replace = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (calls.append(args), replace(*args)))
    with np.errstate(over="ignore"):
        spared, few = run(), len(calls)
        assert tl.core.is_builtin(tl.load) and tl.core.is_builtin(tl.tensor.__add__)  # nothing stays replaced
        leave_plain(monkeypatch)
        plain = run()
    assert 0 < few < (len(calls) - few) / 2
    for found, expected in zip(spared, plain, strict=True):
        assert torch.equal(found, expected) and found.count_nonzero() > 20


def test_what_is_wrong_in_a_kernel_is_still_raised():
    with pytest.raises(Exception, match="incompatible dimensions"):
        _wrong[(1,)](torch.zeros(16), BLOCK=16)
    run()


@triton.jit
def _wrong(out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, _halved((at + tl.arange(0, 8)).to(tl.float32), 2.0))
