"""The engine itself, as one contender among the others."""

from collections.abc import Sequence

import numpy as np
from baselines.base import Answer
from subject import Subject
from workload import BenchUser

from speeder_engine import Engine
from speeder_engine.recommends import Recommends


class Speeder:
    """`settings` are the engine's; without a user id a request leaves nothing behind."""

    key, label, has_warm, heavy = "speeder", "speeder-engine", True, False

    def __init__(self, subject: Subject, **settings: object) -> None:
        self.subject = subject
        self.engine: Engine = subject.engine(**settings)
        self.engine.warm_up()

    def answer(self, user: BenchUser) -> Answer:
        return answer_of(self.engine, self.subject, user.candidates, user.history, None)

    def warm_up(self, user: BenchUser) -> None:
        self.engine.warm(user.user_id, self.subject.item_ids(user.history))

    def answer_warm(self, user: BenchUser) -> Answer:
        return answer_of(self.engine, self.subject, user.candidates, user.grown, user.user_id)

    def close(self) -> None:
        self.engine.close()


def answer_of(
    engine: Recommends, subject: Subject, candidates: Sequence[int], history: Sequence[int], user_id: str | None
) -> Answer:
    """Of one request; -inf for a candidate that was not answered."""
    ids = subject.item_ids(candidates)
    found = dict(engine.recommend(subject.item_ids(history), len(ids), user_id=user_id, candidates=ids))
    return Answer(np.array([found.get(item_id, -np.inf) for item_id in ids], np.float32))
