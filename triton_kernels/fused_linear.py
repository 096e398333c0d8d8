"""A linear layer of few rows, with what stands before and behind it in one launch.

x'_ni  = g_i x_ni / sqrt(mean_i(x_ni ^ 2) + eps)        where a norm comes before it, else x_ni
y_no   = f s_o sum_i x'_ni w_oi + b_o                   w in x's type (s = 1), int8 or fp8 (e4m3)
out_no = silu(y_no) y_n(o + O/2)                        gated, for o < O/2: [gate | up] in one matrix
       = residual_no + y_no                             where there is a residual
       = y_no

A row's sum of squares is taken beside the products, of the elements that are multiplied anyway (`few_rows.py`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.few_rows import (
    ITEM_SIZES,
    Stored,
    added_up,
    fetch_ahead,
    few_rows_options,
    finished,
    make_parts,
    sums_of,
)
from speeder_engine.triton_kernels.language import (
    await_others,
    interpreted,
    on,
    overlap_options,
    runs_triton,
    tl,
    triton,
)
from speeder_engine.triton_kernels.quantize_rows import W8Weight
from speeder_engine.triton_kernels.specimen import Specimen


def fused_linear(
    x: Tensor,
    weight: Tensor | W8Weight,
    counters: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """x [N, I], weight [O, I], residual [N, O] -> [N, O], or [N, O / 2] where `gated`; N is MOST_ROWS at most."""
    given = (x, weight, counters, bias, norm, residual, gated, factor)
    if runs_triton(x, residual, bias):
        with on(x.device):
            return launch_fused_linear(*given)
    return fused_linear_ref(*given)


def fused_linear_ref(
    x: Tensor,
    weight: Tensor | W8Weight,
    counters: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    factor: float = 1.0,
) -> Tensor:
    """In fp32, rounded once."""
    rows, matrix = x.float(), weight.dequantized() if isinstance(weight, W8Weight) else weight.float()
    if norm is not None:
        rows = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight.float()
    out = F.linear(rows, matrix) * factor
    if bias is not None:
        out = out + bias.float()
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return (out if residual is None else residual.float() + out).to(x.dtype)


def launch_fused_linear(
    x: Tensor,
    weight: Tensor | W8Weight,
    counters: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    factor: float = 1.0,
) -> Tensor:
    stored = Stored.of(x, weight, bias, norm)
    (num_rows, size), num_outputs = x.shape, stored.values.shape[0]
    assert not gated or (num_outputs % 2 == 0 and residual is None)
    width = num_outputs // 2 if gated else num_outputs
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous() and residual.dtype == x.dtype)
    if out.numel() == 0:
        return out
    options = few_rows_options(num_rows, size, width, gated, x.element_size(), stored_size=stored.item_size)
    tiles = triton.cdiv(width, options["BLOCK_OUT"])
    parts = make_parts(tiles, options, gated, counters)
    _fused_linear_kernel[(tiles, options["SPLITS"])](
        x, None if norm is None else norm.weight, stored.values, stored.scales, bias, residual, out, parts, counters,
        num_rows, width, 0.0 if norm is None else norm.eps, factor,
        SIZE=size, GATED=gated, FP8=stored.is_fp8, WIDE=interpreted(x), **options, **overlap_options(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _fused_linear_kernel(
    x, norm, weight, scales, bias, residual, out, parts, counters, num_rows, width, eps, factor,
    SIZE: tl.constexpr, GATED: tl.constexpr, FP8: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    PART: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile's part of the sums; the tile itself where it is the last to arrive."""
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, outputs = tl.arange(0, BLOCK_ROWS), tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real, made = rows < num_rows, outputs < width
    if OVERLAP:
        fetch_ahead(weight, outputs, made, split * PART, SIZE)
        if GATED:
            fetch_ahead(weight, outputs + width, made, split * PART, SIZE)
    await_others(OVERLAP)
    total, up, squares = sums_of(
        x, norm, weight, rows, outputs, outputs + width, real, made, split, SIZE, GATED, FP8, WIDE, BLOCK_SIZE, PART
    )
    whole = True
    if SPLITS > 1:
        whole, total, up, squares = added_up(total, up, squares, parts, counters, tile, split, GATED, SPLITS)
    if whole:
        squares = squares / SIZE + eps
        total = finished(total, squares, norm, scales, bias, factor, outputs, made, FP8)
        if GATED:
            up = finished(up, squares, norm, scales, bias, factor, outputs + width, made, FP8)
            total = total / (1 + tl.exp(-total)) * up
        at, there = rows[:, None] * width + outputs[None, :], real[:, None] & made[None, :]
        if residual is not None:
            total += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def _specimen(
    label: str,
    num_rows: int,
    size: int,
    outputs: int,
    normed: bool = True,
    gated: bool = False,
    stored: str = "*bf16",
    overlap: bool = False,
) -> Specimen:
    """A layer's matrices: those that are not behind a norm add to the residual."""
    width = outputs // 2 if gated else outputs
    options = few_rows_options(num_rows, size, width, gated, 2, stored_size=ITEM_SIZES[stored])
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types: dict[str, str | None] = {"x": "*bf16", "out": "*bf16", "weight": stored, "counters": "*i32"}
    types |= {"norm": "*bf16" if normed else None, "residual": None if normed else "*bf16"}
    types |= {"scales": None if stored == "*bf16" else "*fp32", "bias": "*bf16" if normed and not gated else None}
    types |= {"parts": "*fp32" if options["SPLITS"] > 1 else None}
    types |= {"num_rows": "i32", "width": "i32:16", "eps": "fp32", "factor": "fp32"}
    flags = {"SIZE": size, "GATED": gated, "FP8": stored == "*u8", "WIDE": False, "OVERLAP": overlap}
    since = 90 if overlap else 89 if stored == "*fp8e4nv" else 80
    return Specimen(label, _fused_linear_kernel, {**types, **flags, **options}, **launch, since=since)


