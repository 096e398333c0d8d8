"""Attention inside an exported graph: history rows are causal, candidates see the history and themselves.

Both flavours answer the same. `DenseAttend` is made of plain operators. `GroupQueryAttend` gives the history rows to
com.microsoft::GroupQueryAttention, which writes a returning user's keys and values into the buffers it is given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.models.decoder import DecoderLayer
from speeder_engine.triton_kernels.qk_norm_rope_store import rotate

LayerPairs = list[tuple[Tensor, Tensor]]  # a layer's keys and values


@dataclass(frozen=True)
class GraphRows:
    """T history rows, then C candidates, of each of B sequences."""

    batch: int
    num_history: int  # T
    num_candidates: int  # C
    slots: Tensor  # int64 [B, T + C]
    lengths: Tensor  # int64 [B] history positions that exist, past ones included
    last: Tensor  # int64 [B] which of the T rows is h(last)'s; 0 where there is none
    past_lengths: Tensor | None = None  # int64 [B]; None: nothing is past
    past: LayerPairs = field(default_factory=list)

    def read(self, rows: Tensor) -> Tensor:
        """[B, T + C, ...] -> [B, 1 + C, ...]: what a head reads, the last of the history and the candidates."""
        last = rows[torch.arange(self.batch), self.last].unsqueeze(1)
        return torch.cat([last, rows[:, self.num_history :]], dim=1) if self.num_candidates else last


class DenseAttend:
    """Plain operators. `instruction`: keys and values [H_kv, m, D] of every layer, rotated; they stand before slot 0.

    Collects every layer's `present`: past and new keys and values [B, H_kv, P + T, D], without gaps.
    """

    def __init__(
        self, rows: GraphRows, instruction: LayerPairs, cos: Tensor, sin: Tensor, has_operator: bool = False
    ) -> None:
        """cos, sin [B, T + C, D]; has_operator: attention is one operator of the opset."""
        self.rows, self.instruction = rows, instruction
        self.cos, self.sin = cos, sin
        self.has_operator = has_operator
        self.present: LayerPairs = []
        self._shared: dict[str, Tensor] = {}  # what every layer reads and none changes: traced once

    def __call__(self, index: int, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, only_read: bool) -> Tensor:
        """q [B, T + C, H, D], k and v [B, T + C, H_kv, D] -> [B, T + C, H, D], or [B, 1 + C, H, D] of what is read."""
        q, k = self._rotate(layer.norm_q(q)), self._rotate(layer.norm_k(k))
        q = self.rows.read(q) if only_read else q
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        num_new, num_queries = self.rows.num_history, 1 if only_read else self.rows.num_history
        keys, values, out = self._history(index, q[:, :, :num_queries], k[:, :, :num_new], v[:, :, :num_new])
        if self.rows.num_candidates:
            own = k[:, :, num_new:], v[:, :, num_new:]
            hidden = self._once("behind the end", lambda: ~self._exists(keys.shape[2])[:, None, None])
            isolated = isolated_attention(q[:, :, num_queries:], *own, keys, values, hidden)
            out = torch.cat([out, isolated], dim=2)
        return out.transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x.float(), self.cos, self.sin).to(x.dtype)

    def _history(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, H_kv, S, D] of everything a candidate may see, and the history rows' own result."""
        self.present.append((self._merge(k, self._past(index, 0)), self._merge(v, self._past(index, 1))))
        keys, values = (self._behind_instruction(index, part) for part in (0, 1))
        one, group = q.shape[2] == 1, q.shape[1] // keys.shape[1]
        which = "the last row's" if one else "all rows'"
        if self.has_operator:
            mask = self._once(f"{which} keys", lambda: self._visible(keys.shape[2], one).unsqueeze(1))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=group > 1)
            return keys, values, out
        hidden = self._once(
            f"not {which} keys", lambda: ~self._visible(keys.shape[2], one).unsqueeze(1).repeat(1, 1, group, 1)
        )
        return keys, values, grouped_attention(q, keys, values, hidden)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def _visible(self, num_keys: int, of_last: bool) -> Tensor:
        """bool [B, T, S], or [B, 1, S] of the last row: what stands behind a row's own slot is yet to come, or
        padding."""
        slots = self.rows.slots[:, : self.rows.num_history]
        if of_last:
            slots = slots.gather(1, self.rows.last.unsqueeze(1))
        return torch.arange(num_keys) <= (slots + self._instruction_len).unsqueeze(2)

    @property
    def _instruction_len(self) -> int:
        return self.instruction[0][0].shape[1]

    def _past(self, index: int, part: int) -> Tensor | None:
        return self.rows.past[index][part] if self.rows.past else None

    def _behind_instruction(self, index: int, part: int) -> Tensor:
        first = self.instruction[index][part].expand(self.rows.batch, -1, -1, -1)
        return torch.cat([first, self.present[index][part]], dim=2)

    def _merge(self, new: Tensor, past: Tensor | None) -> Tensor:
        """[B, H_kv, P + T, D]: a sequence's new rows right behind the past ones it really has."""
        if past is None or self.rows.past_lengths is None:
            return new
        known, num_past = self.rows.past_lengths.unsqueeze(1), past.shape[2]
        source = self._once("source", lambda: self._without_gaps(known, num_past))
        owner = self._once("owner", lambda: torch.arange(self.rows.batch).unsqueeze(1))
        both = torch.cat([past, new], dim=2).transpose(1, 2)
        return both[owner, source].transpose(1, 2)

    def _without_gaps(self, known: Tensor, num_past: int) -> Tensor:
        """int64 [B, P + T]: where past and new rows come from, of which so many past ones [B, 1] are known."""
        slots = torch.arange(num_past + self.rows.num_history)
        behind = num_past + (slots - known).clamp(0, self.rows.num_history - 1)
        return torch.where(slots < known, slots, behind)

    def _exists(self, num_keys: int) -> Tensor:
        """bool [B, S]: instruction and history, padding left out."""
        return torch.arange(num_keys) < (self.rows.lengths + self._instruction_len).unsqueeze(1)


