"""Products of few rows with large matrices: what layers share that do more than multiply in one launch.

Few rows leave a pass to its weights' bytes and to its number of launches. A tile of outputs, or two of them that belong
together, is a program's. Where a matrix is too narrow to fill a GPU it is cut along I: the program of a tile that
arrives last adds the parts up in their order, whoever that is, so that equal rows have equal results. How a matrix is
cut depends on its shape alone; a block of more rows takes other matrix instructions, which may round otherwise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.language import runs_triton, tl, triton
from speeder_engine.triton_kernels.linear_w8 import MULTIPROCESSORS, cast, decoded, multiplies_fp8
from speeder_engine.triton_kernels.quantize_rows import W8Weight

BLOCKS_OF_ROWS = (16, 32, 64, 128)  # of a tile
MOST_ROWS = BLOCKS_OF_ROWS[-1]  # more are for the matrix units, and for libraries
LEAST_PART = 224  # of I: a shorter one costs more to add up than it saves
CUT_AT = 128  # multiples of I, whatever a block is long
MOST_TILES = 128  # of a matrix that is cut
FETCHED_LINES = tl.constexpr(16)  # of 128 bytes, of each output's weights: 1,024 elements in bf16
SHARED_BYTES = 72 << 10  # that a program's loads may be ahead by: every GPU's block has them
ITEM_SIZES = {"*bf16": 2, "*i8": 1, "*fp8e4nv": 1, "*u8": None}  # `Stored.item_size` by a specimen's type


def suits(x: Tensor) -> bool:
    """Whether layers of x [N, I] are better fused: few rows on a GPU, in bf16. What a norm's weight is multiplied with
    has not been normed yet and may be large: fp16 could not hold it. fp32 has no matrix units."""
    return x.shape[0] <= MOST_ROWS and x.dtype == torch.bfloat16 and runs_triton(x)


def make_counters(device: torch.device) -> Tensor:
    """What `fused_linear` counts arrivals in; every launch leaves zeros. For launches one after another: what may run
    side by side needs counters of its own."""
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


class Stored(NamedTuple):
    """A layer's matrix as kernels take it."""

    values: Tensor  # [O, I] of x's type, int8, fp8, or fp8 as bytes
    scales: Tensor | None  # fp32 [O] of 8 bits
    is_fp8: bool  # as bytes, which are decoded: where the device has no instruction for it

    @classmethod
    def of(cls, x: Tensor, weight: Tensor | W8Weight, bias: Tensor | None, norm: Norm | None) -> "Stored":
        """Asserts the layout of a layer of x [N, I]."""
        values, scales = (weight.values, weight.scales) if isinstance(weight, W8Weight) else (weight, None)
        (num_rows, size), num_outputs = x.shape, values.shape[0]
        assert num_rows <= MOST_ROWS and values.shape == (num_outputs, size)
        assert x.is_contiguous() and values.is_contiguous() and (scales is None) == (values.dtype == x.dtype)
        assert scales is None or (scales.dtype == torch.float32 and scales.shape == (num_outputs,))
        assert bias is None or (bias.is_contiguous() and bias.shape == (num_outputs,))
        assert norm is None or (norm.weight.is_contiguous() and norm.weight.shape == (size,))
        is_fp8 = scales is not None and values.dtype != torch.int8 and not multiplies_fp8(x.device)
        return cls(values.view(torch.uint8) if is_fp8 else values, scales, is_fp8)

    @property
    def item_size(self) -> int | None:
        """Bytes of a weight that is multiplied as it is loaded; none of one that is decoded into registers first."""
        return None if self.is_fp8 else self.values.element_size()


def make_parts(tiles: int, options: dict[str, int], pair: bool, counters: Tensor) -> Tensor | None:
    """Room for the parts of a matrix that is cut; none where it isn't."""
    if options["SPLITS"] == 1:
        return None
    assert tiles <= counters.shape[0] and counters.dtype == torch.int32
    # a tile's products, output by output, and behind them a column of squares
    columns = options["BLOCK_OUT"] * (2 if pair else 1) + 1
    size = tiles, options["SPLITS"], columns, options["BLOCK_ROWS"]
    return torch.empty(size, dtype=torch.float32, device=counters.device)


def block_of(num_rows: int) -> int:
    """The smallest block that holds them."""
    return next(rows for rows in BLOCKS_OF_ROWS if rows >= num_rows)


