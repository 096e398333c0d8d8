"""Plans -> flat tensors: the rows of one forward pass, sequence after sequence, history before candidates, text last.

Every sequence is laid out as the rows its plan leaves to compute: new history positions, then ranked candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.cache import CachePlan
from speeder_engine.config import ROW_TILE
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query
from speeder_engine.text_rows import TextRows
from speeder_engine.triton_kernels.compressed_attention import AttentionRows

Ints = NDArray[np.integer[Any]]
Put = Callable[[NDArray[Any]], Tensor]  # onto the device


@dataclass(frozen=True)
class RowLayout:
    """I rows of items of B sequences as numpy knows them, before they go to the device."""

    item_rows: Ints  # [I] of the catalogue
    slots: Ints  # [I]
    buckets: Ints  # [I] calendar buckets, 0 for candidates and where none are known
    sequence: Ints  # [I]
    local: Ints  # [I] index among the sequence's rows
    visible: Ints  # [I] history positions that are seen
    candidate: NDArray[np.bool_]  # [I]
    slot_mapping: Ints  # [I] where a row's keys are written, -1 for candidates
    longest: int  # rows of a sequence
    read_rows: Ints  # [R] whose final hidden state is read: candidates, and each sequence's last history row
    last_read: Ints  # [B] index into the reads of h(last), -1 where no history row is new
    kept_slots: Ints  # [B] where h(last) is found instead: with an unchanged session, or the instruction's own
    keep_slots: Ints  # [B] where h(last) is kept
    first_candidate: Ints  # [B] index into the reads
    num_candidates: Ints  # [B] that are rows of their own

    @property
    def num_rows(self) -> int:
        return len(self.item_rows)

    @property
    def num_reads(self) -> int:
        return len(self.read_rows)

    def candidate_reads(self) -> tuple[slice, ...]:
        """[B] what the head of candidates reads, empty where there is none."""
        firsts, counts = self.first_candidate.tolist(), self.num_candidates.tolist()
        return tuple([slice(first, first + count) for first, count in zip(firsts, counts, strict=True)])


def lay_out(queries: Sequence[Query], plan: CachePlan, instruction_slot: int, scratch_slot: int) -> RowLayout:
    """`instruction_slot` holds h(last) of an empty history, `scratch_slot` what nobody keeps."""
    extend, cached = plan.extend_len, plan.cached_len
    ranked = np.array([query.num_ranked for query in queries], dtype=np.int32)
    counts = extend + ranked
    starts = np.cumsum(counts) - counts
    sequence = np.repeat(np.arange(len(queries)), counts)
    local = np.arange(len(sequence)) - starts[sequence]
    candidate = local >= extend[sequence]
    slots = np.where(candidate, (cached + extend)[sequence], cached[sequence] + local)
    read_rows = np.flatnonzero(candidate | (local == extend[sequence] - 1))
    first_read = np.searchsorted(read_rows, starts)
    slot_mapping = np.full(len(sequence), -1, np.int64)
    slot_mapping[~candidate] = plan.slot_mapping
    item_rows, buckets = _item_rows(queries, plan)
    return RowLayout(
        item_rows=item_rows,
        slots=slots,
        buckets=buckets,
        sequence=sequence,
        local=local,
        visible=np.where(candidate, slots, slots + 1),
        candidate=candidate,
        slot_mapping=slot_mapping,
        longest=int(counts.max(initial=0)),
        read_rows=read_rows,
        last_read=np.where(extend > 0, first_read, -1),
        kept_slots=np.where((cached > 0) & (extend == 0), plan.session_slots, instruction_slot),
        keep_slots=np.where((plan.session_slots >= 0) & (extend > 0), plan.session_slots, scratch_slot),
        first_candidate=first_read + (extend > 0),
        num_candidates=ranked,
    )


def empty_layout() -> RowLayout:
    """Of no sequence at all."""
    none, no = np.empty(0, np.int64), np.empty(0, np.bool_)
    return RowLayout(none, none, none, none, none, none, no, none, 0, none, none, none, none, none, none)


@dataclass(frozen=True)
class Batch:
    """N rows of B sequences on the device: first I of items, then text."""

    item_rows: Tensor  # int64 [I]
    slots: Tensor  # int64 [I]
    buckets: Tensor  # int64 [I] calendar buckets, 0 for candidates and where none are known
    positions: Tensor  # int64 [N]
    attention: AttentionRows
    slot_mapping: Tensor  # int64 [I] where a row's keys are written, -1 for candidates
    read_rows: Tensor  # int64 [R] whose final hidden state is read
    read_attention: AttentionRows  # those of items among them
    text: TextRows | None = None

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def num_item_rows(self) -> int:
        return self.item_rows.shape[0]

    @property
    def num_item_reads(self) -> int:
        return self.read_attention.sequence.shape[0]

    def with_text(self, text: TextRows) -> "Batch":
        """The same rows with those of `text` behind them."""
        return replace(
            self,
            positions=torch.cat([self.positions, text.positions]),
            read_rows=torch.cat([self.read_rows, self.num_item_rows + text.read_rows]),
            text=text,
        )

    def __str__(self) -> str:
        sequences = self.attention.block_tables.shape[0]
        return f"{self.num_rows} rows of {sequences} sequences: {self.read_rows.shape[0]} read"


@dataclass(frozen=True)
class Reads:
    """What the heads read of a pass over B sequences, on the device."""

    items: Tensor  # int64 [R] of the catalogue, each read row's own
    sequence: Tensor  # int64 [R]
    last_read: Tensor  # int64 [B] index into the reads of h(last), where it is new
    is_new: Tensor  # bool [B]
    kept_slots: Tensor  # int64 [B] where it is found, where it is not
    keep_slots: Tensor  # int64 [B] where it is kept


def make_reads(rows: RowLayout, put: Put) -> Reads:
    return Reads(
        items=put(rows.item_rows[rows.read_rows]),
        sequence=put(rows.sequence[rows.read_rows]),
        last_read=put(np.maximum(rows.last_read, 0)),
        is_new=put(rows.last_read >= 0),
        kept_slots=put(rows.kept_slots),
        keep_slots=put(rows.keep_slots),
    )


def pad_rows(count: int) -> int:
    """Up to a whole tile: a row's arithmetic must not depend on how many stand beside it."""
    return -(-count // ROW_TILE) * ROW_TILE


def pad_to_tile(rows: Tensor) -> Tensor:
    """[n, ...] with zero rows behind, up to the next whole tile."""
    padding = pad_rows(rows.shape[0]) - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows


def make_batch(rows: RowLayout, plan: CachePlan, layout: PromptLayout, shared_blocks: Tensor, put: Put) -> Batch:
    """The rows of items; text comes behind them by `with_text`."""
    attention = AttentionRows(
        sequence=put(rows.sequence),
        local=put(rows.local),
        visible=put(rows.visible),
        candidate=put(rows.candidate),
        rows_per_sequence=pad_rows(rows.longest),
        block_tables=put(plan.block_tables),
        shared_blocks=shared_blocks,
        shared_len=layout.instruction_len,
    )
    read = rows.read_rows
    return Batch(
        item_rows=put(rows.item_rows),
        slots=put(rows.slots),
        buckets=put(rows.buckets),
        positions=put(rows.slots + layout.instruction_len),
        attention=attention,
        slot_mapping=put(rows.slot_mapping),
        read_rows=put(read),
        read_attention=replace(
            attention,
            sequence=put(rows.sequence[read]),
            local=put(rows.local[read]),
            visible=put(rows.visible[read]),
            candidate=put(rows.candidate[read]),
        ),
    )


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
