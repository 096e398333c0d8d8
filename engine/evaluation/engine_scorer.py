"""Scores with a loaded Engine, through the same requests its users send."""

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries
from speeder_engine.engine import Engine
from speeder_engine.errors import DataError, name_some
from speeder_engine.request import Head, Request


class EngineScorer:
    """The `Scorer` of an engine on a dataset whose items, in row order, are `item_ids`.

    head: what scores candidates, "title" for instance; none: what the engine takes by itself. Without a retrieve head
    the engine has no answer out of the whole catalogue: all scores are -inf.
    """

    uses_time = False

    def __init__(
        self, engine: Engine, item_ids: tuple[str, ...], name: str = "speeder", head: Head | None = None
    ) -> None:
        missing = [item_id for item_id in item_ids if item_id not in engine.catalogue]
        if missing:
            raise DataError(f"evaluation: the engine doesn't know {name_some(missing)}; evaluate on the data it serves")
        self.name = name
        self.engine = engine
        self.head = head
        self.item_ids = item_ids
        self.reads_times = engine.parts.config.prompt.calendar is not None

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        if not self.engine.parts.config.heads.retrieve:
            return np.full((len(queries), len(self.item_ids)), -np.inf, np.float32)
        requests = [Request(self.ids(queries.history(q)), times=self.times(queries, q)) for q in range(len(queries))]
        return self.engine.scores(requests, self.item_ids)

    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """By the engine's head for candidates; an item it doesn't rank has -inf."""
        count = candidates.shape[1]
        requests = [
            Request(
                self.ids(queries.history(q)),
                count,
                candidates=self.ids(candidates[q]),
                head=self.head,
                times=self.times(queries, q),
            )
            for q in range(len(queries))
        ]
        scores = np.full(candidates.shape, -np.inf, np.float32)
        for q, ranking in enumerate(self.engine.recommend_many(requests)):
            found = dict(ranking)
            scores[q] = [found.get(item_id, -np.inf) for item_id in requests[q].candidates or ()]
        return scores

    def times(self, queries: Queries, q: int) -> list[float] | None:
        """Of query q's interactions, for a model that reads them."""
        times = queries.history_times(q) if self.reads_times else None
        return None if times is None else times.tolist()

    def ids(self, rows: NDArray[np.int32]) -> list[str]:
        return [self.item_ids[row] for row in rows]
