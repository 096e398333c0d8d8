"""The engine itself, as one contender among the others."""

import numpy as np
from baselines.base import Answer
from subject import Subject
from workload import BenchUser

from speeder_engine import Engine
from speeder_engine.request import Ranking


class Speeder:
    """`settings` are the engine's; without a user id a request leaves nothing behind."""

    key, label, has_warm, heavy = "speeder", "speeder-engine", True, False

    def __init__(self, subject: Subject, **settings: object) -> None:
        self.subject = subject
        self.engine: Engine = subject.engine(**settings)
        self.engine.warm_up()

    def answer(self, user: BenchUser) -> Answer:
        return self._answer(user, user.history, None)

    def warm_up(self, user: BenchUser) -> None:
        self.engine.warm(user.user_id, self.subject.item_ids(user.history))

    def answer_warm(self, user: BenchUser) -> Answer:
        return self._answer(user, user.grown, user.user_id)

    def _answer(self, user: BenchUser, history: tuple[int, ...], user_id: str | None) -> Answer:
        candidates = self.subject.item_ids(user.candidates)
        ranking = self.engine.recommend(
            self.subject.item_ids(history), len(candidates), user_id=user_id, candidates=candidates
        )
        return Answer(scores_of(ranking, candidates))

    def close(self) -> None:
        self.engine.close()


def scores_of(ranking: Ranking, candidates: list[str]) -> "np.typing.NDArray[np.float32]":
    """In the candidates' order; -inf for what was not answered."""
    found = dict(ranking)
    return np.array([found.get(item_id, -np.inf) for item_id in candidates], np.float32)
