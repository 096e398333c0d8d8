"""Last-item Markov: how often an item followed the user's last one in the training histories."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Histories, Queries
from speeder_engine.encoders.pairs import count_followers
from speeder_engine.evaluation.baselines.popularity import back_off, item_counts
from speeder_engine.evaluation.scorer import CatalogueScorer
from speeder_engine.followers import Followers


@dataclass(frozen=True, eq=False)
class LastItemMarkov(CatalogueScorer):
    """Score = number of training transitions (last item -> item); equal ones, all zeros among them, by popularity.

    `popularity` float32 [num_items] in [0, 1).
    """

    followers: Followers
    popularity: NDArray[np.float32]
    name = "markov"
    uses_time = False

    @classmethod
    def fit(cls, train: Histories, num_items: int) -> Self:
        popularity = back_off(item_counts(train, num_items))
        return cls(count_followers(train.offsets, train.rows, num_items), popularity)

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = np.tile(self.popularity, (len(queries), 1))
        asked = np.flatnonzero(queries.lengths)
        self.followers.add_to(scores, asked, queries.rows[queries.offsets[asked + 1] - 1])
        return scores
