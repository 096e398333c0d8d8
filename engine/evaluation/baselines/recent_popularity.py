"""Recent popularity: how often an item was taken in the days before the query, or before the history's end."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Histories, Part, Queries, Split
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines.popularity import back_off, item_counts
from speeder_engine.evaluation.scorer import CatalogueScorer
from speeder_engine.live_prior import SECONDS_A_DAY
from speeder_engine.runs import Runs

BEFORE_ALL = np.iinfo(np.int64).min // 2


@dataclass(frozen=True, eq=False)
class RecentPopularity(CatalogueScorer):
    """Score = number of events of the item with moment - days <= time < moment, all users'.

    The moment is the query's time, or, `until` "last", that of the history's last event: known without the query's.
    `fit` counts training events: validation and test targets never, not even those before the moment. `fit_live`
    counts all that was known at the moment, others' targets among them (those of the test only for the test's own
    queries); the query's own target is not earlier than itself. Equal counts, an empty window among them, go by overall
    popularity in training.
    `times` int64 [N] Unix seconds ascending, `rows` int32 [N], `popularity` float32 [num_items] in [0, 1).
    """

    name: str
    days: float
    until: Literal["query", "last"]
    times: NDArray[np.int64]
    rows: NDArray[np.int32]
    popularity: NDArray[np.float32]

    def __post_init__(self) -> None:
        if not self.days > 0:
            raise ConfigError(f"{self.name}: days {self.days} must be above 0")

    @property
    def uses_time(self) -> bool:
        return self.until == "query"

    @classmethod
    def fit(
        cls,
        train: Histories,
        num_items: int,
        days: float = 14,
        name: str = "recent_popularity",
        until: Literal["query", "last"] = "query",
    ) -> Self:
        return cls._of(name, days, until, train, back_off(item_counts(train, num_items)))

    @classmethod
    def fit_live(cls, split: Split, days: float = 14, name: str = "live_popularity", part: Part = "test") -> Self:
        popularity = back_off(item_counts(split.train, split.dataset.num_items))
        return cls._of(name, days, "query", split.known(part), popularity)

    @classmethod
    def _of(
        cls, name: str, days: float, until: Literal["query", "last"], events: Runs, popularity: NDArray[np.float32]
    ) -> Self:
        if events.times is None:
            raise DataError(f"{name}: the interactions have no times; give a time column or leave it out")
        order = np.argsort(events.times, kind="stable")
        return cls(name, days, until, events.times[order], events.rows[order], popularity)

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """One sweep in the order of time: the window's counts gain what enters and lose what leaves."""
        moments = self._moments(queries)
        order = np.argsort(moments, kind="stable")
        now = moments[order]
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

    def _moments(self, queries: Queries) -> NDArray[np.int64]:
        """int64 [Q]; an empty history ends before all events."""
        times = queries.query_times if self.until == "query" else queries.times
        if times is None:
            raise DataError(f"{self.name}: the queries have no times; evaluate on data with a time column")
        if self.until == "query":
            return times
        moments = np.full(len(queries), BEFORE_ALL)
        asked = np.flatnonzero(queries.lengths)
        moments[asked] = times[queries.offsets[asked + 1] - 1]
        return moments
