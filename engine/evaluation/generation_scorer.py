"""The literature's protocol: the model writes a title, and the candidate that has it is the answer, if any has."""

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries
from speeder_engine.engine import Engine
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.request import Request


class GenerationScorer:
    """The `Scorer` of an engine that answers candidate lists in free text; the catalogue is scored as ever."""

    uses_time = False

    def __init__(self, engine: Engine, item_ids: tuple[str, ...], name: str = "speeder (generated)") -> None:
        self.name = name
        self.engine = engine
        self.catalogue = EngineScorer(engine, item_ids)

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        return self.catalogue.scores(queries)

    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """0 for the candidate whose title was written, -inf for the others: what is no title of theirs is invalid."""
        named = [self.catalogue.ids(rows) for rows in candidates]
        scorer = self.catalogue
        requests = [
            Request(scorer.ids(queries.history(q)), candidates=ids, times=scorer.times(queries, q))
            for q, ids in enumerate(named)
        ]
        scores = np.full(candidates.shape, -np.inf, np.float32)
        for q, answer in enumerate(self.engine.generate(requests)):
            if answer.item_id is not None:
                scores[q, named[q].index(answer.item_id)] = 0.0
        return scores
