"""Which items stand near which in the training histories: a sparse item-item table. Knows no scorer."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.runs import ranges
from speeder_engine.data.splits import Histories

PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Followers:
    """Those of item i are `rows[offsets[i]:offsets[i + 1]]`, int32 ascending, each once, with float32 `values`."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    values: NDArray[np.float32]

    @classmethod
    def count(cls, train: Histories, num_items: int, window: int | None = 1, forward: bool = True) -> Self:
        """Counts pairs of events of one history that stand at most `window` apart; None: however far.

        The earlier event's item has the later one's as follower, and the other way round unless `forward`.
        """
        histories = np.repeat(np.arange(train.num_users), train.lengths)
        rows = train.rows.astype(np.int64)
        counted = _Counts()
        for apart in range(1, min(window or len(rows), int(train.lengths.max(initial=0)) - 1) + 1):
            here = np.flatnonzero(histories[:-apart] == histories[apart:])
            earlier, later = rows[here], rows[here + apart]
            counted.add(earlier * num_items + later)
            if not forward:
                counted.add(later * num_items + earlier)
        counted.merge()
        offsets = np.searchsorted(counted.codes, np.arange(num_items + 1) * num_items)
        return cls(offsets, (counted.codes % num_items).astype(np.int32), counted.counts.astype(np.float32))

    def scaled(self, of_item: NDArray[np.float64], of_follower: NDArray[np.float64]) -> Self:
        """Each value times its item's and its follower's factor, both [num_items]."""
        factors = np.repeat(of_item, np.diff(self.offsets)) * of_follower[self.rows]
        return replace(self, values=(self.values * factors).astype(np.float32))

    def add_to(
        self, scores: NDArray[np.float32], lines: NDArray[np.int64], items: NDArray[np.int32], weight: float = 1.0
    ) -> None:
        """Adds `weight` times the values of `items` [n] to the `lines` [n], each once, of `scores` [Q, num_items]."""
        starts, ends = self.offsets[items], self.offsets[items + 1]
        events = ranges(starts, ends)
        scores[np.repeat(lines, ends - starts), self.rows[events]] += np.float32(weight) * self.values[events]


class _Counts:
    """How often each code came, `codes` ascending; merged now and then, so that memory follows the distinct ones."""

    def __init__(self) -> None:
        self.codes = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.pending: list[NDArray[np.int64]] = []

    def add(self, codes: NDArray[np.int64]) -> None:
        self.pending.append(codes)
        if sum(map(len, self.pending)) >= PAIRS_AT_ONCE:
            self.merge()

    def merge(self) -> None:
        codes, counts = np.unique(np.concatenate([*self.pending, np.zeros(0, np.int64)]), return_counts=True)
        known, place = np.unique(np.concatenate([self.codes, codes]), return_inverse=True)
        merged = np.zeros(len(known), np.int64)
        merged[place[: len(self.codes)]] = self.counts
        merged[place[len(self.codes) :]] += counts
        self.codes, self.counts, self.pending = known, merged, []
