"""A layer's queries, keys and values of few rows in one launch: norm, projection, head norms, rotation, cache.

x'_n      = norm * x_n / sqrt(mean(x_n ^ 2) + eps)
y_n       = s W x'_n + b                                        [q | k | v] in one matrix, head by head
q_n, k_n  = the rest of `qk_norm_rope_store`, of y_n
cache[slot_n] = k_n, v_n                                        where row n has a slot

A tile is one head, its two halves a pair (`few_rows.py`): what is rotated with what is in one program's registers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.compressed_attention import Scales, check_pair
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
from speeder_engine.triton_kernels.fused_linear import fused_linear_ref
from speeder_engine.triton_kernels.language import (
    await_others,
    interpreted,
    on,
    overlap_options,
    runs_triton,
    tl,
    triton,
)
from speeder_engine.triton_kernels.qk_norm_rope_store import (
    LARGEST,
    check_rotation,
    qk_norm_rope_store_ref,
    quantized_halves,
)
from speeder_engine.triton_kernels.quantize_rows import W8Weight
from speeder_engine.triton_kernels.specimen import Specimen

HALVES = (16, 32, 64)  # of a head: what a tile can be wide; a pair of 128 does not fit into registers


@dataclass(frozen=True)
class HeadsInto:
    """Where heads stand, turn and are kept: of `qk_norm_rope_store`'s arguments those that don't come from rows."""

    cos: Tensor  # fp32 [N, D], or [P, D] of all positions
    sin: Tensor
    positions: Tensor | None  # int64 [N] into those tables
    k_cache: Tensor  # [blocks, block_size, H_kv, D]
    v_cache: Tensor
    scales: Scales | None  # fp32 [blocks, block_size, H_kv] of an int8 or fp8 cache
    slot_mapping: Tensor  # int64 [M], M <= N: -1 where nothing is kept
    norms: tuple[Tensor | None, Tensor | None]  # [D] of queries and keys
    eps: float  # of those
    num_heads: int

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]


def fits(head_dim: int) -> bool:
    """Whether heads of this size can be tiles."""
    return head_dim % 2 == 0 and head_dim // 2 in HALVES


def fused_qkv(
    x: Tensor, weight: Tensor | W8Weight, counters: Tensor, bias: Tensor | None, norm: Norm, into: HeadsInto
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d], weight [(H + 2 H_kv) D, d] -> q [N, H, D], k and v [N, H_kv, D], in x's type; `counters` as of
    `fused_linear`, rows as few."""
    given = (x, weight, counters, bias, norm, into)
    if runs_triton(x, bias, into.k_cache):
        with on(x.device):
            return launch_fused_qkv(*given)
    return fused_qkv_ref(*given)


