"""StepBuffers: the rows of one bucket at fixed places, on the host where a step fills them in and on the device where a
captured pass finds them.

What a step doesn't fill is padding that harms nobody: rows of a sequence that is no user's, which see the instruction
alone, store nothing and are read by nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.batch import FIELDS, RowArrays, RowConstants, RowLayout, batch_of, pad_rows
from speeder_engine.cache import CachePlan, CacheSize, KVCache
from speeder_engine.prompt import PromptLayout
from speeder_engine.transfer import Transfer, words_of
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
        self._transfer = transfer
        self._nobody = num_users(cache.size) - 1
        self._nothing = RowLayout([], CachePlan.of_nobody(cache.size), RowConstants.of(cache, layout))
        self.words = 0
        arrays: list[Array] = []
        tensors: list[Tensor] = []
        for shape, dtype in _fields(bucket, cache.size):
            array, tensor, self.words = transfer.at(self.words, shape, dtype)
            arrays.append(array)
            tensors.append(tensor)
        *parts, self._tables = arrays
        self._arrays = RowArrays(*parts)
        *there, block_tables = tensors
        self.batch, self.reads = batch_of(
            [each.unbind(0) for each in there[: len(FIELDS)]],
            there[len(FIELDS) :],
            block_tables,
            cache.shared_blocks,
            layout.instruction_len,
            bucket.rows,
        )

    def clear(self) -> None:
        """Nothing but padding, sent."""
        self.fill(self._nothing)

    def fill(self, rows: RowLayout) -> None:
        """One step's rows, sent. At most as many as the bucket has."""
        self._transfer.begin(self.words)
        rows.write(self._arrays, self._nobody)
        tables = rows.plan.block_tables
        self._tables[: len(tables)] = tables
        self._tables[len(tables) :] = 0
        self._transfer.send()


def num_users(size: CacheSize) -> int:
    """Sequences of a captured pass: a step's most, nobody's, and up to a whole tile."""
    return pad_rows(size.max_users + 1)


def bucket_words(bucket: Bucket, size: CacheSize) -> int:
    """How many words of a transfer's arena the buffers of a bucket take."""
    return sum(words_of(shape, dtype) for shape, dtype in _fields(bucket, size))


def _fields(bucket: Bucket, size: CacheSize) -> list[tuple[tuple[int, ...], Dtype]]:
    """Shapes and types of a bucket's arrays, in their order: those of `RowArrays`, then the block tables."""
    counts = bucket.rows, bucket.reads, num_users(size)
    return [
        *(((len(names), count), np.dtype(np.int64)) for names, count in zip(FIELDS, counts, strict=True)),
        *(((count,), np.dtype(np.bool_)) for count in counts),
        ((counts[-1], size.blocks_per_sequence), np.dtype(np.int64)),
    ]
