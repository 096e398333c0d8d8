"""Rows in 8 bits, each with a scale of its own: weights' output channels, items, and rows of activations.

q_ni = x_ni / t_n, rounded        t_n = max_i |x_ni| / largest        largest: 127 of int8, 448 of fp8 (e4m3)

x may be a sum under a norm, as layers read it: z_n = residual_n + x_n,  weight_i z_ni / sqrt(mean_i(z_ni ^ 2) + eps).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import Norm, add_rms_norm_ref, rms_norm_ref
from speeder_engine.triton_kernels.language import on, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen

Kind = Literal["int8", "fp8"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
QUANTIZED_AT_ONCE = 2048


@dataclass(frozen=True)
class W8Weight:
    """A matrix [O, I] in 8 bits, quantised row by row: a weight's output channels, or rows of activations."""

    values: Tensor  # int8 or float8_e4m3fn [O, I]
    scales: Tensor  # fp32 [O]

    @property
    def kind(self) -> Kind:
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    def dequantized(self) -> Tensor:
        """fp32 [O, I]."""
        return self.values.float() * self.scales.unsqueeze(1)


def quantize_weight(weight: Tensor, kind: Kind) -> W8Weight:
    """[O, I] of any dtype; the largest element of an output channel becomes the largest number of the kind."""
    return quantize_rows(weight.detach(), kind)


def quantize_rows(x: Tensor, kind: Kind) -> W8Weight:
    """x [N, I], each row by its own largest element."""
    if runs_triton(x):
        with on(x.device):
            return launch_quantize_rows(x, kind)
    return quantize_rows_ref(x, kind)


def quantize_normed_rows(x: Tensor, kind: Kind, norm: Norm, residual: Tensor | None = None) -> tuple[Tensor, W8Weight]:
    """x and residual [N, I] -> their sum, or x, and that under the norm in 8 bits."""
    if runs_triton(x, norm.weight, residual):
        with on(x.device):
            return launch_quantize_normed_rows(x, kind, norm, residual)
    return quantize_normed_rows_ref(x, kind, norm, residual)


def quantize_normed_rows_ref(
    x: Tensor, kind: Kind, norm: Norm, residual: Tensor | None = None
) -> tuple[Tensor, W8Weight]:
    if residual is None:
        return x, quantize_rows_ref(rms_norm_ref(x, *norm), kind)
    total, normed = add_rms_norm_ref(residual, x, *norm)
    return total, quantize_rows_ref(normed, kind)


def quantize_rows_ref(x: Tensor, kind: Kind) -> W8Weight:
    wide = x.float()
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scales = torch.where(largest > 0, largest / LARGEST[kind], 1.0)
    scaled = (wide / scales.unsqueeze(1)).clamp(-LARGEST[kind], LARGEST[kind])
    return W8Weight((scaled.round() if kind == "int8" else scaled).to(DTYPES[kind]), scales)


def launch_quantize_rows(x: Tensor, kind: Kind) -> W8Weight:
    return _launch(x, kind, None, None)[1]


def launch_quantize_normed_rows(
    x: Tensor, kind: Kind, norm: Norm, residual: Tensor | None = None
) -> tuple[Tensor, W8Weight]:
    return _launch(x, kind, norm, residual)


def _launch(x: Tensor, kind: Kind, norm: Norm | None, residual: Tensor | None) -> tuple[Tensor, W8Weight]:
    assert x.dim() == 2 and x.is_contiguous()
    num_rows, size = x.shape
    assert norm is None or (norm.weight.shape == (size,) and norm.weight.is_contiguous())
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.is_contiguous())
    values = torch.empty(num_rows, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if size == 0:
        scales.fill_(1.0)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        _quantize_rows_kernel[(num_rows,)](
            x, residual, None if norm is None else norm.weight, None if residual is None else total, values, scales,
            0.0 if norm is None else norm.eps, SIZE=size, BLOCK=QUANTIZED_AT_ONCE, FP8=kind == "fp8",
        )  # fmt: skip
    return total, W8Weight(values.view(DTYPES[kind]), scales)


@triton.jit
def _quantize_rows_kernel(
    x, residual, norm, total, values, scales, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr
):  # fmt: skip
    """A row a program, read as often as it must be: its squares, its largest element, itself."""
    LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
    start = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    if norm is not None:
        for at in range(0, SIZE, BLOCK):
            part = _summed(x, residual, start + at, columns, SIZE - at)
            squares += part * part
            if residual is not None:
                tl.store(total + start + at + columns, part.to(total.dtype.element_ty), mask=columns < SIZE - at)
    factor = tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps) if norm is not None else 1.0
    largest = tl.zeros([BLOCK], tl.float32)
    for at in range(0, SIZE, BLOCK):
        part = _normed(x, residual, norm, start, at, columns, factor, SIZE)
        largest = tl.maximum(largest, tl.abs(part))
    top = tl.max(largest, axis=0)
    scale = tl.where(top > 0, tl.div_rn(top, top * 0 + LARGEST), 1.0)
    tl.store(scales + tl.program_id(0), scale)
    for at in range(0, SIZE, BLOCK):
        part = _normed(x, residual, norm, start, at, columns, factor, SIZE)
        scaled = tl.div_rn(part, tl.zeros([BLOCK], tl.float32) + scale)
        code = _e4m3(scaled) if FP8 else _whole(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int32)
        tl.store(values + start + at + columns, code.to(tl.int8), mask=columns < SIZE - at)


@triton.jit
def _summed(x, residual, at, columns, left):
    """A part of a row, of the sum as it is stored."""
    part = tl.load(x + at + columns, mask=columns < left, other=0.0).to(tl.float32)
    if residual is not None:
        part += tl.load(residual + at + columns, mask=columns < left, other=0.0).to(tl.float32)
        part = part.to(x.dtype.element_ty).to(tl.float32)
    return part


@triton.jit
def _normed(x, residual, norm, start, at, columns, factor, SIZE: tl.constexpr):
    part = _summed(x, residual, start + at, columns, SIZE - at)
    if norm is not None:
        part = part * factor * tl.load(norm + at + columns, mask=columns < SIZE - at, other=0.0).to(tl.float32)
    return part


@triton.jit
def _whole(x):
    """To the nearest whole number, halves to the even one, for |x| < 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x):
    """The eight bits of the nearest e4m3, as torch rounds to it."""
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = _whole(size * ((130 - exponent) << 23).to(tl.float32, bitcast=True))  # eighths of 2 ** exponent
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return sign | (((exponent + 6) << 3) + steps.to(tl.int32))


def _specimen(label: str, fp8: bool, normed: bool = False) -> Specimen:
    types: dict[str, Any] = {"x": "*bf16", "values": "*i8", "scales": "*fp32", "eps": "fp32"}
    types |= dict.fromkeys(("residual", "norm", "total"), "*bf16" if normed else None)
    return Specimen(label, _quantize_rows_kernel, {**types, "SIZE": 3584, "BLOCK": QUANTIZED_AT_ONCE, "FP8": fp8})


SPECIMENS = (
    _specimen("7B int8", False),
    _specimen("7B fp8", True),
    _specimen("7B fp8, normed", True, normed=True),
)