def fused_qkv_ref(
    x: Tensor, weight: Tensor | W8Weight, counters: Tensor, bias: Tensor | None, norm: Norm, into: HeadsInto
) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32, rounded once."""
    heads = fused_linear_ref(x.float(), weight, counters, bias, norm).unflatten(-1, (-1, into.head_dim))
    q, k, v = heads.split([into.num_heads, into.kv_heads, into.kv_heads], dim=1)
    norm_q, norm_k = (None if each is None else each.float() for each in into.norms)
    q, k = qk_norm_rope_store_ref(
        q, k, v, into.cos, into.sin, into.k_cache, into.v_cache, into.slot_mapping, (norm_q, norm_k), into.eps,
        None, into.scales, into.positions,
    )  # fmt: skip
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


def launch_fused_qkv(
    x: Tensor, weight: Tensor | W8Weight, counters: Tensor, bias: Tensor | None, norm: Norm, into: HeadsInto
) -> tuple[Tensor, Tensor, Tensor]:
    stored, num_rows, size = Stored.of(x, weight, bias, norm), *x.shape
    num_heads, kv_heads, head_dim = into.num_heads, into.kv_heads, into.head_dim
    assert fits(head_dim) and stored.values.shape[0] == (num_heads + 2 * kv_heads) * head_dim
    check_into(into, num_rows)
    assert into.scales is not None or into.k_cache.dtype == x.dtype
    q = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype, device=x.device)
    k, v = (torch.empty(num_rows, kv_heads, head_dim, dtype=x.dtype, device=x.device) for _ in range(2))
    if num_rows == 0:
        return q, k, v
    tiles = num_heads + 2 * kv_heads
    options = few_rows_options(
        num_rows, size, tiles * head_dim // 2, True, x.element_size(), head_dim // 2, stored.item_size
    )  # fmt: skip
    _fused_qkv_kernel[(tiles, options["SPLITS"])](
        x, norm.weight, stored.values, stored.scales, bias, into.cos, into.sin, into.positions, *into.norms,
        q, k, v, into.k_cache, into.v_cache, *(into.scales or (None, None)), into.slot_mapping,
        make_parts(tiles, options, True, counters), counters, num_rows, into.slot_mapping.shape[0], norm.eps, into.eps,
        SIZE=size, NUM_HEADS=num_heads, NUM_KV=kv_heads, LARGEST=int(LARGEST.get(into.k_cache.dtype, 0)),
        FP8=stored.is_fp8, WIDE=interpreted(x), **options, **overlap_options(x.device),
    )  # fmt: skip
    return q, k, v


def check_into(into: HeadsInto, num_rows: int) -> None:
    check_rotation(into.cos, into.sin, into.positions, into.norms, num_rows, into.head_dim)
    check_pair(into.k_cache, into.v_cache, into.scales)
    slots = into.slot_mapping
    assert slots.dim() == 1 and slots.shape[0] <= num_rows and slots.is_contiguous()


@triton.jit(do_not_specialize=["num_rows", "num_mapped"])
def _fused_qkv_kernel(
    x, norm, weight, scales, bias, cos, sin, positions, norm_q, norm_k, q, k, v, k_cache, v_cache, k_scale, v_scale,
    slot_mapping, parts, counters, num_rows, num_mapped, eps, head_eps,
    SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head's part of the sums; the head itself where it is the last to arrive."""
    head, split = tl.program_id(0), tl.program_id(1)
    rows, half = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUT)
    outputs = head * (2 * BLOCK_OUT) + half
    paired = outputs + BLOCK_OUT
    real, made = rows < num_rows, half >= 0  # heads fill their tiles
    if OVERLAP:
        fetch_ahead(weight, outputs, made, split * PART, SIZE)
        fetch_ahead(weight, paired, made, split * PART, SIZE)
    await_others(OVERLAP)
    first, second, squares = sums_of(
        x, norm, weight, rows, outputs, paired, real, made, split, SIZE, True, FP8, WIDE, BLOCK_SIZE, PART
    )
    whole = True
    if SPLITS > 1:
        whole, first, second, squares = added_up(
            first, second, squares, parts, counters, head, split, True, SPLITS
        )  # fmt: skip
    if whole:
        squares = squares / SIZE + eps
        first = finished(first, squares, norm, scales, bias, 1.0, outputs, made, FP8)
        second = finished(second, squares, norm, scales, bias, 1.0, paired, made, FP8)
        if head < NUM_HEADS:
            first, second = _turned(first, second, norm_q, cos, sin, positions, rows, real, head_eps)
            _put(q, rows.to(tl.int64) * NUM_HEADS + head, first, second, real)
        else:
            slot = tl.load(slot_mapping + rows, mask=real & (rows < num_mapped), other=-1).to(tl.int64)
            if head < NUM_HEADS + NUM_KV:
                first, second = _turned(first, second, norm_k, cos, sin, positions, rows, real, head_eps)
                _put(k, rows.to(tl.int64) * NUM_KV + head - NUM_HEADS, first, second, real)
                _keep(k_cache, k_scale, slot * NUM_KV + head - NUM_HEADS, first, second, slot >= 0, LARGEST)
            else:
                _put(v, rows.to(tl.int64) * NUM_KV + head - NUM_HEADS - NUM_KV, first, second, real)
                _keep(v_cache, v_scale, slot * NUM_KV + head - NUM_HEADS - NUM_KV, first, second, slot >= 0, LARGEST)


