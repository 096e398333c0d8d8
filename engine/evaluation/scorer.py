"""The one face of everything that is evaluated: the torch model, the engine, a baseline. It knows no metric."""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries


class Scorer(Protocol):
    """Scores items for a batch of queries: higher is better, -inf is no answer, NaN and +inf are errors.

    `uses_time` is true where a score depends on `queries.query_times`: such a system is compared only with its like.
    """

    @property
    def name(self) -> str: ...

    @property
    def uses_time(self) -> bool: ...

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """[Q, num_items] over the whole catalogue, the history not masked. The caller never writes into it."""
        ...

    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """[Q, C] for the candidate rows [Q, C]; a query without a finite score counts as an invalid answer."""
        ...


class CatalogueScorer(ABC):
    """A scorer without a head of its own for candidates: their scores are picked from those of the catalogue."""

    @abstractmethod
    def scores(self, queries: Queries) -> NDArray[np.float32]: ...

    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.take_along_axis(self.scores(queries), candidates, axis=1)
