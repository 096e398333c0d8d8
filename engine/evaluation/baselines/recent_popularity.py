"""Recent popularity: how often an item was taken in the days before the query. Knows the query's time."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Histories, Queries
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines.popularity import back_off, item_counts
from speeder_engine.evaluation.scorer import CatalogueScorer

SECONDS_A_DAY = 86_400


@dataclass(frozen=True, eq=False)
class RecentPopularity(CatalogueScorer):
    """Score = number of training events of the item with query time - days <= time < query time, all users'.

    Training events are those of the split's train part: validation and test targets are never counted, not even
    those that lie before the query. Equal counts, an empty window among them, go by overall popularity.
    `times` int64 [N] Unix seconds ascending, `rows` int32 [N], `popularity` float32 [num_items] in [0, 1).
    """

    days: float
    times: NDArray[np.int64]
    rows: NDArray[np.int32]
    popularity: NDArray[np.float32]
    name = "recent_popularity"
    uses_time = True

    def __post_init__(self) -> None:
        if not self.days > 0:
            raise ConfigError(f"recent_popularity: days {self.days} must be above 0")

    @classmethod
    def fit(cls, train: Histories, num_items: int, days: float = 14) -> Self:
        if train.times is None:
            raise DataError("recent_popularity: the interactions have no times; give a time column or leave it out")
        order = np.argsort(train.times, kind="stable")
        popularity = back_off(item_counts(train, num_items))
        return cls(days, train.times[order], train.rows[order], popularity)

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """One sweep in the order of time: the window's counts gain what enters and lose what leaves."""
        if queries.query_times is None:
            raise DataError("recent_popularity: the queries have no times; evaluate on data with a time column")
        order = np.argsort(queries.query_times, kind="stable")
        now = queries.query_times[order]
        starts = np.searchsorted(self.times, now - round(self.days * SECONDS_A_DAY))
        ends = np.searchsorted(self.times, now)
        scores = np.empty((len(queries), len(self.popularity)), dtype=np.float32)
        counts = np.zeros(len(self.popularity), dtype=np.int64)
        start = end = 0
        for query, next_start, next_end in zip(order, starts, ends, strict=True):
            counts += np.bincount(self.rows[end:next_end], minlength=len(counts))
            counts -= np.bincount(self.rows[start:next_start], minlength=len(counts))
            start, end = next_start, next_end
            np.add(counts, self.popularity, out=scores[query], casting="unsafe")
        return scores