@triton.jit
def _turned(first, second, norm, cos, sin, positions, rows, real, eps):
    """Both halves [rows, D / 2] of one head, under its norm and rotated."""
    HALF: tl.constexpr = first.shape[1]
    half = tl.arange(0, HALF)
    if norm is not None:
        mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
        inverse = tl.rsqrt(mean + eps)[:, None]
        first = first * inverse * tl.load(norm + half).to(tl.float32)[None, :]
        second = second * inverse * tl.load(norm + half + HALF).to(tl.float32)[None, :]
    at = rows.to(tl.int64)
    if positions is not None:
        at = tl.load(positions + rows, mask=real, other=0).to(tl.int64)
    at = at[:, None] * (2 * HALF) + half[None, :]
    there = real[:, None]
    turned = first * tl.load(cos + at, mask=there, other=0.0) - second * tl.load(sin + at, mask=there, other=0.0)
    at += HALF
    other = second * tl.load(cos + at, mask=there, other=0.0) + first * tl.load(sin + at, mask=there, other=0.0)
    return turned, other


@triton.jit
def _put(out, place, first, second, there):
    """Both halves of one head a row into out [places, D]."""
    HALF: tl.constexpr = first.shape[1]
    at = place[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=there[:, None])
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _keep(cache, scale, place, first, second, there, LARGEST: tl.constexpr):
    """Into the cache, quantized where it has scales."""
    if scale is not None:
        first, second, factor = quantized_halves(first, second, LARGEST)
        tl.store(scale + place, factor, mask=there)
    _put(cache, place, first, second, there)


def _specimen(
    label: str,
    num_rows: int,
    size: int,
    shape: tuple[int, int, int],
    stored: str = "*bf16",
    cache: str = "*bf16",
    normed: bool = False,
    overlap: bool = False,
) -> Specimen:
    num_heads, kv_heads, head_dim = shape
    tiles = num_heads + 2 * kv_heads
    options = few_rows_options(num_rows, size, tiles * head_dim // 2, True, 2, head_dim // 2, ITEM_SIZES[stored])
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    types: dict[str, str | None] = dict.fromkeys(("x", "norm", "bias", "q", "k", "v"), "*bf16")
    types |= {"weight": stored, "scales": None if stored == "*bf16" else "*fp32"}
    types |= dict.fromkeys(("k_cache", "v_cache"), cache)
    types |= dict.fromkeys(("k_scale", "v_scale"), None if cache == "*bf16" else "*fp32")
    types |= dict.fromkeys(("norm_q", "norm_k"), "*bf16" if normed else None)
    types |= {"cos": "*fp32", "sin": "*fp32", "positions": "*i64", "slot_mapping": "*i64", "counters": "*i32"}
    types |= {"parts": "*fp32" if options["SPLITS"] > 1 else None, "num_rows": "i32", "num_mapped": "i32"}
    largest = {"*bf16": 0, "*i8": 127, "*fp8e4nv": 448}[cache]
    flags = {"SIZE": size, "NUM_HEADS": num_heads, "NUM_KV": kv_heads, "LARGEST": largest, "FP8": stored == "*u8"}
    types |= {"eps": "fp32", "head_eps": "fp32"}
    since = 90 if overlap else 89 if "*fp8e4nv" in (cache, stored) else 80
    arguments = {**types, **flags, "WIDE": False, "OVERLAP": overlap, **options}
    return Specimen(label, _fused_qkv_kernel, arguments, **launch, since=since)


SPECIMENS = (
    *(_specimen(f"0.5B {rows} rows", rows, 896, (14, 2, 64)) for rows in (16, 32, 64, 128)),
    *(_specimen(f"7B {rows} rows", rows, 3584, (28, 4, 128)) for rows in (16, 32, 64, 128)),
    _specimen("0.5B 32 rows, overlapped", 32, 896, (14, 2, 64), overlap=True),
    _specimen("8B with norms, int8, int8 KV 64 rows", 64, 4096, (32, 8, 128), "*i8", "*i8", normed=True),
    _specimen("7B int8 128 rows", 128, 3584, (28, 4, 128), "*i8"),
    _specimen("8B with norms, fp8 decoded 128 rows", 128, 4096, (32, 8, 128), "*u8", normed=True),
    _specimen("8B with norms, fp8 128 rows", 128, 4096, (32, 8, 128), "*fp8e4nv", normed=True),
    _specimen("7B fp8, fp8 KV 32 rows", 32, 3584, (28, 4, 128), "*fp8e4nv", "*fp8e4nv"),
)
