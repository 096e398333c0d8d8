"""Attention of compressed-token rows over a paged cache.

    w_rj  = exp(q_r . k_j / sqrt(D))
    out_r = (sum_{j in prefix(r)} w_rj v_j + w_rr v_r) / (sum_{j in prefix(r)} w_rj + w_rr)

prefix(r) is the shared instruction and the first `visible` history positions of r's own sequence. A new history row
has been stored before the call and stands in its prefix; a candidate row is not stored: its own key is folded into
the softmax, so that candidates never see one another and no mask exists.

The kernels lay a few rows of one sequence, times the query heads of one key head, into the rows of a matrix: 22 rows in
groups of 7 are six matrices of 4 x 7 rows. Which rows, how many keys at a time and how the prefix is cut is fixed for a
model: no row's arithmetic depends on its company.

- Up to ONE_PASS_KEYS keys (instruction and a whole window), one kernel walks the instruction with the history right
  behind it, as if they were one, and the row's own key. Every matrix reads the instruction again, but from the L2
  cache, where a layer's few dozen keys stay; laying the rows of all sequences into common matrices would save that, and
  would cost a second launch and partial results in fp32, which are more bytes than the instruction's.
- Beyond it the prefix is cut into spans of SPAN keys, each its own program (few rows alone would leave most of a GPU
  idle). A span of the instruction takes rows of whatever sequences into one matrix, once for the whole batch. Then
  one small kernel merges the spans by their log-sum-exp and folds the own key in.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from speeder_engine.triton_kernels.specimen import Specimen

BLOCK_M = 32  # rows of a matrix: more of them, by 128 columns, don't fit into the registers of four warps
KEYS = 64  # at a time: an instruction and a history are often no longer, and read in one round of loads then
WIDE_KEYS = 32  # of heads beyond 64: 64 keys of those don't fit into the registers
SPAN = 256  # keys of one program, where the prefix is cut
ONE_PASS_KEYS = 512
QUANTIZED = (torch.int8, torch.float8_e4m3fn)  # what a cache may hold beside the model's own type

Scales = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionRows:
    """Where rows stand, by sequence and then by `local`. Sequences are padded to the same number of rows and keys, both
    fixed multiples of a tile, so that a row's arithmetic does not depend on its company."""

    sequence: Tensor  # int64 [N]: which sequence a row belongs to
    local: Tensor  # int64 [N]: its index among its sequence's rows
    visible: Tensor  # int64 [N]: history positions it sees
    candidate: Tensor  # bool [N]: its own key is folded in
    rows_per_sequence: int  # largest local index + 1, rounded up to the tile
    block_tables: Tensor  # int64 [B, blocks]: each sequence's history blocks, 0 where unused
    shared_blocks: Tensor  # int64 [blocks]: the instruction's
    shared_len: int

    def select(self, rows: Tensor) -> "AttentionRows":
        """The same sequences, these rows only, in ascending order."""
        return AttentionRows(
            self.sequence[rows],
            self.local[rows],
            self.visible[rows],
            self.candidate[rows],
            self.rows_per_sequence,
            self.block_tables,
            self.shared_blocks,
            self.shared_len,
        )


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    scales: Scales | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [N, H, D], k and v [N, H_kv, D] of the same rows, rotated; caches [blocks, block_size, H_kv, D] -> [N, H, D],
    written into `out` where that is given.

    scales: fp32 [blocks, block_size, H_kv] of an int8 or fp8 cache's keys and of its values, which they multiply.
    """
    out = torch.empty_like(q) if out is None else out
    if runs_triton(q, k, v, k_cache, v_cache):
        with on(q.device):
            return launch_compressed_attention(q, k, v, k_cache, v_cache, rows, scales, out)
    return out.copy_(compressed_attention_ref(q, k, v, k_cache, v_cache, rows, scales))


def compressed_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    scales: Scales | None = None,
) -> Tensor:
    """The formula above, batched over sequences and key/value heads.

    On the CPU in fp64 whatever the inputs are: matrix libraries sum in an order that depends on where in a tile a row
    stands, and what that changes is rounded away again. From fp32 to bf16 it would not be: once in some ten thousand
    rows a sum lies so near to the border between two values that its order decides.
    """
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    _, num_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = num_heads // kv_heads
    queries = scatter_rows(q.to(dtype) / math.sqrt(head_dim), rows)  # [B, R, H, D]
    batch, length = queries.shape[:2]
    queries = queries.view(batch, length, kv_heads, group, head_dim).permute(0, 2, 1, 3, 4)
    queries = queries.reshape(batch, kv_heads, length * group, head_dim)

    stored = list(zip((k_cache, v_cache), scales or (None, None), strict=True))
    keys, values = (gather_blocks(cache, rows.block_tables, dtype, scale) for cache, scale in stored)
    shared_keys, shared_values = (
        gather_blocks(cache, rows.shared_blocks[None], dtype, scale)[:, :, : rows.shared_len] for cache, scale in stored
    )
    own_keys = scatter_rows(k.to(dtype), rows).permute(0, 2, 1, 3).repeat_interleave(group, dim=2)
    own_values = scatter_rows(v.to(dtype), rows).permute(0, 2, 1, 3).repeat_interleave(group, dim=2)
    own = (queries * own_keys).sum(-1, keepdim=True)
    visible = scatter_rows(rows.visible, rows).repeat_interleave(group, dim=1)[:, None, :, None]  # [B, 1, R * G, 1]
    folded = scatter_rows(rows.candidate, rows).repeat_interleave(group, dim=1)[:, None, :, None]

    hidden = torch.arange(keys.shape[2], device=q.device) >= visible
    history = (queries @ keys.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    shared = queries @ shared_keys.transpose(2, 3)
    own = own.masked_fill(~folded, float("-inf"))
    top = torch.maximum(torch.maximum(history.amax(-1, True), shared.amax(-1, True)), own)
    history, shared, own = (history - top).exp(), (shared - top).exp(), (own - top).exp()

    # a column of ones sums the weights inside the same product
    total = history @ with_ones(values) + shared @ with_ones(shared_values)
    out = (total[..., :-1] + own * own_values) / (total[..., -1:] + own)
    out = out.view(batch, kv_heads, length, group, head_dim).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, length, num_heads, head_dim)[rows.sequence, rows.local].to(q.dtype)


def scatter_rows(flat: Tensor, rows: AttentionRows) -> Tensor:
    """[N, ...] -> [B, R, ...], zero where a sequence has fewer rows."""
    padded = flat.new_zeros(rows.block_tables.shape[0], rows.rows_per_sequence, *flat.shape[1:])
    padded[rows.sequence, rows.local] = flat
    return padded


def gather_blocks(cache: Tensor, tables: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Blocks [blocks, block_size, H_kv, D] by tables [B, n] -> [B, H_kv, n * block_size, D]."""
    if scale is None:
        return cache[tables].flatten(1, 2).permute(0, 2, 1, 3).to(dtype)
    # bytes: torch gathers no fp8
    blocks = cache.view(torch.int8)[tables].view(cache.dtype).to(dtype) * scale[tables].unsqueeze(-1).to(dtype)
    return blocks.flatten(1, 2).permute(0, 2, 1, 3)


