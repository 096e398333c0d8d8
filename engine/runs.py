"""Runs: many sequences of item rows, one after another in flat arrays. Knows no ids."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import DataError


class Runs:
    """Run i is `rows[offsets[i]:offsets[i + 1]]`, oldest first: the common part of datasets, training sets and queries.

    `offsets` int64 [n + 1], `rows` int32 [N] item rows, `times` int64 [N] Unix seconds or None.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    times: NDArray[np.int64] | None

    @property
    def num_interactions(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def history(self, index: int) -> NDArray[np.int32]:
        return self.rows[self.offsets[index] : self.offsets[index + 1]]

    def history_times(self, index: int) -> NDArray[np.int64] | None:
        return None if self.times is None else self.times[self.offsets[index] : self.offsets[index + 1]]

    def _check_runs(self, what: str) -> None:
        offsets, rows, times = self.offsets, self.rows, self.times
        if offsets.dtype != np.int64 or rows.dtype != np.int32 or (times is not None and times.dtype != np.int64):
            raise DataError(f"{what}: offsets and times must be int64, rows int32, not {offsets.dtype}, {rows.dtype}")
        rises = offsets.ndim == 1 and len(offsets) > 0 and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
        if not rises or offsets[-1] != len(rows):
            raise DataError(f"{what}: offsets must rise from 0 to the number of rows, {len(rows)}")
        if times is not None and times.shape != rows.shape:
            raise DataError(f"{what}: {len(rows)} rows but {len(times)} times")


def offsets_of(lengths: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """int64 [n + 1]: 0 and the running sums of `lengths` [n]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """`starts[0], ..., ends[0] - 1, starts[1], ...`: the positions of many slices in one array."""
    offsets = offsets_of(ends - starts)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
