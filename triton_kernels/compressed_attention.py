"""Attention of compressed-token rows over a paged cache.

    w_rj  = exp(q_r . k_j / sqrt(D))
    out_r = (sum_{j in prefix(r)} w_rj v_j + w_rr v_r) / (sum_{j in prefix(r)} w_rj + w_rr)

prefix(r) is the shared instruction and the first `visible` history positions of r's own sequence. A new history row
has been stored before the call and stands in its prefix; a candidate row is not stored: its own key is folded into
the softmax, so that candidates never see one another and no mask exists.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionRows:
    """Where rows stand. Sequences are padded to the same number of rows and keys, both fixed multiples of a tile, so
    that a row's arithmetic does not depend on its company."""

    sequence: Tensor  # int64 [N]: which sequence a row belongs to
    local: Tensor  # int64 [N]: its index among its sequence's rows
    visible: Tensor  # int64 [N]: history positions it sees
    candidate: Tensor  # bool [N]: its own key is folded in
    rows_per_sequence: int  # largest local index + 1, rounded up to the tile
    block_tables: Tensor  # int64 [B, blocks]: each sequence's history blocks, 0 where unused
    shared_blocks: Tensor  # int64 [blocks]: the instruction's
    shared_len: int

    def select(self, rows: Tensor) -> "AttentionRows":
        """The same sequences, these rows only."""
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
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows
) -> Tensor:
    """q [N, H, D], k and v [N, H_kv, D] of the same rows, rotated; caches [blocks, block_size, H_kv, D] -> [N, H, D].

    Runs the torch reference on every device.
    """
    return compressed_attention_ref(q, k, v, k_cache, v_cache, rows)


def compressed_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: AttentionRows
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

    keys, values = (gather_blocks(cache, rows.block_tables, dtype) for cache in (k_cache, v_cache))  # [B, H_kv, S, D]
    shared_keys, shared_values = (
        gather_blocks(cache, rows.shared_blocks[None], dtype)[:, :, : rows.shared_len] for cache in (k_cache, v_cache)
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


def gather_blocks(cache: Tensor, tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [blocks, block_size, H_kv, D] by tables [B, n] -> [B, H_kv, n * block_size, D]."""
    return cache[tables].flatten(1, 2).permute(0, 2, 1, 3).to(dtype)


def with_ones(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
