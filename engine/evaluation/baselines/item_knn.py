"""ItemKNN: items that stood near a user's last ones in the training histories, popular ones held back."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Histories, Queries
from speeder_engine.encoders.pairs import count_followers
from speeder_engine.errors import ConfigError
from speeder_engine.evaluation.baselines.popularity import back_off, item_counts
from speeder_engine.evaluation.scorer import CatalogueScorer
from speeder_engine.followers import Followers


@dataclass(frozen=True)
class ItemKNNConfig:
    """Similarity of i and j = pairs(i, j) / (count(i)^beta count(j)^alpha): .5 and .5 are the cosine.

    `window`: how many events apart a pair may stand, None for a whole history; `forward`: j must be the later one.
    A query looks at the `last` items of its history, each `decay` times the weight of the one after it.
    The defaults were chosen on validation, docs/results.md has the search.
    """

    window: int | None = 10
    forward: bool = True
    alpha: float = 0.3
    beta: float = 0.5
    last: int = 20
    decay: float = 0.7

    def __post_init__(self) -> None:
        if self.last < 1 or (self.window is not None and self.window < 1):
            raise ConfigError(f"itemknn: last {self.last} and window {self.window} must be at least 1")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"itemknn: decay {self.decay} must be in (0, 1]")
        if self.alpha < 0 or self.beta < 0:
            raise ConfigError(f"itemknn: alpha {self.alpha} and beta {self.beta} must not be negative")


@dataclass(frozen=True, eq=False)
class ItemKNN(CatalogueScorer):
    """Score = similarities to the history's last items, summed; items near none of them follow, by popularity.

    `followers` hold similarities; `popularity` float32 [num_items] in [0, 1).
    """

    config: ItemKNNConfig
    followers: Followers
    popularity: NDArray[np.float32]
    name = "itemknn"
    uses_time = False

    @classmethod
    def fit(cls, train: Histories, num_items: int, config: ItemKNNConfig | None = None) -> Self:
        config = config or ItemKNNConfig()
        counts = item_counts(train, num_items)
        followers = count_followers(train.offsets, train.rows, num_items, config.window, config.forward)
        taken = np.maximum(counts, 1).astype(np.float64)
        return cls(config, followers.scaled(taken**-config.beta, taken**-config.alpha), back_off(counts))

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = np.zeros((len(queries), len(self.popularity)), np.float32)
        for back in range(min(self.config.last, int(queries.lengths.max(initial=0)))):
            asked = np.flatnonzero(queries.lengths > back)
            items = queries.rows[queries.offsets[asked + 1] - 1 - back]
            self.followers.add_to(scores, asked, items, self.config.decay**back)
        return np.where(scores > 0, scores, self.popularity - 1)
