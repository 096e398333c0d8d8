"""What happens between a layer's projection and its attention: norm, rotation, and the write into the paged cache.

q_n, k_n -> weight * x / sqrt(mean(x ^ 2) + eps)        each head, where the family has such norms
         -> x * cos_n + [-second half of x | first half] * sin_n
cache[slot_n] = k_n, v_n                                 where row n has a slot

An int8 or fp8 cache holds x / scale, with one scale a position and head: its largest magnitude over the type's.
"""

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import rms_norm_ref
from speeder_engine.triton_kernels.compressed_attention import Scales, check_pair
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

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 1e-20  # a scale: what is all zero divides by it


def qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    rows: Tensor | None = None,
    scales: Scales | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [R, H, D] of `rows` [R] (None: of all), k and v [N, H_kv, D], cos and sin fp32 [N, D] -> rotated q and k. With
    `positions` int64 [N], cos and sin are tables [P, D] of all positions.

    Writes the first M rows' k and v into caches [blocks, block_size, H_kv, D] at slot_mapping int64 [M], M <= N, where
    it is not negative; and their `scales` (fp32 [blocks, block_size, H_kv]), where the caches are int8 or fp8.
    """
    given = (q, k, v, cos, sin, k_cache, v_cache, slot_mapping, norms, eps, rows, scales, positions)
    if runs_triton(q, k, v, k_cache, v_cache):
        with on(q.device):
            return launch_qk_norm_rope_store(*given)
    return qk_norm_rope_store_ref(*given)


def qk_norm_rope_store_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    rows: Tensor | None = None,
    scales: Scales | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k = (x if norm is None else rms_norm_ref(x, norm, eps) for x, norm in zip((q, k), norms, strict=True))
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    k = rotate(k, cos, sin)
    stored = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[stored]
    for x, cache, scale in zip((k, v), (k_cache, v_cache), scales or (None, None), strict=True):
        if scale is None:
            cache.flatten(0, 1)[slots] = x[stored].to(cache.dtype)
            continue
        small, theirs = quantize(x[stored], cache.dtype)
        # bytes: torch scatters no fp8
        cache.view(torch.int8).flatten(0, 1)[slots] = small.view(torch.int8)
        scale.flatten(0, 1)[slots] = theirs
    return rotate(q, *((cos, sin) if rows is None else (cos[rows], sin[rows]))), k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [..., H, D], cos and sin [..., D], arithmetic in x's dtype as transformers does it."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 or fp8, and the scale [...] that it is multiplied with."""
    largest, wide = LARGEST[dtype], x.float()
    scale = wide.abs().amax(dim=-1).clamp(min=LEAST * largest) / largest
    small = (wide / scale.unsqueeze(-1)).clamp(-largest, largest)
    return ((small + 0.5).floor() if dtype == torch.int8 else small).to(dtype), scale


