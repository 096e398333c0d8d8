"""The waiting queue and what goes into a step: first come, first served, within the row budget. Speaks lengths, never
tensors; runs nothing itself."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

from speeder_engine.config import EngineConfig
from speeder_engine.errors import DeadlineExceeded, EngineClosed, QueueFull
from speeder_engine.query import Query
from speeder_engine.request import Ranking

CountRows = Callable[[Sequence[Query]], list[int]]  # that each would compute now, its session counted in


def cut_into_steps(queries: Sequence[Query], count_rows: CountRows, config: EngineConfig) -> Iterator[slice]:
    """Consecutive slices of queries: each within `max_batch_users` and, unless it is a single query, within
    `max_batch_rows`. What is cached of them is only asked for where it decides."""
    counts = [query.num_rows for query in queries]
    if len(counts) > config.max_batch_users or sum(counts) > config.max_batch_rows:
        counts = count_rows(queries)
    start = rows = 0
    for index, count in enumerate(counts):
        full = index - start == config.max_batch_users or rows + count > config.max_batch_rows
        if full and index > start:
            yield slice(start, index)
            start, rows = index, 0
        rows += count
    if start < len(counts):
        yield slice(start, len(counts))


@dataclass(eq=False)
class Waiting:
    """A submitted request. Its future starts with the step that takes it; until then it can be cancelled."""

    query: Query
    owner: object  # who resolved the query: a reloaded engine resolves it anew
    timeout_ms: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    future: "Future[Ranking]" = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Ends it with `error`, unless it was cancelled or has ended."""
        if not self.future.done() and (self.future.running() or self.future.set_running_or_notify_cancel()):
            self.future.set_exception(error)

    def ripe_at(self, batch_wait_ms: float) -> float:
        """When it has waited long enough for company: before its deadline in any case."""
        wait_ms = batch_wait_ms if self.timeout_ms is None else min(batch_wait_ms, self.timeout_ms / 2)
        return self.arrived + wait_ms / 1e3

    def is_gone(self) -> bool:
        """True if it was cancelled, or if its deadline has passed: then it fails with DeadlineExceeded."""
        if self.timeout_ms is not None and time.monotonic() >= self.arrived + self.timeout_ms / 1e3:
            self.fail(deadline_error(self.timeout_ms))
        return self.future.done()


class Scheduler:
    """Holds at most `max_waiting` requests. `put` from any thread; one thread calls `wait` and `take`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._waiting: list[Waiting] = []
        self._changed = threading.Condition()
        self._closed = False
        self.num_refused = 0
        self.num_expired = 0

    def __len__(self) -> int:
        return sum(not each.future.done() for each in self._waiting)

    def put(self, query: Query, owner: object, timeout_ms: float | None = None) -> Waiting:
        """Raises QueueFull at once where no more may wait, EngineClosed after `close`."""
        waiting = Waiting(query, owner, timeout_ms)
        with self._changed:
            if self._closed:
                raise EngineClosed("submit: the engine is closed; load another")
            if len(self._waiting) >= self.config.max_waiting:
                self._waiting = [each for each in self._waiting if not each.is_gone()]
            if len(self._waiting) >= self.config.max_waiting:
                self.num_refused += 1
                raise QueueFull(
                    f"submit: {len(self._waiting)} requests are waiting, max_waiting is {self.config.max_waiting}; "
                    "try again later, or send the user elsewhere"
                )
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting

    def wait(self) -> bool:
        """Until there is something to take: at once where a step's worth is waiting, else when some request has waited
        `batch_wait_ms` (or half of its own time, if that is less) for company. False when closed."""
        with self._changed:
            while not self._closed:
                if self._waiting and not self.config.batch_wait_ms:
                    return True  # nobody need be asked; `take` drops who is gone
                self._waiting = [each for each in self._waiting if not each.future.done()]  # nobody's company
                if not self._waiting:
                    self._changed.wait()
                    continue
                if len(self._waiting) >= self.config.max_batch_users or self._is_full():
                    return True
                left = min(each.ripe_at(self.config.batch_wait_ms) for each in self._waiting) - time.monotonic()
                if left <= 0:
                    return True
                self._changed.wait(left)
            return False

    def _is_full(self) -> bool:
        """Whether the row budget is used up even if every session is warm; cheap, so that arrivals may ask it."""
        ranked = sum(each.query.num_rows - len(each.query.window) for each in self._waiting)
        return ranked >= self.config.max_batch_rows

    def take(self, refresh: Callable[[Waiting], None], count_rows: CountRows) -> list[Waiting]:
        """The next step's requests, started: oldest first, within the row budget (a single one may exceed it), one of
        each user, so that the second finds what the first has cached. Cancelled and expired ones are dropped.

        `refresh` brings a request up to date with what serves now, or fails it.
        """
        with self._changed:
            for waiting in self._waiting:
                if not waiting.is_gone():
                    refresh(waiting)
            self._waiting = [each for each in self._waiting if not each.is_gone()]
            chosen = self._admit(count_rows)
            taken = [each for each in chosen if each.future.set_running_or_notify_cancel()]
            left = set(chosen)
            self._waiting = [each for each in self._waiting if each not in left]
            return taken

    def _admit(self, count_rows: CountRows) -> list[Waiting]:
        candidates = list(islice(self._first_of_each_user(), self.config.max_batch_users))
        steps = cut_into_steps([each.query for each in candidates], count_rows, self.config)
        return candidates[next(steps, slice(0, 0))]

    def _first_of_each_user(self) -> Iterator[Waiting]:
        users: set[str] = set()
        for waiting in self._waiting:
            user = waiting.query.request.user_id
            if user is None or user not in users:
                yield waiting
            if user is not None:
                users.add(user)

    def count_expired(self) -> None:
        with self._changed:
            self.num_expired += 1

    def close(self) -> None:
        """Whoever waits gets EngineClosed; `wait` ends. A second time is harmless."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for waiting in left:
            waiting.fail(EngineClosed("submit: the engine was closed before it answered"))


def deadline_error(timeout_ms: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"submit: still waiting after timeout_ms={timeout_ms:g}; allow more time, or submit fewer requests at once"
    )
