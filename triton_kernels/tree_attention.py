"""Attention of text rows that stand in a tree behind a paged prefix.

    w_rj  = exp(q_r . k_j / sqrt(D))
    out_r = (sum_{j in prefix(r)} w_rj v_j + sum_{j in path(r)} w_rj v_j) / (the same sums of w_rj)

prefix(r) is the shared instruction and the first `visible` history positions of r's own sequence, path(r) the row's
ancestors in the tree and itself. Text is never in the paged cache: its keys and values come beside it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.triton_kernels.compressed_attention import AttentionRows, gather_blocks, scatter_rows, with_ones

ROWS_AT_ONCE = 256  # whose paths are gathered: [rows, P, H_kv, D] is the largest tensor here


@dataclass(frozen=True)
class TreeRows:
    """Where T text rows stand: `prefix` as for any row (none of them a candidate), `paths` among the text's keys."""

    prefix: AttentionRows
    paths: Tensor  # int64 [T, P]: indices of keys, -1 for none; at least one a row

    def select(self, rows: Tensor) -> "TreeRows":
        """The same sequences, these rows only."""
        return TreeRows(self.prefix.select(rows), self.paths[rows])


def tree_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: TreeRows) -> Tensor:
    """q [T, H, D], the text's k and v [M, H_kv, D], rotated; caches [blocks, block_size, H_kv, D] -> [T, H, D].

    Runs the torch reference on every device.
    """
    return tree_attention_ref(q, k, v, k_cache, v_cache, rows)


def tree_attention_ref(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: TreeRows) -> Tensor:
    """The formula above. In fp64 on the CPU whatever the inputs are: a path's length varies with the company of its
    row, and what that changes in the order of sums is rounded away again."""
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    queries = q.to(dtype) / math.sqrt(q.shape[-1])
    prefix_top, prefix_sum = _prefix(queries, k_cache, v_cache, rows.prefix)
    out = torch.empty_like(q)
    for start in range(0, q.shape[0], ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        path_top, path_sum = _path(queries[part], k, v, rows.paths[part])
        top = torch.maximum(prefix_top[part], path_top)
        total = (prefix_top[part] - top).exp() * prefix_sum[part] + (path_top - top).exp() * path_sum
        out[part] = (total[..., :-1] / total[..., -1:]).to(q.dtype)
    return out


def _prefix(queries: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows) -> tuple[Tensor, Tensor]:
    """Largest logit [T, H, 1], and [T, H, D + 1]: values weighted by exp(logit - largest), and the sum of weights."""
    dtype, (_, num_heads, head_dim) = queries.dtype, queries.shape
    kv_heads = k_cache.shape[2]
    group = num_heads // kv_heads
    spread = scatter_rows(queries, rows)  # [S, R, H, D]
    sequences, length = spread.shape[:2]
    spread = spread.view(sequences, length, kv_heads, group, head_dim).transpose(1, 2).flatten(2, 3)
    keys, values = (gather_blocks(cache, rows.block_tables, dtype) for cache in (k_cache, v_cache))  # [S, H_kv, N, D]
    shared_keys, shared_values = (
        gather_blocks(cache, rows.shared_blocks[None], dtype)[:, :, : rows.shared_len].expand(sequences, -1, -1, -1)
        for cache in (k_cache, v_cache)
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