def few_rows_options(
    num_rows: int,
    size: int,
    width: int,
    pair: bool,
    element_size: int,
    outputs: int | None = None,
    stored_size: int | None = None,
) -> dict[str, int]:
    """Tiles and cuts of a matrix [width, size], or [2 width, size] in pairs of tiles. Only blocks of rows, and how much
    is loaded at once, follow the rows. `outputs`: of a tile, where the caller knows; `stored_size`: bytes of a weight,
    if they aren't those of the rows' elements."""
    rows = block_of(num_rows)
    outputs = outputs or (32 if width < 64 * 2 * MULTIPROCESSORS else 64)
    tiles = -(-width // outputs)
    splits = max(1, min((MULTIPROCESSORS * 5 // 4) // tiles, size // LEAST_PART))
    stored_size = stored_size or element_size
    long = (rows <= 32 and outputs <= 32) or (rows == 128 and stored_size == 1)
    length = 32 if element_size == 4 else 128 if long else 64
    at_once = (rows * element_size + outputs * (2 if pair else 1) * stored_size) * length
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": outputs,
        "BLOCK_SIZE": length,
        "SPLITS": splits,
        "PART": -(-size // (splits * CUT_AT)) * CUT_AT,
        "num_warps": 8 if rows == 128 else 4,
        # as many bytes of weights are on their way
        "num_stages": min(max(SHARED_BYTES // at_once, 2), 5 if stored_size > 1 else 8) + 1,
    }


@triton.jit
def fetch_ahead(weight, outputs, made, first, SIZE: tl.constexpr):
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
def sums_of(
    x, norm, weight, rows, outputs, paired, real, made, split, SIZE: tl.constexpr, PAIR: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """x' . w [rows, outputs] over one part of I in fp32, not yet normed; that of `paired` outputs too, where PAIR; each
    row's squares."""
    DOT: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    columns = split * PART + tl.arange(0, BLOCK_SIZE)
    left_at = x + rows[:, None] * SIZE + columns[None, :]
    right_at = weight + outputs.to(tl.int64)[None, :] * SIZE + columns[:, None]
    pair_at = weight + paired.to(tl.int64)[None, :] * SIZE + columns[:, None]
    total = tl.zeros([rows.shape[0], outputs.shape[0]], tl.float32)
    pair = tl.zeros([rows.shape[0], outputs.shape[0]], tl.float32)
    squares = tl.zeros([rows.shape[0]], tl.float32)
    for start in range(0, PART, BLOCK_SIZE):
        inside = columns < SIZE - start
        left = tl.load(left_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        if norm is not None:
            wide = left.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            left = wide * tl.load(norm + columns + start, mask=inside, other=0.0).to(tl.float32)[None, :]
        left = cast(left, DOT)
        there = inside[:, None] & made[None, :]
        total = multiplied(total, left, right_at + start, there, FP8, DOT)
        if PAIR:
            pair = multiplied(pair, left, pair_at + start, there, FP8, DOT)
    return total, pair, squares


@triton.jit
def multiplied(total, left, right_at, there, FP8: tl.constexpr, DOT: tl.constexpr):
    right = tl.load(right_at, mask=there, other=0.0)
    right = decoded(right) if FP8 else right
    return tl.dot(left, cast(right, DOT), total, input_precision="ieee")


@triton.jit
def added_up(total, pair, squares, parts, counters, tile, split, PAIR: tl.constexpr, SPLITS: tl.constexpr):
    """Leaves this part for whoever arrives last; whether that is this program, and then the sums of all parts."""
    BLOCK_ROWS: tl.constexpr = total.shape[0]
    BLOCK_OUT: tl.constexpr = total.shape[1]
    ONE: tl.constexpr = BLOCK_OUT * BLOCK_ROWS
    WHOLE: tl.constexpr = (2 * ONE if PAIR else ONE) + BLOCK_ROWS
    rows = tl.arange(0, BLOCK_ROWS)
    within = tl.arange(0, BLOCK_OUT)[None, :] * BLOCK_ROWS + rows[:, None]
    at = parts + (tile * SPLITS + split) * WHOLE
    tl.store(at + within, total)
    if PAIR:
        tl.store(at + ONE + within, pair)
    tl.store(at + WHOLE - BLOCK_ROWS + rows, squares)
    tl.debug_barrier()  # all threads' parts stand before one of them says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(counters + tile, 0)
        total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        pair = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
        squares = tl.zeros([BLOCK_ROWS], tl.float32)
        for each in tl.static_range(SPLITS):  # all are on their way at once
            at = parts + (tile * SPLITS + each) * WHOLE
            # .cg: others wrote it, and this multiprocessor's own cache doesn't know
            total += tl.load(at + within, cache_modifier=".cg")
            if PAIR:
                pair += tl.load(at + ONE + within, cache_modifier=".cg")
            squares += tl.load(at + WHOLE - BLOCK_ROWS + rows, cache_modifier=".cg")
    return last, total, pair, squares


@triton.jit
def finished(total, squares, norm, scales, bias, factor, outputs, made, FP8: tl.constexpr):
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
