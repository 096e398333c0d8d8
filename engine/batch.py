"""Plans -> flat tensors: the rows of one forward pass, sequence after sequence, history before candidates, text last.

Every sequence is laid out as the rows its plan leaves to compute: new history positions, then ranked candidates.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.cache import CachePlan, KVCache
from speeder_engine.config import ROW_TILE
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query
from speeder_engine.text_rows import TextRows
from speeder_engine.triton_kernels.compressed_attention import AttentionRows

Put = Callable[[NDArray[Any]], Tensor]  # onto the device

# what is known of each row, each read row and each sequence; `Batch`, `Reads` and `AttentionRows` say what it means
ROW_FIELDS = ("item_rows", "slots", "buckets", "positions", "slot_mapping", "sequence", "local", "visible")
READ_FIELDS = ("read_rows", "items", "sequence", "local", "visible")
USER_FIELDS = ("last_read", "kept_slots", "keep_slots")
FIELDS = (ROW_FIELDS, READ_FIELDS, USER_FIELDS)


@dataclass(frozen=True)
class RowArrays:
    """Rows of items, what is read of them, and their sequences, as `CachePlan.lay_out` writes them: fields [f, n] one
    behind the other, in the order of the names above, and what is true or false beside them."""

    rows: NDArray[np.int64]
    reads: NDArray[np.int64]
    users: NDArray[np.int64]
    candidate: NDArray[np.bool_]
    read_candidate: NDArray[np.bool_]
    is_new: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_rows: int, num_reads: int, num_users: int) -> "RowArrays":
        """Room for so many, and for one more where they are odd: every field begins at a multiple of 16 bytes."""
        widths = [count + count % 2 for count in (num_rows, num_reads, num_users)]
        rows, reads, users = (np.empty((len(f), width), np.int64) for f, width in zip(FIELDS, widths, strict=True))
        candidate, read_candidate, is_new = (np.empty(width, np.bool_) for width in widths)
        return cls(rows, reads, users, candidate, read_candidate, is_new)


@dataclass(frozen=True)
class RowConstants:
    """What every layout of an engine has in common."""

    instruction_len: int
    instruction_slot: int  # h(last) of an empty history
    scratch_slot: int  # what nobody keeps

    @classmethod
    def of(cls, cache: KVCache, layout: PromptLayout) -> "RowConstants":
        return cls(layout.instruction_len, cache.instruction_slot, cache.scratch_slot)


class RowLayout:
    """The rows that a plan leaves to compute of B sequences, history before candidates: counted, and then written."""

    def __init__(self, queries: Sequence[Query], plan: CachePlan, constants: RowConstants) -> None:
        self.plan, self.constants = plan, constants
        self.num_users = len(queries)
        named = [query.candidates for query in queries if query.num_ranked and query.candidates is not None]
        self.candidates = _one_behind_the_other(named)
        ranked, extend = [query.num_ranked for query in queries], plan.extend_len.tolist()
        self.num_ranked = np.array(ranked, np.int32)
        self.num_rows = sum(ranked) + sum(extend)
        self.longest = max(map(operator.add, ranked, extend), default=0)  # rows of a sequence
        # the last new history row of each is read, and then its candidates
        reads, candidate_reads = 0, []
        for new, count in zip(extend, ranked, strict=True):
            first = reads + (new > 0)
            reads = first + count
            candidate_reads.append(slice(first, reads))
        self.num_reads = reads
        # [B] what the head of candidates reads, empty where there is none
        self.candidate_reads = tuple(candidate_reads)

    def write(self, arrays: RowArrays, nobody: int = 0) -> RowArrays:
        """Fills `arrays`. nobody: the sequence of the rows behind the plan's, which are padding."""
        fixed, flags = self.constants, (arrays.candidate, arrays.read_candidate, arrays.is_new)
        numbers = (fixed.instruction_len, fixed.instruction_slot, fixed.scratch_slot, nobody)
        ints = (arrays.rows, arrays.reads, arrays.users)
        self.plan.lay_out(self.num_ranked, self.candidates, numbers, ints, flags)
        return arrays


def _one_behind_the_other(arrays: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


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


def pad_rows(count: int) -> int:
    """Up to a whole tile: a row's arithmetic must not depend on how many stand beside it."""
    return -(-count // ROW_TILE) * ROW_TILE


def pad_to_tile(rows: Tensor) -> Tensor:
    """[n, ...] with zero rows behind, up to the next whole tile."""
    padding = pad_rows(rows.shape[0]) - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows


def make_batch(rows: RowLayout, shared_blocks: Tensor, put: Put) -> tuple[Batch, Reads]:
    """The rows of items, and what the heads read of them; text comes behind them by `with_text`."""
    arrays = rows.write(RowArrays.empty(rows.num_rows, rows.num_reads, rows.num_users))
    counts = rows.num_rows, rows.num_reads, rows.num_users
    ints = (put(each)[:, :count] for each, count in zip((arrays.rows, arrays.reads, arrays.users), counts, strict=True))
    flags = (arrays.candidate, arrays.read_candidate, arrays.is_new)
    return batch_of(
        tuple(each.unbind(0) for each in ints),
        tuple(put(each)[:count] for each, count in zip(flags, counts, strict=True)),
        put(rows.plan.block_tables),
        shared_blocks,
        rows.constants.instruction_len,
        pad_rows(rows.longest),
    )


def batch_of(
    ints: Sequence[Sequence[Tensor]],
    flags: Sequence[Tensor],
    block_tables: Tensor,
    shared_blocks: Tensor,
    instruction_len: int,
    rows_per_sequence: int,
) -> tuple[Batch, Reads]:
    """ints: the fields of `RowArrays` in the order of `FIELDS`; flags: candidate, read_candidate, is_new."""
    (item_rows, slots, buckets, positions, slot_mapping, sequence, local, visible), read, users = ints
    read_rows, items, read_sequence, read_local, read_visible = read
    last_read, kept_slots, keep_slots = users
    candidate, read_candidate, is_new = flags
    shared = (rows_per_sequence, block_tables, shared_blocks, instruction_len)
    attention = AttentionRows(sequence, local, visible, candidate, *shared)
    read_attention = AttentionRows(read_sequence, read_local, read_visible, read_candidate, *shared)
    return (
        Batch(item_rows, slots, buckets, positions, attention, slot_mapping, read_rows, read_attention),
        Reads(items, read_sequence, last_read, is_new, kept_slots, keep_slots),
    )
