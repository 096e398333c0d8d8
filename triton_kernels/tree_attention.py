"""Attention of text rows that stand in a tree behind a paged prefix.

    w_rj  = exp(q_r . k_j / sqrt(D))
    out_r = (sum_{j in prefix(r)} w_rj v_j + sum_{j in path(r)} w_rj v_j) / (the same sums of w_rj)

prefix(r) is the shared instruction and the first `visible` history positions of r's own sequence, path(r) the row's
ancestors in the tree and itself. Text is never in the paged cache: its keys and values come beside it.

The kernels: attention over spans of the prefix, where rows of a sequence share matrices and all share the
instruction's (`compressed_attention.py`); then each row alone merges its spans and walks its path, gathered by index.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.triton_kernels.compressed_attention import (
    SPAN,
    AttentionRows,
    Scales,
    check_own,
    fold_keys,
    gather_blocks,
    launch_spans,
    merge_spans,
    scatter_rows,
    shape_options,
    softmax_scale,
    with_ones,
)
from speeder_engine.triton_kernels.language import interpreted, next_power_of_2, on, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen

PATH_KEYS = 32  # at a time
ROWS_AT_ONCE = 256  # whose paths are gathered: [rows, P, H_kv, D] is the largest tensor here


@dataclass(frozen=True)
class TreeRows:
    """Where T text rows stand: `prefix` as for any row (none of them a candidate), `paths` among the text's keys."""

    prefix: AttentionRows
    paths: Tensor  # int64 [T, P]: indices of keys, -1 for none; at least one a row

    def select(self, rows: Tensor) -> "TreeRows":
        """The same sequences, these rows only."""
        return TreeRows(self.prefix.select(rows), self.paths[rows])


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: TreeRows,
    scales: Scales | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, H, D], the text's k and v [M, H_kv, D], rotated; caches [blocks, block_size, H_kv, D] -> [T, H, D],
    written into `out` where that is given. `scales` as of `compressed_attention`."""
    out = torch.empty_like(q) if out is None else out
    if runs_triton(q, k, v, k_cache, v_cache):
        with on(q.device):
            return launch_tree_attention(q, k, v, k_cache, v_cache, rows, scales, out)
    return out.copy_(tree_attention_ref(q, k, v, k_cache, v_cache, rows, scales))


def tree_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: TreeRows,
    scales: Scales | None = None,
) -> Tensor:
    """The formula above. In fp64 on the CPU whatever the inputs are: a path's length varies with the company of its
    row, and what that changes in the order of sums is rounded away again."""
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    queries = q.to(dtype) / math.sqrt(q.shape[-1])
    stored = list(zip((k_cache, v_cache), scales or (None, None), strict=True))
    prefix_top, prefix_sum = _prefix(queries, stored, rows.prefix)
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        path_top, path_sum = _path(queries[part], k, v, rows.paths[part])
        top = torch.maximum(prefix_top[part], path_top)
        total = (prefix_top[part] - top).exp() * prefix_sum[part] + (path_top - top).exp() * path_sum
        out[part] = (total[..., :-1] / total[..., -1:]).to(q.dtype)
    return out


def _prefix(queries: Tensor, stored: list[tuple[Tensor, Tensor | None]], rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """Largest logit [T, H, 1], and [T, H, D + 1]: values weighted by exp(logit - largest), and the sum of weights."""
    dtype, (_, num_heads, head_dim) = queries.dtype, queries.shape
    kv_heads = stored[0][0].shape[2]
    group = num_heads // kv_heads
    spread = scatter_rows(queries, rows)  # [S, R, H, D]
    sequences, length = spread.shape[:2]
    spread = spread.view(sequences, length, kv_heads, group, head_dim).transpose(1, 2).flatten(2, 3)
    keys, values = (gather_blocks(cache, rows.block_tables, dtype, scale) for cache, scale in stored)
    shared_keys, shared_values = (
        gather_blocks(cache, rows.shared_blocks[None], dtype, scale)[:, :, : rows.shared_len].expand(
            sequences, -1, -1, -1
        )
        for cache, scale in stored
    )
    visible = scatter_rows(rows.visible, rows).repeat_interleave(group, dim=1)[:, None, :, None]  # [S, 1, R * G, 1]
    hidden = torch.arange(keys.shape[2], device=keys.device) >= visible
    history = (spread @ keys.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    logits = torch.cat([spread @ shared_keys.transpose(2, 3), history], dim=-1)
    top = logits.amax(-1, keepdim=True)
    total = (logits - top).exp() @ with_ones(torch.cat([shared_values, values], dim=2))

    def flat(x: Tensor) -> Tensor:
        x = x.view(sequences, kv_heads, length, group, -1).transpose(1, 2).flatten(2, 3)
        return x[rows.sequence, rows.local]

    return flat(top), flat(total)


def _path(queries: Tensor, k: Tensor, v: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """The same over each row's path [T, P]."""
    dtype, (num_rows, num_heads, head_dim) = queries.dtype, queries.shape
    kv_heads = k.shape[1]
    keys, values = (x[paths.clamp(min=0)].to(dtype).transpose(1, 2) for x in (k, v))  # [T, H_kv, P, D]
    grouped = queries.view(num_rows, kv_heads, num_heads // kv_heads, head_dim)
    logits = (grouped @ keys.transpose(2, 3)).masked_fill((paths < 0)[:, None, None], float("-inf"))
    top = logits.amax(-1, keepdim=True)
    total = (logits - top).exp() @ with_ones(values)
    return top.flatten(1, 2), total.flatten(1, 2)


@triton.jit(do_not_specialize=["num_rows", "path_len", "num_shared", "num_spans"])
def _tree_attention_kernel(
    q, k, v, partial, lse, out, visible, paths, num_rows, path_len, num_shared, num_spans, k_stride, v_stride, scale,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    KEYS: tl.constexpr, SPAN: tl.constexpr, WIDE: tl.constexpr,
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
    if WIDE:
        queries = queries.to(tl.float32)
    start = kv_head * 0
    while start < path_len:
        step = start + tl.arange(0, KEYS)
        key = tl.load(paths + row * path_len + step, mask=step < path_len, other=-1).to(tl.int64)
        inside = (key >= 0)[:, None] & (dim < DIM)[None, :]
        beside = kv_head * DIM + dim[None, :]
        keys = tl.load(k + key[:, None] * k_stride + beside, mask=inside, other=0.0).to(queries.dtype)
        values = tl.load(v + key[:, None] * v_stride + beside, mask=inside, other=0.0).to(queries.dtype)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where((key >= 0)[None, :], logits, float("-inf"))
        acc, top, total = fold_keys(acc, top, total, logits, values, None)
        start += KEYS
    total = tl.where(live, total, 1.0)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)


def launch_tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: TreeRows,
    scales: Scales | None,
    out: Tensor,
) -> Tensor:
    num_rows, num_heads, head_dim = q.shape
    check_own(k, v, k_cache)
    assert k.shape == v.shape and k.dtype == v.dtype == q.dtype
    assert rows.paths.shape[0] == num_rows and rows.paths.is_contiguous()
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    if num_rows == 0:
        return out
    spans = launch_spans(q, k_cache, v_cache, rows.prefix, scales)
    options = path_options(num_heads, k_cache)
    _tree_attention_kernel[(num_rows, k_cache.shape[2])](
        q, k, v, spans.partial, spans.lse, out, rows.prefix.visible, rows.paths, num_rows, rows.paths.shape[1],
        spans.num_shared, spans.partial.shape[0], k.stride(0), v.stride(0), softmax_scale(head_dim), **options,
        SPAN=spans.length, WIDE=interpreted(q),
    )  # fmt: skip
    return out


def path_options(num_heads: int, k_cache: Tensor) -> dict[str, int]:
    shape = shape_options(num_heads, k_cache)
    del shape["BLOCK_SIZE"]
    # tl.dot wants 16 rows at least
    return {**shape, "BLOCK_G": max(next_power_of_2(shape["GROUP"]), 16), "KEYS": PATH_KEYS}


def _specimen(label: str, num_heads: int, kv_heads: int, head_dim: int) -> Specimen:
    types = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | {"partial": "*fp32", "lse": "*fp32", "scale": "fp32"}
    types |= {"visible": "*i64", "paths": "*i64", "k_stride": "i32:16", "v_stride": "i32:16"}
    types |= dict.fromkeys(("num_rows", "path_len", "num_shared", "num_spans"), "i32")
    options = path_options(num_heads, torch.empty(0, 16, kv_heads, head_dim, device="meta"))
    return Specimen(label, _tree_attention_kernel, {**types, **options, "SPAN": SPAN, "WIDE": False})


SPECIMENS = (_specimen("0.5B bf16", 14, 2, 64), _specimen("7B bf16", 28, 4, 128))
