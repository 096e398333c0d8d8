"""Last-item Markov: how often an item followed the user's last one in the training histories."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.runs import ranges
from speeder_engine.data.splits import Histories, Queries
from speeder_engine.evaluation.baselines.popularity import back_off, item_counts
from speeder_engine.evaluation.scorer import CatalogueScorer


@dataclass(frozen=True, eq=False)
class LastItemMarkov(CatalogueScorer):
    """Score = number of training transitions (last item -> item); equal ones, all zeros among them, by popularity.

    The followers of item i are `followers[offsets[i]:offsets[i + 1]]`, int32, each once, with float32 `counts`.
    """

    offsets: NDArray[np.int64]
    followers: NDArray[np.int32]
    counts: NDArray[np.float32]
    popularity: NDArray[np.float32]
    name = "markov"
    uses_time = False

    @classmethod
    def fit(cls, train: Histories, num_items: int) -> Self:
        popularity = back_off(item_counts(train, num_items))
        followed = np.ones(len(train.rows), dtype=np.bool_)
        followed[train.offsets[1:][train.lengths > 0] - 1] = False  # the last of each history
        here = np.flatnonzero(followed)
        pairs = train.rows[here].astype(np.int64) * num_items + train.rows[here + 1]
        codes, counts = np.unique(pairs, return_counts=True)
        offsets = np.searchsorted(codes, np.arange(num_items + 1) * num_items)
        return cls(offsets, (codes % num_items).astype(np.int32), counts.astype(np.float32), popularity)

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = np.tile(self.popularity, (len(queries), 1))
        asked = np.flatnonzero(queries.lengths)
        last = queries.rows[queries.offsets[asked + 1] - 1]
        starts, ends = self.offsets[last], self.offsets[last + 1]
        events = ranges(starts, ends)
        scores[np.repeat(asked, ends - starts), self.followers[events]] += self.counts[events]
        return scores