class GroupQueryAttend(DenseAttend):
    """The `ort` flavour. Past keys and values are buffers [1, H_kv, capacity, D] of one user that begin with the
    instruction's; `present` is the same buffers, written in place where input and output are bound to one memory."""

    def _history(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_new, num_queries = self.rows.num_history, q.shape[2]
        if num_queries == 1:
            # the operator wants a query per key; only that of the last row is read
            q = q.expand(-1, -1, num_new, -1)
        if self.rows.past:
            out, keys, values = self._append(index, q, k, v)
            self.present.append((keys, values))
        else:
            self.present.append((k, v))
            keys, values = (self._behind_instruction(index, part) for part in (0, 1))
            first = q.new_zeros(self.rows.batch, q.shape[1], self._instruction_len, q.shape[3])
            out = self._operator(torch.cat([first, q], dim=2), keys, values)[0][:, self._instruction_len :]
        out = torch.unflatten(out, 2, (q.shape[1], q.shape[3]))
        if num_queries == 1:
            out = out[torch.arange(self.rows.batch), self.rows.last].unsqueeze(1)
        return keys, values, out.transpose(1, 2)

    def _append(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, keys, values = self._operator(q, k, v, self.rows.past[index])
        return out, keys, values

    def _operator(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k and v [B, H_kv, T, D] -> [B, T, H * D] and the keys and values behind the past."""
        batch, heads, length, size = q.shape
        known = 0 if past is None or self.rows.past_lengths is None else self.rows.past_lengths + self._instruction_len
        # padding counts as rows: it stands behind what any real row sees and is overwritten by the next append
        total = torch.zeros(batch, dtype=torch.int64) + known + length
        rows = [part.transpose(1, 2).flatten(2) for part in (q, k, v)]
        shape = (batch, k.shape[1], length if past is None else past[0].shape[2], size)
        out, keys, values = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            [*rows, *(past or (None, None)), (total - 1).int(), total.max().int()],
            {"num_heads": heads, "kv_num_heads": k.shape[1]},
            dtypes=[q.dtype] * 3,
            shapes=[(batch, length, heads * size), shape, shape],
            version=1,
        )
        return out, keys, values


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """q [B, H, T, D] over [B, H_kv, S, D], not where `hidden` [B, 1, group * T, S] -> [B, H, T, D]; no head is copied
    for a group."""
    group = q.shape[1] // keys.shape[1]
    rows = _by_key_head(q, group) / math.sqrt(q.shape[-1])
    out = (rows @ keys.transpose(2, 3)).masked_fill(hidden, float("-inf")).softmax(dim=-1) @ values
    return torch.unflatten(out, 2, (group, q.shape[2])).flatten(1, 2)


def _by_key_head(q: Tensor, group: int) -> Tensor:
    """[B, H, T, D] -> [B, H_kv, group * T, D]: the queries that share keys become rows of one product."""
    return torch.unflatten(q, 1, (-1, group)).flatten(2, 3)


def isolated_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Candidates q [B, H, C, D] over a prefix [B, H_kv, S, D], not where `hidden` [B, 1, 1, S], and each over its own k
    and v.

    One softmax over the prefix and the one own key: no candidate sees another, and no C x C mask exists. In float32, as
    the engine computes attention above its inputs' precision: a half's logits of 16 are off by a hundredth.
    """
    dtype, count, group = q.dtype, k.shape[2], q.shape[1] // k.shape[1]
    q, k, v, keys, values = (part.float() for part in (q, k, v, keys, values))
    q = _by_key_head(q, group) / math.sqrt(q.shape[-1])
    own_keys, own_values = (part.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3) for part in (k, v))
    own = (q * own_keys).sum(dim=-1, keepdim=True)
    prefix = (q @ keys.transpose(2, 3)).masked_fill(hidden, float("-inf"))
    weights = torch.cat([prefix, own], dim=-1).softmax(dim=-1)
    out = weights[..., :-1] @ values + weights[..., -1:] * own_values
    return torch.unflatten(out, 2, (group, count)).flatten(1, 2).to(dtype)