SPECIMENS = (
    *(_specimen(f"0.5B qkv {rows} rows", rows, 896, 1152) for rows in (16, 32, 64, 128)),
    *(_specimen(f"0.5B gate_up {rows} rows", rows, 896, 9728, gated=True) for rows in (16, 32, 64, 128)),
    *(_specimen(f"0.5B down {rows} rows", rows, 4864, 896, normed=False) for rows in (16, 32, 64, 128)),
    *(_specimen(f"7B gate_up {rows} rows", rows, 3584, 37888, gated=True) for rows in (32, 64, 128)),
    *(_specimen(f"7B down {rows} rows", rows, 18944, 3584, normed=False) for rows in (32, 128)),
    _specimen("0.5B gate_up 32 rows, overlapped", 32, 896, 9728, gated=True, overlap=True),
    _specimen("0.5B down 64 rows, overlapped", 64, 4864, 896, normed=False, overlap=True),
    _specimen("7B int8 gate_up 32 rows", 32, 3584, 37888, gated=True, stored="*i8"),
    _specimen("7B int8 gate_up 128 rows", 128, 3584, 37888, gated=True, stored="*i8"),
    _specimen("7B int8 down 64 rows", 64, 18944, 3584, normed=False, stored="*i8"),
    _specimen("7B int8 down 128 rows", 128, 18944, 3584, normed=False, stored="*i8"),
    _specimen("7B fp8 decoded qkv 32 rows", 32, 3584, 4608, stored="*u8"),
    _specimen("7B fp8 gate_up 32 rows", 32, 3584, 37888, gated=True, stored="*fp8e4nv"),
    _specimen("7B fp8 gate_up 128 rows", 128, 3584, 37888, gated=True, stored="*fp8e4nv"),
    _specimen("7B fp8 down 128 rows", 128, 18944, 3584, normed=False, stored="*fp8e4nv"),
    _specimen("7B fp8 down 32 rows", 32, 18944, 3584, normed=False, stored="*fp8e4nv"),
)
