"""Plans -> flat tensors: the rows of one forward pass, sequence after sequence, history before candidates, text last.

Every sequence is laid out as the rows its plan leaves to compute: new history positions, then ranked candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.cache import CachePlan
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query
from speeder_engine.text_rows import TextRows, make_text_rows
from speeder_engine.triton_kernels.compressed_attention import AttentionRows

ROW_TILE = 16  # rows are padded to it: a row's arithmetic must not depend on how many stand beside it


@dataclass(frozen=True)
class Batch:
    """N rows of B sequences on the device: first I of items, then text."""

    item_rows: Tensor  # int64 [I]
    slots: Tensor  # int64 [I]
    buckets: Tensor  # int64 [I] calendar buckets, 0 for candidates and where none are known
    positions: Tensor  # int64 [N]
    attention: AttentionRows
    slot_mapping: Tensor  # int64 [I] where a history row's keys are written, -1 for candidates
    read_rows: Tensor  # int64 [R] whose final hidden state is read
    last_read: NDArray[np.int64]  # [B] index into the reads of h(last), -1 where no history row is new
    candidate_reads: tuple[slice, ...]  # [B] what the head of candidates reads, empty where there is none
    text: TextRows | None = None

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def num_item_rows(self) -> int:
        return self.item_rows.shape[0]

    @property
    def num_item_reads(self) -> int:
        return self.read_rows.shape[0] - (0 if self.text is None else self.text.read_rows.shape[0])

    def with_text(self, text: TextRows) -> "Batch":
        """The same rows with those of `text` behind them."""
        read = self.num_item_reads
        reads = zip(self.candidate_reads, text.reads, strict=True)
        return replace(
            self,
            positions=torch.cat([self.positions, text.positions]),
            read_rows=torch.cat([self.read_rows, self.num_item_rows + text.read_rows]),
            candidate_reads=tuple(
                slice(read + theirs.start, read + theirs.stop) if theirs.stop > theirs.start else ours
                for ours, theirs in reads
            ),
            text=text,
        )

    def __str__(self) -> str:
        stored, read = int((self.slot_mapping >= 0).sum()), self.read_rows.shape[0]
        return f"{self.num_rows} rows of {len(self.last_read)} sequences: {stored} stored, {read} read"


def pad_rows(count: int) -> int:
    return -(-count // ROW_TILE) * ROW_TILE


def pad_to_tile(rows: Tensor) -> Tensor:
    """[n, ...] with zero rows behind, up to the next whole tile."""
    padding = pad_rows(rows.shape[0]) - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])])


def make_batch(
    queries: Sequence[Query], plan: CachePlan, layout: PromptLayout, shared_blocks: Tensor, device: torch.device
) -> Batch:
    extend = plan.extend_len.astype(np.int64)
    cached = plan.cached_len.astype(np.int64)
    ranked = np.array([query.num_ranked for query in queries], dtype=np.int64)
    counts = extend + ranked
    starts = np.cumsum(counts) - counts
    sequence = np.repeat(np.arange(len(queries)), counts)
    local = np.arange(counts.sum()) - starts[sequence]
    candidate = local >= extend[sequence]
    slots = np.where(candidate, (cached + extend)[sequence], cached[sequence] + local)
    is_read = candidate | (local == extend[sequence] - 1)
    read_rows = np.flatnonzero(is_read)
    first_read = np.searchsorted(read_rows, starts)
    last_read = np.where(extend > 0, first_read, -1)
    first_candidate = first_read + (extend > 0)
    attention = AttentionRows(
        sequence=_tensor(sequence, device),
        local=_tensor(local, device),
        visible=_tensor(np.where(candidate, slots, slots + 1), device),
        candidate=torch.from_numpy(candidate).to(device),
        rows_per_sequence=pad_rows(int(counts.max(initial=0))),
        block_tables=_tensor(plan.block_tables, device),
        shared_blocks=shared_blocks,
        shared_len=layout.instruction_len,
    )
    slot_mapping = np.full(len(sequence), -1, np.int64)
    slot_mapping[~candidate] = plan.slot_mapping
    item_rows, buckets = _item_rows(queries, plan)
    items = Batch(
        item_rows=_tensor(item_rows, device),
        slots=_tensor(slots, device),
        buckets=_tensor(buckets, device),
        positions=_tensor(slots + layout.instruction_len, device),
        attention=attention,
        slot_mapping=_tensor(slot_mapping, device),
        read_rows=_tensor(read_rows, device),
        last_read=last_read,
        candidate_reads=tuple(slice(int(a), int(a + n)) for a, n in zip(first_candidate, ranked, strict=True)),
    )
    text = make_text_rows(queries, plan, layout, shared_blocks, device)
    return items if text is None else items.with_text(text)


def _item_rows(queries: Sequence[Query], plan: CachePlan) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows of the catalogue and calendar buckets: each sequence's new history, then its ranked candidates."""
    nothing = np.empty(0, np.int32)
    rows, buckets = [nothing], [nothing]
    for query, cached in zip(queries, plan.cached_len.tolist(), strict=True):
        new = query.window[cached:]
        rows.append(new)
        buckets.append(np.zeros(len(new), np.int32) if query.buckets is None else query.buckets[cached:])
        if query.num_ranked:
            assert query.candidates is not None
            rows.append(query.candidates)
            buckets.append(np.zeros(query.num_ranked, np.int32))
    return np.concatenate(rows), np.concatenate(buckets)


def _tensor(array: NDArray[np.integer[Any]], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