@triton.jit
def turned_heads(x, norm, cos, sin, head, half, inside, eps, DIM: tl.constexpr):
    """Both halves [heads, D / 2] of a row's heads, in fp32, under the norm and rotated."""
    at = head[:, None] * DIM + half[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    there = half < DIM // 2
    if norm is not None:
        mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM
        inverse = tl.rsqrt(mean + eps)[:, None]
        first = first * inverse * tl.load(norm + half, mask=there, other=0.0).to(tl.float32)[None, :]
        second = second * inverse * tl.load(norm + half + DIM // 2, mask=there, other=0.0).to(tl.float32)[None, :]
    cos_first = tl.load(cos + half, mask=there, other=0.0)[None, :]
    sin_first = tl.load(sin + half, mask=there, other=0.0)[None, :]
    cos_second = tl.load(cos + half + DIM // 2, mask=there, other=0.0)[None, :]
    sin_second = tl.load(sin + half + DIM // 2, mask=there, other=0.0)[None, :]
    return first * cos_first - second * sin_first, second * cos_second + first * sin_second


@triton.jit
def quantized_halves(first, second, LARGEST):
    """Both halves [n, D / 2] of heads as numbers of an 8-bit type, and the scales [n] that they are multiplied with."""
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
    factor = tl.maximum(largest, 1e-20 * LARGEST) / LARGEST
    first = tl.minimum(tl.maximum(first / factor[:, None], -LARGEST), LARGEST)
    second = tl.minimum(tl.maximum(second / factor[:, None], -LARGEST), LARGEST)
    if LARGEST == 127:
        first, second = tl.floor(first + 0.5), tl.floor(second + 0.5)
    return first, second, factor


@triton.jit
def store_heads(out, scale, row, first, second, head, half, inside, HEADS: tl.constexpr, DIM: tl.constexpr, LARGEST):
    """Writes a row's heads into out [rows, HEADS, DIM], quantized where it has scales [rows, HEADS]."""
    if scale is not None:
        first, second, factor = quantized_halves(first, second, LARGEST)
        tl.store(scale + row * HEADS + head, factor, mask=head < HEADS)
    at = row * (HEADS * DIM) + head[:, None] * DIM + half[None, :]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + DIM // 2, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def position_of(row, positions):
    """Where a row's cos and sin stand: in tables, or one by one as the rows do."""
    at = row
    if positions is not None:
        at = tl.load(positions + row).to(tl.int64)
    return at


@triton.jit
def turn_query(
    row, q, norm, cos, sin, positions, rows, out, stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    head, half = tl.arange(0, BLOCK), tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS)[:, None] & (half < DIM // 2)[None, :]
    at = row
    if rows is not None:
        at = tl.load(rows + row).to(tl.int64)
    at = position_of(at, positions)
    first, second = turned_heads(q + row * stride, norm, cos + at * DIM, sin + at * DIM, head, half, inside, eps, DIM)
    store_heads(out, None, row, first, second, head, half, inside, HEADS, DIM, 0)


@triton.jit
def turn_key(
    row, k, v, norm, cos, sin, positions, out, k_cache, v_cache, k_scale, v_scale, slot_mapping, num_mapped, k_stride,
    v_stride, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    head, half = tl.arange(0, BLOCK), tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS)[:, None] & (half < DIM // 2)[None, :]
    angle = position_of(row, positions) * DIM
    first, second = turned_heads(k + row * k_stride, norm, cos + angle, sin + angle, head, half, inside, eps, DIM)
    store_heads(out, None, row, first, second, head, half, inside, HEADS, DIM, 0)
    slot = tl.load(slot_mapping + row, mask=row < num_mapped, other=-1).to(tl.int64)
    if slot >= 0:
        store_heads(k_cache, k_scale, slot, first, second, head, half, inside, HEADS, DIM, LARGEST)
        at = row * v_stride + head[:, None] * DIM + half[None, :]
        first = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(v + at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
        store_heads(v_cache, v_scale, slot, first, second, head, half, inside, HEADS, DIM, LARGEST)


@triton.jit(do_not_specialize=["num_read", "num_mapped"])
def _qk_norm_rope_store_kernel(
    q, k, v, cos, sin, positions, k_cache, v_cache, k_scale, v_scale, slot_mapping, norm_q, norm_k, rows, q_out, k_out,
    num_read, num_mapped, q_stride, k_stride, v_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_HALF: tl.constexpr, LARGEST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_others(OVERLAP)
    # the first programs turn a row of q each, the others a row of k
    row = tl.program_id(0).to(tl.int64)
    if row < num_read:
        turn_query(row, q, norm_q, cos, sin, positions, rows, q_out, q_stride, eps, NUM_HEADS, DIM, BLOCK_H, BLOCK_HALF)
    else:
        turn_key(
            row - num_read, k, v, norm_k, cos, sin, positions, k_out, k_cache, v_cache, k_scale, v_scale, slot_mapping,
            num_mapped, k_stride, v_stride, eps, NUM_KV, DIM, BLOCK_KV, BLOCK_HALF, LARGEST,
        )  # fmt: skip


def launch_qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    rows: Tensor | None,
    scales: Scales | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    num_read, num_heads, head_dim = q.shape
    num_rows = k.shape[0]
    check_projected(q, k, v, k_cache, v_cache, scales)
    assert slot_mapping.dim() == 1 and slot_mapping.shape[0] <= num_rows and slot_mapping.is_contiguous()
    assert num_read == num_rows if rows is None else rows.shape == (num_read,) and rows.is_contiguous()
    check_rotation(cos, sin, positions, norms, num_rows, head_dim)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if num_read + num_rows == 0:
        return q_out, k_out
    _qk_norm_rope_store_kernel[(num_read + num_rows,)](
        q, k, v, cos, sin, positions, k_cache, v_cache, *(scales or (None, None)), slot_mapping, *norms, rows, q_out,
        k_out, num_read, slot_mapping.shape[0], q.stride(0), k.stride(0), v.stride(0), eps,
        **heads_options(num_heads, k_cache.shape[2], head_dim, k_cache.dtype), **overlap_options(q.device),
    )  # fmt: skip
    return q_out, k_out


def check_rotation(
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None],
    num_rows: int,
    head_dim: int,
) -> None:
    for each in (cos, sin):
        assert each.shape[1] == head_dim and each.dtype == torch.float32 and each.is_contiguous()
        assert each.shape[0] == num_rows or positions is not None
    assert positions is None or (positions.shape == (num_rows,) and positions.is_contiguous())
    for norm in norms:
        assert norm is None or (norm.shape == (head_dim,) and norm.is_contiguous())


def check_projected(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, scales: Scales | None) -> None:
    """Heads side by side, rows as far apart as they like: the parts of one fused projection."""
    for each in (q, k, v):
        assert each.stride()[1:] == (each.shape[2], 1) and each.dtype == q.dtype
    assert k.shape == v.shape and k.shape[1:] == k_cache.shape[2:] and q.shape[2] == k.shape[2] and k.shape[2] % 2 == 0
    check_pair(k_cache, v_cache, scales)


def heads_options(num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV": kv_heads,
        "DIM": head_dim,
        "BLOCK_H": next_power_of_2(num_heads),
        "BLOCK_KV": next_power_of_2(kv_heads),
        "BLOCK_HALF": next_power_of_2(head_dim // 2),
        "LARGEST": int(LARGEST.get(dtype, 0)),
    }


def _specimen(
    label: str, shape: tuple[int, int, int], normed: bool, rows: bool, cache: torch.dtype, overlap: bool = False
) -> Specimen:
    kinds = {torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv"}
    types: dict[str, str | None] = dict.fromkeys(("q", "k", "v", "q_out", "k_out"), "*bf16")
    types |= dict.fromkeys(("k_cache", "v_cache"), kinds.get(cache, "*bf16"))
    types |= dict.fromkeys(("k_scale", "v_scale"), "*fp32" if cache in kinds else None)
    types |= dict.fromkeys(("norm_q", "norm_k"), "*bf16" if normed else None)
    types |= {"cos": "*fp32", "sin": "*fp32", "slot_mapping": "*i64", "rows": "*i64" if rows else None, "eps": "fp32"}
    types |= {"positions": "*i64"}
    flags = {**heads_options(*shape, cache), "OVERLAP": overlap}
    types |= {"num_read": "i32", "num_mapped": "i32", "q_stride": "i32:16", "k_stride": "i32:16", "v_stride": "i32:16"}
    since = 90 if overlap else 89 if cache == torch.float8_e4m3fn else 80
    return Specimen(label, _qk_norm_rope_store_kernel, {**types, **flags}, since=since)


SPECIMENS = (
    _specimen("0.5B bf16", (14, 2, 64), False, False, torch.bfloat16),
    _specimen("0.5B bf16, overlapped", (14, 2, 64), False, False, torch.bfloat16, overlap=True),
    _specimen("7B bf16", (28, 4, 128), False, True, torch.bfloat16),
    _specimen("8B with norms, int8 KV", (32, 8, 128), True, False, torch.int8),
    _specimen("8B with norms, fp8 KV", (32, 8, 128), True, False, torch.float8_e4m3fn),
)
