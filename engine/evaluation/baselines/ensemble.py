"""Several systems as one: the weighted sum of their scores, weights chosen by NDCG@10 on the validation queries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import mask_history, ndcg, target_ranks
from speeder_engine.evaluation.scorer import CatalogueScorer, Scorer
from speeder_engine.progress import track

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
AT_ONCE = 512


@dataclass(frozen=True)
class Member:
    """`damped`: for scores that are counts, whose square root is taken; what is below 0 (a back-off) counts as 0."""

    scorer: Scorer
    damped: bool

    def normed(self, queries: Queries) -> NDArray[np.float32]:
        """[Q, num_items], over the catalogue with mean 0 and variance 1 in each query; 0 where all are equal."""
        scores = self.scorer.scores(queries)
        scores = np.sqrt(np.maximum(scores, 0)) if self.damped else scores
        centred = scores - scores.mean(axis=1, keepdims=True)
        # a rounding of the mean must not become a ranking
        differ = scores.max(axis=1, keepdims=True) > scores.min(axis=1, keepdims=True)
        return np.where(differ, centred / np.where(differ, centred.std(axis=1, keepdims=True), 1), 0)


@dataclass(frozen=True, eq=False)
class Ensemble(CatalogueScorer):
    """`weights[m]` belongs to `members[m]`; the first one's is 1. `validated`: NDCG@10 by which they were chosen."""

    name: str
    members: Sequence[Member]
    weights: tuple[float, ...]
    validated: float = math.nan

    def __post_init__(self) -> None:
        if len(self.members) < 2 or len(self.weights) != len(self.members):
            raise ConfigError(f"{self.name}: takes two members or more and a weight each, not {self.weights}")

    @property
    def uses_time(self) -> bool:
        return any(member.scorer.uses_time for member in self.members)

    @classmethod
    def fit(cls, name: str, members: Sequence[Member], validation: Queries) -> Self:
        """Tries all of WEIGHTS for every member but the first; of equally good ones the smallest are taken."""
        if not len(validation):
            raise DataError(f"{name}: no validation queries to weigh it by; these take users with three interactions")
        tried = [(1.0, *rest) for rest in product(WEIGHTS, repeat=len(members) - 1)]
        gains = np.zeros(len(tried))
        for start in track(range(0, len(validation), AT_ONCE), f"weighing {name}"):
            batch = validation.slice(start, start + AT_ONCE)
            normed = [member.normed(batch) for member in members]
            for place, weights in enumerate(tried):
                scores = mask_history(_weighted(normed, weights), batch.offsets, batch.rows, batch.targets)
                gains[place] += ndcg(target_ranks(scores, batch.targets), 10).sum()
        best = int(gains.argmax())
        return cls(name, members, tried[best], float(gains[best] / len(validation)))

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        return _weighted([member.normed(queries) for member in self.members], self.weights)


def _weighted(scores: Sequence[NDArray[np.float32]], weights: Sequence[float]) -> NDArray[np.float32]:
    total = np.zeros_like(scores[0])
    for each, weight in zip(scores, weights, strict=True):
        if weight:
            total += np.float32(weight) * each
    return total
