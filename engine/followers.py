"""Which items stand near which in histories: a sparse item-item table. Knows no model and no scorer."""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.runs import ranges

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Followers:
    """Those of item i are `rows[offsets[i]:offsets[i + 1]]`, int32 ascending, each once, with float32 `values`."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    values: NDArray[np.float32]

    @classmethod
    def of_codes(cls, codes: NDArray[np.int64], values: NDArray[np.number[Any]], num_items: int) -> Self:
        """Codes are item * num_items + follower, ascending, each once."""
        offsets = np.searchsorted(codes, np.arange(num_items + 1) * num_items)
        return cls(offsets, (codes % num_items).astype(np.int32), values.astype(np.float32))

    @property
    def num_items(self) -> int:
        return len(self.offsets) - 1

    @property
    def items(self) -> NDArray[np.int64]:
        """int64, one a value: the item i whose follower it is about."""
        return np.repeat(np.arange(self.num_items), np.diff(self.offsets))

    def scaled(self, of_item: Floats, of_follower: Floats) -> Self:
        """Each value times its item's and its follower's factor, both [num_items]."""
        return replace(self, values=(self.values * of_item[self.items] * of_follower[self.rows]).astype(np.float32))

    def largest(self, keep: int) -> NDArray[np.bool_]:
        """Which values are among their item's `keep` largest; of equal ones the first rows."""
        items = self.items
        order = np.lexsort((-self.values, items))
        kept = np.zeros(len(items), np.bool_)
        kept[order[np.arange(len(items)) - self.offsets[items] < keep]] = True
        return kept

    def take(self, kept: NDArray[np.bool_]) -> Self:
        """Only the values where `kept` is true."""
        counts = np.bincount(self.items[kept], minlength=self.num_items)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return replace(self, offsets=offsets, rows=self.rows[kept], values=self.values[kept])

    def add_to(
        self, scores: NDArray[np.float32], lines: NDArray[np.int64], items: NDArray[np.int32], weight: float = 1.0
    ) -> None:
        """Adds `weight` times the values of `items` [n] to the `lines` [n], each once, of `scores` [Q, num_items]."""
        starts, ends = self.offsets[items], self.offsets[items + 1]
        events = ranges(starts, ends)
        scores[np.repeat(lines, ends - starts), self.rows[events]] += np.float32(weight) * self.values[events]
