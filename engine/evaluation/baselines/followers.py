"""Which items stand near which in the training histories: a sparse item-item table. Knows no scorer."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.runs import ranges
from speeder_engine.data.splits import Histories
from speeder_engine.encoders.pairs import count_pairs


@dataclass(frozen=True, eq=False)
class Followers:
    """Those of item i are `rows[offsets[i]:offsets[i + 1]]`, int32 ascending, each once, with float32 `values`."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    values: NDArray[np.float32]

    @classmethod
    def count(cls, train: Histories, num_items: int, window: int | None = 1, forward: bool = True) -> Self:
        """`count_pairs` of the training histories."""
        codes, counts = count_pairs(train.offsets, train.rows, num_items, window, forward)
        offsets = np.searchsorted(codes, np.arange(num_items + 1) * num_items)
        return cls(offsets, (codes % num_items).astype(np.int32), counts.astype(np.float32))

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
