"""Free greedy generation of titles: the literature's way to answer. The one decode loop here, beside the engine's path.

The question and what has been written are rows behind a history that is in the paged cache; their keys and values live
in a scratch of this call, so that each further token computes one row a sequence and no session sees any of it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.batch import pad_to_tile
from speeder_engine.models.decoder import DecoderLayer
from speeder_engine.native.decoder import NativeDecoder, NativeRows, OwnKeys
from speeder_engine.runner import ModelRunner
from speeder_engine.title_text import TitleText
from speeder_engine.triton_kernels.compressed_attention import AttentionRows
from speeder_engine.triton_kernels.qk_norm_rope_store import qk_norm_rope_store
from speeder_engine.triton_kernels.tree_attention import TreeRows, tree_attention


class TitleGenerator:
    """Continues histories with the question and greedily chosen tokens."""

    def __init__(self, runner: ModelRunner, text: TitleText) -> None:
        self.runner = runner
        self.text = text
        self.prompt = runner.model.config.prompt

    @torch.inference_mode()
    def generate(self, history_lens: Sequence[int], block_tables: Tensor, max_tokens: int) -> list[str]:
        """One line of text a sequence, whose `history_lens[b]` positions are in the blocks `block_tables[b]`."""
        scratch = _Scratch(self.runner, history_lens, block_tables, len(self.prompt.question_ids) + max_tokens)
        written: list[list[int]] = [[] for _ in history_lens]
        going = list(range(len(history_lens)))
        tokens = torch.tensor(self.prompt.question_ids, device=block_tables.device).expand(len(going), -1)
        for _ in range(max_tokens):
            if not going:
                break
            hidden = scratch.extend(going, tokens)
            chosen = self.runner.model.logits(pad_to_tile(hidden))[: len(going)].float().argmax(dim=-1)
            for b, token in zip(going, chosen.tolist(), strict=True):
                written[b].append(token)
            kept = [i for i, b in enumerate(going) if not self._ended(written[b])]
            going = [going[i] for i in kept]
            tokens = chosen[kept].unsqueeze(1)
        return [self._line(ids) for ids in written]

    def _ended(self, ids: list[int]) -> bool:
        return ids[-1] in self.prompt.end_ids or "\n" in self.text.decode(ids)

    def _line(self, ids: list[int]) -> str:
        if ids[-1] in self.prompt.end_ids:
            ids = ids[:-1]
        return self.text.decode(ids).split("\n")[0].strip()


class _Scratch:
    """Keys and values [layers, B * length, H_kv, D] of the text of B sequences, and the pass that fills them."""

    def __init__(self, runner: ModelRunner, history_lens: Sequence[int], block_tables: Tensor, length: int) -> None:
        self.runner, self.block_tables, self.length = runner, block_tables, length
        self.device = block_tables.device
        self.history_lens = np.array(history_lens, dtype=np.int64)
        layers, _, _, *shape = runner.cache.keys.shape
        # in the model's type whatever the cache holds: this call's own
        size = (layers, len(history_lens) * length, *shape)
        self.keys = torch.zeros(size, dtype=runner.cache.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.filled = 0  # rows of every sequence that goes on

    def extend(self, members: Sequence[int], tokens: Tensor) -> Tensor:
        """tokens [S, n] of the sequences `members` behind what they have -> the last one's final hidden states [S, d].

        A sequence left out once can't come back: the others have grown.
        """
        model, count = self.runner.model, tokens.shape[1]
        sequence, step = np.repeat(members, count), np.tile(np.arange(count), len(members))
        depth = self.filled + step
        columns = np.arange(self.filled + count)
        first = sequence * self.length
        rows = TreeRows(
            prefix=AttentionRows(
                sequence=self._tensor(np.repeat(np.arange(len(members)), count)),
                local=self._tensor(step),
                visible=self._tensor(self.history_lens[sequence]),
                candidate=torch.zeros(len(sequence), dtype=torch.bool, device=self.device),
                rows_per_sequence=count,
                block_tables=self.block_tables[self._tensor(np.array(members))],
                shared_blocks=self.runner.cache.shared_blocks,
                shared_len=len(model.instruction),
            ),
            paths=self._tensor(np.where(columns <= depth[:, None], first[:, None] + columns, -1)),
        )
        positions = self._tensor(len(model.instruction) + self.history_lens[sequence] + depth)
        read_rows = self._tensor(np.arange(1, len(members) + 1) * count - 1)
        slots = self._tensor(first + depth)
        self.filled += count
        self.runner.rows_computed += len(sequence)
        embedded = model.embed_text(tokens.flatten())
        if self.runner.native is not None:
            return self._native(self.runner.native, embedded, positions, slots, rows, read_rows)
        positions = pad_to_tile(positions)
        attend = _ScratchAttend(self, slots, rows, read_rows, *model.decoder.rotary(positions))
        read, counters = pad_to_tile(read_rows), self.runner.counters
        hidden: Tensor = model.decoder(pad_to_tile(embedded), positions, attend, read, counters=counters)
        return hidden[: len(members)]

    def _native(
        self, native: NativeDecoder, embedded: Tensor, positions: Tensor, slots: Tensor, tree: TreeRows, reads: Tensor
    ) -> Tensor:
        cos, sin = self.runner.model.decoder.rotary(positions)
        rows = NativeRows.of(
            tree.prefix,
            positions=torch.arange(len(positions)),
            cos=cos,
            sin=sin,
            slot_mapping=slots[:0],
            read_rows=reads,
            paths=tree.paths,
            own=OwnKeys(slots, self.keys, self.values),
        )
        return native.forward(embedded, rows, self.runner.cache)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


class _ScratchAttend:
    """Rotates, keeps the rows' keys and values in the scratch, then attends over history and scratch."""

    def __init__(
        self, scratch: _Scratch, slots: Tensor, tree: TreeRows, read_rows: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        self.scratch, self.slots, self.tree, self.read_rows = scratch, slots, tree, read_rows
        self.cos, self.sin = cos, sin

    def __call__(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        at, cache = layer.index, self.scratch.runner.cache
        keys, values = self.scratch.keys[at], self.scratch.values[at]
        # the scratch as a cache whose blocks hold one position
        blocks = keys.unsqueeze(1), values.unsqueeze(1)
        norms, eps = layer.head_norms, layer.config.rms_norm_eps
        q, _ = qk_norm_rope_store(q, k, v, self.cos, self.sin, *blocks, self.slots, norms, eps, rows)
        tree = self.tree if rows is None else self.tree.select(self.read_rows)
        real = tree.paths.shape[0]
        out = torch.zeros_like(q)
        tree_attention(q[:real], keys, values, *cache.layer(at)[:2], tree, cache.layer(at).scales, out[:real])
        return out
