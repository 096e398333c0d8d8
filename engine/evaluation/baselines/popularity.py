"""Popularity: how often an item stands in the training histories, the same for everybody."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Histories, Queries
from speeder_engine.errors import DataError
from speeder_engine.evaluation.scorer import CatalogueScorer

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Popularity(CatalogueScorer):
    """Scores are counts int64 [num_items]: exact in float32 below 2^24."""

    counts: Counts
    name = "popularity"
    uses_time = False

    @classmethod
    def fit(cls, train: Histories, num_items: int) -> Self:
        return cls(item_counts(train, num_items))

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        return np.broadcast_to(self.counts.astype(np.float32), (len(queries), len(self.counts)))


def item_counts(train: Histories, num_items: int) -> Counts:
    """int64 [num_items]; DataError where the histories have an item beyond."""
    if len(train.rows) and train.rows.max() >= num_items:
        raise DataError(f"baseline: training histories have item row {train.rows.max()}, num_items is {num_items}")
    return np.bincount(train.rows, minlength=num_items)


def back_off(counts: Counts) -> NDArray[np.float32]:
    """float32 [num_items] in [0, 1), ordered as `counts`: added to whole numbers it decides only between equal ones.

    Exact while those numbers stay below 2^23 / (number of distinct counts); above, close counts may tie.
    """
    levels, level = np.unique(counts, return_inverse=True)
    return (level / len(levels)).astype(np.float32)
