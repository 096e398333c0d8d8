"""ModelRunner: the weights on the device and the paged `attend`. Speaks tensors, never users.

On a CPU with native kernels whole passes go to `NativeDecoder`; else the decoder's layers run in torch, or as kernels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from speeder_engine.batch import Batch, pad_rows, pad_to_tile
from speeder_engine.cache import KVCache
from speeder_engine.models.decoder import CausalAttend, DecoderLayer
from speeder_engine.models.recommender import ServingModel
from speeder_engine.native.decoder import NativeDecoder, NativeRows
from speeder_engine.triton_kernels.add_rms_norm import Norm
from speeder_engine.triton_kernels.compressed_attention import AttentionRows, compressed_attention
from speeder_engine.triton_kernels.few_rows import make_counters
from speeder_engine.triton_kernels.fused_qkv import HeadsInto, fused_qkv
from speeder_engine.triton_kernels.item_embed import EmbedRows, embed_rows, item_embed
from speeder_engine.triton_kernels.language import overlapping, runs_triton
from speeder_engine.triton_kernels.qk_norm_rope_store import qk_norm_rope_store, rotate
from speeder_engine.triton_kernels.tree_attention import tree_attention


class ModelRunner:
    """Runs forward passes over batches; computes the instruction once, into the cache's shared blocks."""

    def __init__(
        self, model: ServingModel, cache: KVCache, native: NativeDecoder | None = None, launches: str = "fused"
    ) -> None:
        """launches: `EngineConfig.launches`."""
        self.model = model
        self.cache = cache
        self.native = native
        self.overlap = launches == "overlapped"
        # its own: another engine on the same model may run beside this one
        self.counters = None if launches == "apart" else make_counters(model.instruction.device)
        self.rows_computed = 0
        prompt = model.config.prompt
        device = model.instruction.device
        # of every position that rows of items can have: the window's, and one behind it for candidates
        longest = len(prompt.instruction_ids) + prompt.window + 1
        self.cos, self.sin = model.decoder.rotary(torch.arange(longest, device=device))
        cache.keep_instruction(self._run_instruction())

    def forward(self, batch: Batch, item_tokens: Tensor) -> Tensor:
        """Final hidden states [R, d] of the batch's read rows, gathered from item_tokens [I, d]."""
        self.rows_computed += batch.num_rows
        return self.hidden_states(batch, item_tokens)

    @torch.inference_mode()
    def hidden_states(self, batch: Batch, item_tokens: Tensor) -> Tensor:
        """The same, not counted. On a GPU it waits for nothing and reads nothing on the host, so that it can be
        captured, unless the batch has text."""
        if batch.num_rows == 0:
            return item_tokens[:0]
        tables = self.model.embed_tables(item_tokens)
        if self.native is not None:
            embedded = embed_rows(tables, _embed_rows(batch, batch.num_rows))
            return self.native.forward(embedded, self._native_rows(batch), self.cache)
        with overlapping(self.overlap):
            embedded, normed = item_embed(tables, _embed_rows(batch, pad_rows(batch.num_rows)))
            positions = pad_to_tile(batch.positions)
            attend = PagedAttend(self.cache, batch, *self._rotary(batch, positions))
            read_rows = pad_to_tile(batch.read_rows)
            hidden: Tensor = self.model.decoder(embedded, positions, attend, read_rows, normed, self.counters)
        return hidden[: batch.read_rows.shape[0]]

    def _rotary(self, batch: Batch, positions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin, row by row; or the tables, and where each row finds its own: the kernel looks them up itself."""
        if batch.text is not None:
            cos, sin = self.model.decoder.rotary(positions)
            # each its own: kernels that are given positions are compiled already
            each = torch.arange(len(positions), device=positions.device) if runs_triton(self.cos) else None
            return cos, sin, each
        if runs_triton(self.cos):
            return self.cos, self.sin, positions
        return self.cos[positions], self.sin[positions], None

    def _native_rows(self, batch: Batch) -> NativeRows:
        found = NativeRows.of(
            batch.attention,
            positions=batch.positions,
            cos=self.cos,
            sin=self.sin,
            slot_mapping=batch.slot_mapping,
            read_rows=batch.read_rows,
        )
        if batch.text is None:
            return found
        tree, first = batch.text.tree, batch.num_item_rows
        cos, sin = self.model.decoder.rotary(batch.positions)
        each = torch.arange(batch.num_rows)
        paths = torch.where(tree.paths < 0, tree.paths, tree.paths + first)
        return replace(found.with_text(tree.prefix, paths), positions=each, cos=cos, sin=sin)

    def _run_instruction(self) -> Tensor:
        """Fills the shared blocks; returns the instruction's last hidden state [1, d]: an empty history's h(last)."""
        decoder, rows = self.model.decoder, self.model.instruction
        if self.native is not None:
            return self.native.forward(rows, self._instruction_rows(), self.cache)
        positions = torch.arange(rows.shape[0], device=rows.device)
        attend = _StoringAttend(self.cache, *decoder.rotary(positions))
        hidden: Tensor = decoder(rows, positions, attend, counters=self.counters)
        return hidden[-1:]

    def _instruction_rows(self) -> NativeRows:
        """The instruction as a history of its own, in the blocks that are shared from then on."""
        length = self.model.instruction.shape[0]
        each = torch.arange(length)
        return NativeRows(
            positions=each,
            cos=self.cos,
            sin=self.sin,
            slot_mapping=each,
            sequence=torch.zeros_like(each),
            visible=each + 1,
            candidate=torch.zeros(length, dtype=torch.bool),
            block_tables=self.cache.shared_blocks[None],
            shared_blocks=self.cache.shared_blocks,
            shared_len=0,
            read_rows=each[-1:],
        )


def _embed_rows(batch: Batch, num_padded: int) -> EmbedRows:
    return EmbedRows(
        items=batch.item_rows,
        slots=batch.slots,
        buckets=batch.buckets,
        candidate=batch.attention.candidate,
        tokens=None if batch.text is None else batch.text.tokens,
        num_padded=num_padded,
    )


class PagedAttend:
    """Norms, rotates, stores the history rows' keys and values, then attends over the paged cache."""

    def __init__(self, cache: KVCache, batch: Batch, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> None:
        self.cache, self.batch = cache, batch
        self.cos, self.sin, self.positions = cos, sin, positions

    def __call__(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        batch = self.batch
        keys, values, scales = self.cache.layer(layer.index)
        norms, eps = layer.head_norms, layer.config.rms_norm_eps
        q, k = qk_norm_rope_store(
            q, k, v, self.cos, self.sin, keys, values, batch.slot_mapping, norms, eps, rows, scales, self.positions
        )  # fmt: skip
        return self._attended(layer, q, k, v, rows)

    def project(self, layer: DecoderLayer, hidden: Tensor, counters: Tensor) -> Tensor:
        keys, values, scales = self.cache.layer(layer.index)
        norm, linear = layer.input_norm, layer.qkv
        into = HeadsInto(
            self.cos, self.sin, self.positions, keys, values, scales, self.batch.slot_mapping, layer.head_norms,
            norm.eps, layer.heads,
        )  # fmt: skip
        q, k, v = fused_qkv(hidden, linear.weight, counters, linear.bias, Norm(norm.weight, norm.eps), into)
        return self._attended(layer, q, k, v, None)

    def _attended(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """q [R, H, D] of `rows` over their prefixes, k and v [N, H_kv, D] beside them."""
        batch = self.batch
        keys, values, scales = self.cache.layer(layer.index)
        attention, real = self._rows(rows, batch.num_item_rows)
        own_k, own_v = (k, v) if rows is None else (k[rows], v[rows])
        # rows that attend to nothing are padding
        out = torch.empty_like(q) if real == q.shape[0] else torch.zeros_like(q)
        compressed_attention(q[:real], own_k[:real], own_v[:real], keys, values, attention, scales, out[:real])
        if batch.text is not None:
            text = slice(batch.num_item_rows, batch.num_rows)
            tree = batch.text.tree if rows is None else batch.text.tree.select(batch.text.read_rows)
            behind = slice(real, real + tree.paths.shape[0])
            tree_attention(q[behind], k[text], v[text], keys, values, tree, scales, out[behind])
        return out

    def _rows(self, rows: Tensor | None, num_rows: int) -> tuple[AttentionRows, int]:
        """The rows that attend, padding left out."""
        if rows is None:
            return self.batch.attention, num_rows
        return self.batch.read_attention, self.batch.num_item_reads


class _StoringAttend(CausalAttend):
    """Causal attention that also writes the instruction's keys and values into the shared blocks."""

    def __init__(self, cache: KVCache, cos: Tensor, sin: Tensor) -> None:
        super().__init__(cos, sin)
        self.cache = cache

    def __call__(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        slots = torch.arange(k.shape[0], device=k.device)
        self.cache.store(layer.index, slots, rotate(layer.norm_k(k), self.cos, self.sin), v)
        return super().__call__(layer, q, k, v, rows)
