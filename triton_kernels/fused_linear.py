"""A linear layer of few rows, with what stands before and behind it in one launch.

x'_ni  = g_i x_ni / sqrt(mean_i(x_ni ^ 2) + eps)        where a norm comes before it, else x_ni
y_no   = f s_o sum_i x'_ni w_oi + b_o                   w in x's type (s = 1), int8 or fp8 (e4m3)
out_no = silu(y_no) y_n(o + O/2)                        gated, for o < O/2: [gate | up] in one matrix
       = residual_no + y_no                             where there is a residual
       = y_no

Few rows leave a pass to its weights' bytes and to its number of launches: a decoder layer has six this way. A row's
sum of squares is taken beside the products, of the elements that are multiplied anyway. Outputs too narrow to fill a
GPU are cut along I: the program of a tile that arrives last adds the parts up in their order, whoever that is, so that
equal rows have equal results. How a matrix is cut depends on its shape alone, not on the rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import (
    await_others,
    interpreted,
    next_power_of_2,
    on,
    overlap_options,
    runs_triton,
    tl,
    triton,
)
from speeder_engine.triton_kernels.linear_w8 import MULTIPROCESSORS, W8Weight, cast, decoded
from speeder_engine.triton_kernels.specimen import Specimen

MOST_ROWS = 128  # of a tile: more rows are for the matrix units, and for libraries
LEAST_PART = 256  # of I: a shorter one costs more to add up than it saves
MOST_TILES = 1024  # of a matrix that is cut
FETCHED_LINES = tl.constexpr(16)  # of 128 bytes, of each output's weights: 1,024 elements in bf16
SHARED_BYTES = 72 << 10  # that a program's loads may be ahead by: every GPU's block has them


class Norm(NamedTuple):
    """An RMSNorm before the layer."""

    weight: Tensor  # [I]
    eps: float


def suits(x: Tensor) -> bool:
    """Whether layers of x [N, I] are better fused: few rows on a GPU, in bf16. What a norm's weight is multiplied with
    has not been normed yet and may be large: fp16 could not hold it. fp32 has no matrix units."""
    return x.shape[0] <= MOST_ROWS and x.dtype == torch.bfloat16 and runs_triton(x)


def make_counters(device: torch.device) -> Tensor:
    """What `fused_linear` counts arrivals in; every launch leaves zeros. For launches one after another: what may run
    side by side needs counters of its own."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


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
    values, scales = (weight.values, weight.scales) if isinstance(weight, W8Weight) else (weight, None)
    (num_rows, size), num_outputs = x.shape, values.shape[0]
    assert num_rows <= MOST_ROWS and values.shape == (num_outputs, size)
    assert x.is_contiguous() and values.is_contiguous() and (scales is None) == (values.dtype == x.dtype)
    assert scales is None or (scales.dtype == torch.float32 and scales.shape == (num_outputs,))
    assert bias is None or (bias.is_contiguous() and bias.shape == (num_outputs,))
    assert norm is None or (norm.weight.is_contiguous() and norm.weight.shape == (size,))
    assert not gated or (num_outputs % 2 == 0 and residual is None)
    width = num_outputs // 2 if gated else num_outputs
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous() and residual.dtype == x.dtype)
    if out.numel() == 0:
        return out
    options = fused_options(num_rows, size, width, gated, x.element_size())
    tiles, splits = triton.cdiv(width, options["BLOCK_OUT"]), options["SPLITS"]
    parts = None
    if splits > 1:
        assert tiles <= counters.shape[0] and counters.dtype == torch.int32
        # products, and behind each tile's a column of squares
        parts = torch.empty(
            tiles, splits, options["BLOCK_OUT"] + 1, options["BLOCK_ROWS"], dtype=torch.float32, device=x.device
        )
    fp8 = scales is not None and values.dtype != torch.int8
    _fused_linear_kernel[(tiles, splits)](
        x, None if norm is None else norm.weight, values.view(torch.uint8) if fp8 else values, scales, bias, residual,
        out, parts, counters, num_rows, width, 0.0 if norm is None else norm.eps, factor,
        SIZE=size, GATED=gated, FP8=fp8, WIDE=interpreted(x), **options, **overlap_options(x.device),
    )  # fmt: skip
    return out