def with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)


@triton.jit
def tile_of_sequence(first, row, inside, sequence, local, TILE_ROWS: tl.constexpr):
    """Whether a tile begins at the row `first`, its sequence, and which of `row` [M] belong to it: rows of one sequence
    whose indices fall into the same TILE_ROWS."""
    own = tl.load(sequence + first)
    tile = tl.load(local + first) // TILE_ROWS
    before = tl.maximum(first - 1, 0)
    continues = (tl.load(sequence + before) == own) & (tl.load(local + before) // TILE_ROWS == tile) & (first > 0)
    theirs = tl.load(sequence + row, mask=inside, other=-1) == own
    return continues == 0, own, inside & theirs & (tl.load(local + row, mask=inside, other=-1) // TILE_ROWS == tile)


@triton.jit
def fold_keys(acc, top, total, logits, values, value_scale):
    """One step of a softmax in base 2: logits [M, K], -inf where nothing is seen, weigh values [K, D]."""
    reached = tl.maximum(top, tl.max(logits, axis=1))
    # a row that has seen nothing yet: -inf less -inf is no number
    against = tl.where(reached == float("-inf"), 0.0, reached)
    weights = tl.exp2(logits - against[:, None])
    decay = tl.exp2(top - against)
    total = total * decay + tl.sum(weights, axis=1)
    if value_scale is not None:
        weights = weights * value_scale[None, :]
    acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, reached, total


@triton.jit
def attend_blocks(
    acc, top, total, queries, k_cache, v_cache, k_scale, v_scale, shared, table, shared_len, kv_head, start, end, limit,
    scale, NUM_KV: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Folds the positions start..end of a prefix in, `shared_len` in the block table `shared` and the rest in `table`;
    matrix row m sees those below limit[m]."""
    dim = tl.arange(0, acc.shape[1])
    while start < end:
        position = start + tl.arange(0, KEYS)
        valid = position < end
        common = position < shared_len
        place = tl.where(common, position, position - shared_len)
        # neither waits for the other
        block = tl.load(shared + place // BLOCK_SIZE, mask=valid & common, other=0)
        block += tl.load(table + place // BLOCK_SIZE, mask=valid & (common == 0), other=0)
        slot = (block.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE) * NUM_KV + kv_head
        at = slot[:, None] * DIM + dim[None, :]
        inside = valid[:, None] & (dim < DIM)[None, :]
        keys = tl.load(k_cache + at, mask=inside, other=0.0).to(queries.dtype)
        values = tl.load(v_cache + at, mask=inside, other=0.0).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        value_scale = None
        if k_scale is not None:
            logits = logits * tl.load(k_scale + slot, mask=valid, other=0.0)[None, :]
            value_scale = tl.load(v_scale + slot, mask=valid, other=0.0)
        logits = tl.where(valid[None, :] & (position[None, :] < limit[:, None]), logits, float("-inf"))
        acc, top, total = fold_keys(acc, top, total, logits, values, value_scale)
        start += KEYS
    return acc, top, total


@triton.jit
def fold_own(acc, top, total, queries, k, v, folded, scale, DIM: tl.constexpr):
    """Folds one key a matrix row in, behind pointers k[m] and v[m], where folded[m]."""
    dim = tl.arange(0, acc.shape[1])
    inside = folded[:, None] & (dim < DIM)[None, :]
    keys = tl.load(k[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(queries.to(tl.float32) * keys, axis=1) * scale
    logit = tl.where(folded, logit, float("-inf"))
    reached = tl.maximum(top, logit)
    against = tl.where(reached == float("-inf"), 0.0, reached)
    decay, weight = tl.exp2(top - against), tl.exp2(logit - against)
    values = tl.load(v[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    return acc * decay[:, None] + weight[:, None] * values, total * decay + weight


@triton.jit
def merge_spans(
    acc, top, total, partial, lse, row, head, live, seen, num_rows, num_shared, num_spans,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Folds the spans of one row in, those that hold anything it sees; acc [M, D] are its query heads."""
    dim = tl.arange(0, acc.shape[1])
    span = 0
    while span < num_spans:
        full = live & ((span < num_shared) | ((span - num_shared) * SPAN < seen))
        at = (span * num_rows + row) * NUM_HEADS + head
        part_lse = tl.load(lse + at, mask=full, other=float("-inf"))
        inside = full[:, None] & (dim < DIM)[None, :]
        part = tl.load(partial + at[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        reached = tl.maximum(top, part_lse)
        against = tl.where(reached == float("-inf"), 0.0, reached)
        decay, weight = tl.exp2(top - against), tl.exp2(part_lse - against)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = reached
        span += 1
    return acc, top, total


@triton.jit(do_not_specialize=["num_rows", "table_width", "shared_len"])
def _one_pass_kernel(
    q, k, v, k_cache, v_cache, k_scale, v_scale, out, sequence, local, visible, candidate, tables, shared,
    num_rows, table_width, shared_len, k_stride, v_stride, scale,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    first, kv_head = tl.program_id(0), tl.program_id(1)
    member, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    row = first + member // GROUP
    inside = (member < TILE_ROWS * GROUP) & (row < num_rows)
    # where rows stand, and what they see, was sent before the pass
    begins, own, live = tile_of_sequence(first, row, inside, sequence, local, TILE_ROWS)
    limit = tl.load(visible + row, mask=live, other=0).to(tl.int32) + shared_len
    folded = tl.load(candidate + row, mask=live, other=0) != 0
    await_others(OVERLAP)
    if begins:
        origin = first * 0  # a loop can't count on from a literal
        wide_row = row.to(tl.int64)
        at = ((wide_row * NUM_KV + kv_head) * GROUP + member % GROUP)[:, None] * DIM + dim[None, :]
        there = live[:, None] & (dim < DIM)[None, :]
        queries = tl.load(q + at, mask=there, other=0.0)
        if WIDE:
            queries = queries.to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc, top, total = attend_blocks(
            acc, top, total, queries, k_cache, v_cache, k_scale, v_scale, shared, tables + own * table_width,
            shared_len, kv_head, origin, tl.max(limit, axis=0), limit, scale, NUM_KV, DIM, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        own_k, own_v = k + wide_row * k_stride + kv_head * DIM, v + wide_row * v_stride + kv_head * DIM
        acc, total = fold_own(acc, top, total, queries, own_k, own_v, folded, scale, DIM)
        tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows", "table_width", "shared_len", "num_shared"])
def _span_kernel(
    q, k_cache, v_cache, k_scale, v_scale, partial, lse, sequence, local, visible, tables, shared,
    num_rows, table_width, shared_len, num_shared, scale,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first, kv_head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    row = first + member // GROUP
    inside = (member < TILE_ROWS * GROUP) & (row < num_rows)
    begins, own, live = tile_of_sequence(first, row, inside, sequence, local, TILE_ROWS)
    seen = tl.load(visible + row, mask=live, other=0).to(tl.int32)
    limit = seen + shared_len
    start, end = shared_len + (span - num_shared) * SPAN, tl.max(limit, axis=0)
    if span < num_shared:
        # of the instruction: rows of whatever sequences
        begins, live = first % TILE_ROWS == 0, inside
        start, end = span * SPAN, shared_len
    if begins & (start < end):
        at = ((row.to(tl.int64) * NUM_KV + kv_head) * GROUP + member % GROUP)[:, None] * DIM + dim[None, :]
        there = live[:, None] & (dim < DIM)[None, :]
        queries = tl.load(q + at, mask=there, other=0.0)
        if WIDE:
            queries = queries.to(tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc, top, total = attend_blocks(
            acc, top, total, queries, k_cache, v_cache, k_scale, v_scale, shared, tables + own * table_width,
            shared_len, kv_head, start, tl.minimum(start + SPAN, end), limit, scale, NUM_KV, DIM, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        at = (span.to(tl.int64) * num_rows + row) * (NUM_KV * GROUP) + kv_head * GROUP + member % GROUP
        # a row that sees nothing of this span is not asked for it
        live = live & (total > 0)
        total = tl.where(live, total, 1.0)
        tl.store(lse + at, top + tl.log2(total), mask=live)
        there = live[:, None] & (dim < DIM)[None, :]
        tl.store(partial + at[:, None] * DIM + dim[None, :], acc / total[:, None], mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_shared", "num_spans"])
def _merge_kernel(
    q, k, v, partial, lse, out, visible, candidate, num_rows, num_shared, num_spans, k_stride, v_stride, scale,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, dim = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_DIM)
    live = member < GROUP
    head = kv_head * GROUP + member
    acc = tl.zeros([BLOCK_G, BLOCK_DIM], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc, top, total = merge_spans(
        acc, top, total, partial, lse, row, head, live, tl.load(visible + row).to(tl.int32), num_rows, num_shared,
        num_spans, NUM_KV * GROUP, DIM, SPAN,
    )  # fmt: skip
    at = (row * (NUM_KV * GROUP) + head)[:, None] * DIM + dim[None, :]
    there = live[:, None] & (dim < DIM)[None, :]
    queries = tl.load(q + at, mask=there, other=0.0)
    folded = live & (tl.load(candidate + row) != 0)
    own_k, own_v = k + row * k_stride + (member * 0 + kv_head) * DIM, v + row * v_stride + (member * 0 + kv_head) * DIM
    acc, total = fold_own(acc, top, total, queries, own_k, own_v, folded, scale, DIM)
    total = tl.where(live, total, 1.0)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)


def launch_compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: AttentionRows,
    scales: Scales | None,
    out: Tensor,
) -> Tensor:
    num_rows, num_heads, head_dim = q.shape
    shape = shape_options(num_heads, k_cache)
    check_caches(q, k_cache, v_cache, rows, scales)
    check_own(k, v, k_cache)
    assert k.shape[0] == v.shape[0] == num_rows and rows.candidate.shape == (num_rows,)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    if num_rows == 0:
        return out
    scale, strides = softmax_scale(head_dim), (k.stride(0), v.stride(0))
    if rows.shared_len + rows.block_tables.shape[1] * k_cache.shape[1] > ONE_PASS_KEYS:
        spans = launch_spans(q, k_cache, v_cache, rows, scales)
        shape = {name: shape[name] for name in ("NUM_KV", "GROUP", "DIM", "BLOCK_DIM")}
        _merge_kernel[(num_rows, shape["NUM_KV"])](
            q, k, v, spans.partial, spans.lse, out, rows.visible, rows.candidate, num_rows, spans.num_shared,
            spans.partial.shape[0], *strides, scale, **shape, BLOCK_G=next_power_of_2(shape["GROUP"]),
            SPAN=spans.length, num_warps=2,
        )  # fmt: skip
        return out
    _one_pass_kernel[(num_rows, shape["NUM_KV"])](
        q, k, v, k_cache, v_cache, *(scales or (None, None)), out, rows.sequence, rows.local, rows.visible,
        rows.candidate, rows.block_tables, rows.shared_blocks, num_rows, rows.block_tables.shape[1], rows.shared_len,
        *strides, scale, **shape, **tile_options(shape), WIDE=interpreted(q), **overlap_options(q.device),
    )  # fmt: skip
    return out


class Spans(NamedTuple):
    """Attention over each span of the prefix alone; not written where a row sees nothing of it."""

    partial: Tensor  # fp32 [spans, N, H, D]
    lse: Tensor  # fp32 [spans, N, H]: log2-sum-exp
    num_shared: int  # the first ones are the instruction's
    length: int  # in keys


def launch_spans(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, scales: Scales | None = None
) -> Spans:
    num_rows, num_heads, head_dim = q.shape
    shape, tables = shape_options(num_heads, k_cache), rows.block_tables
    check_caches(q, k_cache, v_cache, rows, scales)
    num_shared = triton.cdiv(rows.shared_len, SPAN)
    num_spans = num_shared + triton.cdiv(tables.shape[1] * k_cache.shape[1], SPAN)
    partial = torch.empty(num_spans, num_rows, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_spans, num_rows, num_heads, dtype=torch.float32, device=q.device)
    _span_kernel[(num_rows, shape["NUM_KV"], num_spans)](
        q, k_cache, v_cache, *(scales or (None, None)), partial, lse, rows.sequence, rows.local, rows.visible, tables,
        rows.shared_blocks, num_rows, tables.shape[1], rows.shared_len, num_shared, softmax_scale(head_dim),
        **shape, **tile_options(shape), SPAN=SPAN, WIDE=interpreted(q),
    )  # fmt: skip
    return Spans(partial, lse, num_shared, SPAN)


def softmax_scale(head_dim: int) -> float:
    """On logits in base 2."""
    return math.log2(math.e) / math.sqrt(head_dim)


def shape_options(num_heads: int, k_cache: Tensor) -> dict[str, int]:
    _, block_size, kv_heads, head_dim = k_cache.shape
    # tl.dot wants 16 columns at least
    block_dim = max(next_power_of_2(head_dim), 16)
    return {
        "NUM_KV": kv_heads,
        "GROUP": num_heads // kv_heads,
        "DIM": head_dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_SIZE": block_size,
    }


def tile_options(shape: dict[str, int]) -> dict[str, int]:
    """A tile is a fixed number of rows, each with the query heads of one key head."""
    wide, keys = next_power_of_2(shape["GROUP"]), WIDE_KEYS if shape["BLOCK_DIM"] > 64 else KEYS
    return {"BLOCK_M": max(wide, BLOCK_M), "TILE_ROWS": max(BLOCK_M // wide, 1), "KEYS": keys}


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows, scales: Scales | None) -> None:
    """What every kernel over a paged prefix relies on."""
    num_rows, num_heads, head_dim = q.shape
    assert q.is_contiguous() and num_heads % k_cache.shape[2] == 0 and head_dim == k_cache.shape[3]
    check_pair(k_cache, v_cache, scales)
    assert scales is not None or k_cache.dtype == q.dtype
    for each in (rows.sequence, rows.local, rows.visible):
        assert each.shape == (num_rows,) and each.is_contiguous()
    assert rows.block_tables.is_contiguous() and rows.shared_blocks.is_contiguous()
    assert 0 < rows.shared_len <= rows.shared_blocks.shape[0] * k_cache.shape[1]


def check_pair(k_cache: Tensor, v_cache: Tensor, scales: Scales | None) -> None:
    """A cache's tensors, and their scales where they are 8-bit."""
    assert k_cache.shape == v_cache.shape and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert k_cache.dtype == v_cache.dtype and (k_cache.dtype in QUANTIZED) == (scales is not None)
    for each in scales or ():
        assert each.shape == k_cache.shape[:3] and each.dtype == torch.float32 and each.is_contiguous()


def check_own(k: Tensor, v: Tensor, k_cache: Tensor) -> None:
    """Keys and values beside the cache: heads side by side, rows as far apart as they like."""
    for each in (k, v):
        assert each.shape[1:] == k_cache.shape[2:] and each.stride()[1:] == (each.shape[2], 1)


def _types(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def _shape(num_heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return shape_options(num_heads, torch.empty(0, 16, kv_heads, head_dim, device="meta"))


def _specimens() -> tuple[Specimen, ...]:
    ints = _types("sequence local visible tables shared", "*i64")
    sizes = _types("num_rows table_width shared_len", "i32")
    plain: dict[str, Any] = {"k_scale": None, "v_scale": None, **_types("k_cache v_cache", "*bf16")}
    found = []
    for label, heads, cache, since in (
        ("0.5B bf16", (14, 2, 64), plain, 80),
        ("7B bf16", (28, 4, 128), plain, 80),
        ("7B int8 KV", (28, 4, 128), _types("k_cache v_cache", "*i8") | _types("k_scale v_scale", "*fp32"), 80),
        ("7B fp8 KV", (28, 4, 128), _types("k_cache v_cache", "*fp8e4nv") | _types("k_scale v_scale", "*fp32"), 89),
    ):
        shape = _shape(*heads)
        common = {**ints, **sizes, **cache, "scale": "fp32", **shape, **tile_options(shape), "WIDE": False}
        rows = {**_types("q k v out", "*bf16"), "candidate": "*i1", **_types("k_stride v_stride", "i32:16")}
        found.append(Specimen(label, _one_pass_kernel, {**common, **rows, "OVERLAP": False}, since=since))
        if cache is plain:
            overlapped = {**common, **rows, "OVERLAP": True}
            found.append(Specimen(f"{label}, overlapped", _one_pass_kernel, overlapped, since=90))
        spans = {"q": "*bf16", **_types("partial lse", "*fp32"), "num_shared": "i32", "SPAN": SPAN}
        found.append(Specimen(label, _span_kernel, {**common, **spans}, since=since))
    shape = {name: value for name, value in _shape(28, 4, 128).items() if name != "BLOCK_SIZE"}
    merge = {
        **_types("q k v out", "*bf16"), **_types("partial lse", "*fp32"), "visible": "*i64", "candidate": "*i1",
        **_types("num_rows num_shared num_spans", "i32"), **_types("k_stride v_stride", "i32:16"), "scale": "fp32",
        **shape, "BLOCK_G": next_power_of_2(shape["GROUP"]), "SPAN": SPAN,
    }  # fmt: skip
    return (*found, Specimen("7B bf16", _merge_kernel, merge, num_warps=2))


SPECIMENS = _specimens()
