"""StepBuffers: the rows of one bucket at fixed places, on the host where a step fills them in and on the device where a
captured pass finds them.

What a step doesn't fill is padding that harms nobody: rows of a sequence that is no user's, which see the instruction
alone, store nothing and are read by nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.batch import Batch, Reads, RowLayout, empty_layout, pad_rows
from speeder_engine.cache import CacheSize, KVCache
from speeder_engine.prompt import PromptLayout
from speeder_engine.transfer import Transfer, words_of
from speeder_engine.triton_kernels.compressed_attention import AttentionRows
from speeder_engine.triton_kernels.few_rows import MOST_ROWS

PRUNED_FROM = MOST_ROWS  # below, a pass takes as long as its weights take to be read, however many rows are read
Array = NDArray[Any]
Dtype = np.dtype[Any]


@dataclass(frozen=True, order=True)
class Bucket:
    """How many rows a captured pass computes, and how many of them its last layer and its heads read."""

    rows: int
    reads: int


def make_buckets(row_buckets: Sequence[int], max_rows: int) -> list[Bucket]:
    """Ascending, up to the first that holds `max_rows`.

    Reads are all rows, which serves ranked candidates of warm users, or a quarter of them, which serves new histories
    without candidates. More sizes would save less than a hundredth of a pass; few rows are not worth even these.
    """
    found: list[Bucket] = []
    for rows in row_buckets:
        if rows > PRUNED_FROM:
            found.append(Bucket(rows, pad_rows(rows // 4)))
        found.append(Bucket(rows, rows))
        if rows >= max_rows:
            break
    return found


class StepBuffers:
    """A static `Batch` and `Reads` at the beginning of a transfer's arena, which the buffers of all buckets share."""

    def __init__(self, bucket: Bucket, cache: KVCache, layout: PromptLayout, transfer: Transfer) -> None:
        self.bucket = bucket
        self._cache, self._instruction_len = cache, layout.instruction_len
        self._transfer = transfer
        self._arrays: dict[str, Array] = {}
        tensors: dict[str, Tensor] = {}
        self.words = 0
        for name, shape, dtype in _fields(bucket, cache.size):
            self._arrays[name], tensors[name], self.words = transfer.at(self.words, shape, dtype)
        attention = AttentionRows(
            sequence=tensors["sequence"],
            local=tensors["local"],
            visible=tensors["visible"],
            candidate=tensors["candidate"],
            rows_per_sequence=bucket.rows,
            block_tables=tensors["block_tables"],
            shared_blocks=cache.shared_blocks,
            shared_len=layout.instruction_len,
        )
        read_attention = replace(
            attention,
            sequence=tensors["read_sequence"],
            local=tensors["read_local"],
            visible=tensors["read_visible"],
            candidate=tensors["read_candidate"],
        )
        rows = {name: tensors[name] for name in ("item_rows", "slots", "buckets", "positions", "slot_mapping")}
        read_rows = tensors["read_rows"]
        self.batch = Batch(**rows, attention=attention, read_rows=read_rows, read_attention=read_attention, text=None)
        users = {name: tensors[name] for name in ("last_read", "is_new", "kept_slots", "keep_slots")}
        self.reads = Reads(items=tensors["read_items"], sequence=tensors["read_sequence"], **users)

    def clear(self) -> None:
        """Nothing but padding, sent."""
        nothing = np.zeros((0, self._cache.size.blocks_per_sequence), np.int32)
        self.fill(empty_layout(), nothing)

    def fill(self, rows: RowLayout, block_tables: Array) -> None:
        """One step's rows, sent. At most as many as the bucket has."""
        self._transfer.begin(self.words)
        nobody = num_users(self._cache.size) - 1
        read = rows.read_rows
        self._set("item_rows", rows.item_rows, 0)
        self._set("slots", rows.slots, 0)
        self._set("buckets", rows.buckets, 0)
        self._set("positions", rows.slots + self._instruction_len, 0)
        self._set("slot_mapping", rows.slot_mapping, -1)
        for prefix, chosen in (("", slice(None)), ("read_", read)):
            self._set(f"{prefix}sequence", rows.sequence[chosen], nobody)
            self._set(f"{prefix}visible", rows.visible[chosen], 0)
            self._set(f"{prefix}candidate", rows.candidate[chosen], False)
            local = rows.local[chosen]
            self._set(f"{prefix}local", local, _counting(self._arrays[f"{prefix}local"], len(local)))
        self._set("read_rows", read, 0)
        self._set("read_items", rows.item_rows[read], 0)
        self._set("last_read", np.maximum(rows.last_read, 0), 0)
        self._set("is_new", rows.last_read >= 0, False)
        self._set("kept_slots", rows.kept_slots, self._cache.instruction_slot)
        self._set("keep_slots", rows.keep_slots, self._cache.scratch_slot)
        self._set("block_tables", block_tables, 0)
        self._transfer.send()

    def _set(self, name: str, values: Array, padding: Any) -> None:
        array = self._arrays[name]
        array[: len(values)] = values
        array[len(values) :] = padding


def _counting(array: Array, filled: int) -> Array:
    """0, 1, 2, ... for the part that is not filled: no two rows of a sequence stand in one place."""
    return np.arange(len(array) - filled)


def num_users(size: CacheSize) -> int:
    """Sequences of a captured pass: a step's most, nobody's, and up to a whole tile."""
    return pad_rows(size.max_users + 1)


def bucket_words(bucket: Bucket, size: CacheSize) -> int:
    """Of a transfer's arena."""
    return sum(words_of(shape, dtype) for _, shape, dtype in _fields(bucket, size))


def _fields(bucket: Bucket, size: CacheSize) -> list[tuple[str, tuple[int, ...], Dtype]]:
    users = num_users(size)
    per_row = "item_rows slots buckets positions slot_mapping sequence local visible"
    per_read = "read_rows read_items read_sequence read_local read_visible"
    per_user = "last_read kept_slots keep_slots"
    groups = ((per_row, bucket.rows), (per_read, bucket.reads), (per_user, users))
    flags = (("candidate", bucket.rows), ("read_candidate", bucket.reads), ("is_new", users))
    return [
        *((name, (count,), np.dtype(np.int64)) for names, count in groups for name in names.split()),
        *((name, (count,), np.dtype(np.bool_)) for name, count in flags),
        ("block_tables", (users, size.blocks_per_sequence), np.dtype(np.int64)),
    ]
