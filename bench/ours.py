"""The engine as it is measured beyond its answers: requests of many users, rows computed, seconds of the passes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from baselines.speeder import Speeder
from subject import Subject
from workload import BenchUser

from speeder_engine import Request


class Ours(Speeder):
    """`settings` are the engine's."""

    def __init__(self, subject: Subject, label: str = Speeder.label, **settings: Any) -> None:
        super().__init__(subject, **({"kv_budget": "512MiB"} | settings))
        self.label = label
        self.pass_seconds = 0.0

    def cold_request(self, user: BenchUser) -> Request:
        return self.request(user, user.history, None)

    def warm_request(self, user: BenchUser) -> Request:
        return self.request(user, user.grown, user.user_id)

    def request(self, user: BenchUser, history: tuple[int, ...], user_id: str | None) -> Request:
        candidates = self.subject.item_ids(user.candidates)
        return Request(self.subject.item_ids(history), len(candidates), user_id=user_id, candidates=candidates)

    def rows(self, call: Callable[[], object]) -> int:
        """Rows of forward passes that a call computes."""
        before = self.engine.stats().rows_computed
        call()
        return self.engine.stats().rows_computed - before

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, `pass_seconds` grows by what the passes over tensors take: the rest of a request is the host's."""
        step = self.engine._now().model_step
        plain = step.run

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            outcome = plain(*arguments, **named)
            self.pass_seconds += time.perf_counter() - started
            return outcome

        step.run = timed  # type: ignore[method-assign]
        try:
            yield
        finally:
            del step.run