def fused_options(num_rows: int, size: int, width: int, gated: bool, element_size: int) -> dict[str, int]:
    """Tiles and cuts. Blocks of rows follow the rows; what is multiplied in which order doesn't."""
    rows = min(max(next_power_of_2(num_rows), 16), MOST_ROWS)
    outputs = 32 if width < 64 * 2 * MULTIPROCESSORS else 64
    tiles = -(-width // outputs)
    # a gated tile is two, and has no need to be cut: what is gated is wide
    splits = 1 if gated else max(1, min((MULTIPROCESSORS * 5 // 4) // tiles, size // LEAST_PART))
    length = 32 if element_size == 4 else 128 if rows <= 32 and outputs == 32 else 64
    at_once = (rows + outputs * (2 if gated else 1)) * length * element_size
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": outputs,
        "BLOCK_SIZE": length,
        "SPLITS": splits,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": min(max(SHARED_BYTES // at_once, 2), 5) + 1,
    }


@triton.jit(do_not_specialize=["num_rows"])
def _fused_linear_kernel(
    x, norm, weight, scales, bias, residual, out, parts, counters, num_rows, width, eps, factor,
    SIZE: tl.constexpr, GATED: tl.constexpr, FP8: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile's part of the sums; the tile itself where it is the last to arrive."""
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, outputs = tl.arange(0, BLOCK_ROWS), tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real, made = rows < num_rows, outputs < width
    if OVERLAP:
        first = split * tl.cdiv(tl.cdiv(SIZE, BLOCK_SIZE), SPLITS) * BLOCK_SIZE
        _fetch_ahead(weight, outputs, made, first, SIZE)
        if GATED:
            _fetch_ahead(weight, outputs + width, made, first, SIZE)
    await_others(OVERLAP)
    total, up, squares = _sums(
        x, norm, weight, rows, outputs, real, made, split, width, SIZE, GATED, FP8, WIDE, BLOCK_SIZE, SPLITS
    )
    whole = True
    if SPLITS > 1:
        whole, total, squares = _added_up(total, squares, parts, counters, tile, split, SPLITS)
    if whole:
        squares = squares / SIZE + eps
        total = _finished(total, squares, norm, scales, bias, factor, outputs, made, FP8)
        if GATED:
            up = _finished(up, squares, norm, scales, bias, factor, outputs + width, made, FP8)
            total = total / (1 + tl.exp(-total)) * up
        at, there = rows[:, None] * width + outputs[None, :], real[:, None] & made[None, :]
        if residual is not None:
            total += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _fetch_ahead(weight, outputs, made, first, SIZE: tl.constexpr):
    """The beginning of a tile's weights into the L2 cache, while kernels ahead still run: nobody writes weights."""
    LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    columns = first + tl.arange(0, FETCHED_LINES) * LINE
    # what is outside fetches the matrix's first line
    inside = made[:, None] & (columns < SIZE)[None, :]
    at = tl.where(inside, outputs.to(tl.int64)[:, None] * SIZE + columns[None, :], 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weight + at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sums(
    x, norm, weight, rows, outputs, real, made, split, width, SIZE: tl.constexpr, GATED: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """x' . w [rows, outputs] over one part of I in fp32, not yet normed; that of the up half; each row's squares."""
    DOT: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    LENGTH: tl.constexpr = tl.cdiv(tl.cdiv(SIZE, BLOCK_SIZE), SPLITS) * BLOCK_SIZE
    columns = split * LENGTH + tl.arange(0, BLOCK_SIZE)
    left_at = x + rows[:, None] * SIZE + columns[None, :]
    right_at = weight + outputs.to(tl.int64)[None, :] * SIZE + columns[:, None]
    up_at = right_at + width.to(tl.int64) * SIZE
    total = tl.zeros([rows.shape[0], outputs.shape[0]], tl.float32)
    up = tl.zeros([rows.shape[0], outputs.shape[0]], tl.float32)
    squares = tl.zeros([rows.shape[0]], tl.float32)
    for start in range(0, LENGTH, BLOCK_SIZE):
        inside = columns < SIZE - start
        left = tl.load(left_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        if norm is not None:
            wide = left.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            left = wide * tl.load(norm + columns + start, mask=inside, other=0.0).to(tl.float32)[None, :]
        left = cast(left, DOT)
        there = inside[:, None] & made[None, :]
        total = _multiplied(total, left, right_at + start, there, FP8, DOT)
        if GATED:
            up = _multiplied(up, left, up_at + start, there, FP8, DOT)
    return total, up, squares


@triton.jit
def _multiplied(total, left, right_at, there, FP8: tl.constexpr, DOT: tl.constexpr):
    right = tl.load(right_at, mask=there, other=0.0)
    right = decoded(right) if FP8 else right
    return tl.dot(left, cast(right, DOT), total, input_precision="ieee")


@triton.jit
def _added_up(total, squares, parts, counters, tile, split, SPLITS: tl.constexpr):
    """Leaves this part for whoever arrives last; whether that is this program, and then the sums of all parts."""
    BLOCK_ROWS: tl.constexpr = total.shape[0]
    BLOCK_OUT: tl.constexpr = total.shape[1]
    rows, outputs = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
    LONG: tl.constexpr = (BLOCK_OUT + 1) * BLOCK_ROWS
    at = parts + (tile * SPLITS + split) * LONG
    behind = BLOCK_OUT * BLOCK_ROWS
    within = outputs[None, :] * BLOCK_ROWS + rows[:, None]
    tl.store(at + within, total)
    tl.store(at + behind + rows, squares)
    tl.debug_barrier()  # all threads' parts stand before one of them says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(counters + tile, 0)
        total *= 0
        squares *= 0
        for each in tl.static_range(SPLITS):  # all are on their way at once
            at = parts + (tile * SPLITS + each) * LONG
            # .cg: others wrote it, and this multiprocessor's own cache doesn't know
            total += tl.load(at + within, cache_modifier=".cg")
            squares += tl.load(at + behind + rows, cache_modifier=".cg")
    return last, total, squares


@triton.jit
def _finished(total, squares, norm, scales, bias, factor, outputs, made, FP8: tl.constexpr):
    """Norm, scales, factor and bias of a tile's sums."""
    total = total * factor
    if norm is not None:
        total = total * tl.rsqrt(squares)[:, None]
    if scales is not None:
        # what is decoded is too small by 2 ** 8
        shrunk: tl.constexpr = 256.0 if FP8 else 1.0
        total = total * (tl.load(scales + outputs, mask=made, other=0.0) * shrunk)[None, :]
    if bias is not None:
        total = total + tl.load(bias + outputs, mask=made, other=0.0).to(tl.float32)[None, :]
    return total


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
    options = fused_options(num_rows, size, width, gated, 2)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types: dict[str, str | None] = {"x": "*bf16", "out": "*bf16", "weight": stored, "counters": "*i32"}
    types |= {"norm": "*bf16" if normed else None, "residual": None if normed else "*bf16"}
    types |= {"scales": None if stored == "*bf16" else "*fp32", "bias": "*bf16" if normed and not gated else None}
    types |= {"parts": "*fp32" if options["SPLITS"] > 1 else None}
    types |= {"num_rows": "i32", "width": "i32:16", "eps": "fp32", "factor": "fp32"}
    flags = {"SIZE": size, "GATED": gated, "FP8": stored == "*u8", "WIDE": False, "OVERLAP": overlap}
    return Specimen(label, _fused_linear_kernel, {**types, **flags, **options}, **launch, since=90 if overlap else 80)


SPECIMENS = (
    *(_specimen(f"0.5B qkv {rows} rows", rows, 896, 1152) for rows in (16, 32, 64, 128)),
    *(_specimen(f"0.5B gate_up {rows} rows", rows, 896, 9728, gated=True) for rows in (16, 32, 64, 128)),
    *(_specimen(f"0.5B down {rows} rows", rows, 4864, 896, normed=False) for rows in (16, 32, 64, 128)),
    *(_specimen(f"7B gate_up {rows} rows", rows, 3584, 37888, gated=True) for rows in (32, 64, 128)),
    *(_specimen(f"7B down {rows} rows", rows, 18944, 3584, normed=False) for rows in (32, 128)),
    _specimen("0.5B gate_up 32 rows, overlapped", 32, 896, 9728, gated=True, overlap=True),
    _specimen("0.5B down 64 rows, overlapped", 64, 4864, 896, normed=False, overlap=True),
    _specimen("7B int8 gate_up 32 rows", 32, 3584, 37888, gated=True, stored="*i8"),
    _specimen("7B int8 down 64 rows", 64, 18944, 3584, normed=False, stored="*i8"),
    _specimen("7B fp8 qkv 32 rows", 32, 3584, 4608, stored="*u8"),
)
