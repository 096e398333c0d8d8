"""The residual stream's sum and the norm that reads it.

sum_n    = residual_n + x_n
normed_n = weight * sum_n / sqrt(mean(sum_n ^ 2) + eps)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speeder_engine.triton_kernels.language import (
    await_others,
    next_power_of_2,
    on,
    overlap_options,
    runs_triton,
    tl,
    triton,
)
from speeder_engine.triton_kernels.specimen import Specimen


class Norm(NamedTuple):
    """What an RMSNorm is beside its rows."""

    weight: Tensor  # [d]
    eps: float


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual and x [N, d], weight [d] -> the sum and its norm, both [N, d]."""
    if runs_triton(residual, x, weight):
        with on(x.device):
            return launch_add_rms_norm(residual, x, weight, eps)
    return add_rms_norm_ref(residual, x, weight, eps)


def add_rms_norm_ref(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, rms_norm_ref(total, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """The norm alone: x [N, d] -> [N, d], or [R, d] of `rows` int64 [R]."""
    if runs_triton(x, weight):
        with on(x.device):
            return launch_rms_norm(x, weight, eps, rows)
    return rms_norm_ref(x, weight, eps, rows)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    """Over the last dimension, in fp32; rounded to x's dtype before the weight, as transformers does it."""
    x = x if rows is None else x[rows]
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@triton.jit
def normed_row(x, weight, eps, column, size):
    """A row [BLOCK] in fp32, zero from `size` on, under the norm."""
    scale = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * scale


@triton.jit
def _add_rms_norm_kernel(
    residual, x, rows, weight, total, normed, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    await_others(OVERLAP)
    column = tl.arange(0, BLOCK)
    valid = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    read_at = at
    if rows is not None:
        read_at = tl.load(rows + tl.program_id(0)).to(tl.int64) * size + column
    row = tl.load(residual + read_at, mask=valid, other=0.0).to(tl.float32)
    if x is not None:
        row += tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(total + at, row.to(total.dtype.element_ty), mask=valid)
    row = normed_row(row, weight, eps, column, size)
    tl.store(normed + at, row.to(normed.dtype.element_ty), mask=valid)


def launch_add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, size = residual.shape
    assert x.shape == residual.shape and weight.shape == (size,) and x.dtype == residual.dtype == weight.dtype
    assert residual.is_contiguous() and x.is_contiguous() and weight.is_contiguous()
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    if num_rows:
        options = row_options(size) | overlap_options(x.device)
        _add_rms_norm_kernel[(num_rows,)](residual, x, None, weight, total, normed, size, eps, **options)
    return total, normed


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
    num_rows, size = x.shape[0] if rows is None else rows.shape[0], x.shape[1]
    assert rows is None or (rows.dim() == 1 and rows.is_contiguous())
    assert weight.shape == (size,) and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
    normed = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    if num_rows:
        options = row_options(size) | overlap_options(x.device)
        _add_rms_norm_kernel[(num_rows,)](x, None, rows, weight, None, normed, size, eps, **options)
    return normed


def row_options(size: int) -> dict[str, int]:
    """One program a row of `size`: sixteen elements a thread at most, but for the widest."""
    block = next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _specimen(label: str, size: int, adds: bool = True, overlap: bool = False) -> Specimen:
    options = row_options(size)
    types: dict[str, str | None] = dict.fromkeys(("residual", "weight", "normed"), "*bf16")
    types |= dict.fromkeys(("x", "total"), "*bf16" if adds else None) | {"rows": None if adds else "*i64"}
    arguments = {**types, "size": "i32:16", "eps": "fp32", "BLOCK": options["BLOCK"], "OVERLAP": overlap}
    return Specimen(label, _add_rms_norm_kernel, arguments, num_warps=options["num_warps"], since=90 if overlap else 80)


SPECIMENS = (
    _specimen("0.5B bf16", 896),
    _specimen("7B bf16", 3584),
    _specimen("7B bf16, of some rows", 3584, adds=False),
    _specimen("0.5B bf16, of some rows, overlapped", 896, adds=False, overlap=True),
)
