"""Session: a user's history, held for callers who would rather append than send all of it with every request."""

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from speeder_engine.errors import InvalidRequest
from speeder_engine.request import Head, OnUnknown, Ranking, Request, finite_times, item_ids


class Serves(Protocol):
    """What a session needs of an engine."""

    def recommend_many(self, requests: Iterable[Request]) -> list[Ranking]: ...

    def warm(
        self,
        user_id: str,
        history: Sequence[str],
        *,
        times: Sequence[float] | None = None,
        on_unknown: OnUnknown = "error",
    ) -> int: ...

    def check_items(self, ids: Sequence[str], where: str) -> None: ...

    @property
    def reads_times(self) -> bool: ...

    def held_history(self, user_id: str, keep: bool) -> "History": ...

    def close_session(self, user_id: str) -> bool: ...


class History:
    """What a session holds: item ids and, where they were given, times. It knows no engine, which holds it."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()


class Session:
    """`append` what a user takes, `recommend` what comes next. Safe to use from several threads.

    It holds item ids; keys and values are the engine's, which may forget them: then they are computed again. After a
    `close`, whoever called it, the history is empty, and what is appended begins another.
    """

    def __init__(self, engine: Serves, user_id: str) -> None:
        self.user_id = user_id
        self._engine = engine

    @property
    def history(self) -> tuple[str, ...]:
        """Item ids, oldest first."""
        return self._read()[0]

    @property
    def times(self) -> tuple[float, ...]:
        """Unix seconds of each; none where they were not given."""
        return self._read()[1] or ()

    def __len__(self) -> int:
        return len(self._read()[0])

    def append(self, *ids: str, times: Sequence[float] | None = None) -> "Session":
        """Adds interactions, oldest first; returns the session. Raises UnknownItem or InvalidRequest, nothing added.

        times: Unix seconds of each, for models that were trained with them: then with every append, or never.
        """
        items, seconds = self._checked(ids, times, "append")
        with (held := self._held(keep=True)).lock:
            if items and held.times and not seconds and not self._engine.reads_times:
                held.times.clear()  # of a model from before a reload: nobody reads them any more
            if items and held.ids and bool(seconds) != bool(held.times):
                raise InvalidRequest("append: give times with every append of a session, or with none")
            held.ids.extend(items)
            held.times.extend(seconds)
        return self

    def replace(self, history: Sequence[str], times: Sequence[float] | None = None) -> "Session":
        """Puts another history in place: a correction, a deletion. Raises as `append`, the old one kept."""
        items, seconds = self._checked(item_ids(history, "history"), times, "replace")
        with (held := self._held(keep=True)).lock:
            held.ids, held.times = list(items), list(seconds)
        return self

    def _checked(
        self, ids: Sequence[str], times: Sequence[float] | None, where: str
    ) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Item ids and their times, none where none are given."""
        checked = item_ids(ids, where)
        seconds = () if times is None else finite_times(times, len(checked), f"{where}: times")
        if seconds and not self._engine.reads_times and not self._held(keep=False).times:
            raise InvalidRequest(f"{where}: times: this model was trained without; leave them out")
        self._engine.check_items(checked, where)
        return checked, seconds

    def recommend(
        self,
        k: int = 10,
        *,
        candidates: Sequence[str] | None = None,
        head: Head | None = None,
        exclude_seen: bool = True,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        on_unknown: OnUnknown = "error",
    ) -> Ranking:
        """As `Engine.recommend` of this history, of this user."""
        history, times = self._to_send()
        request = Request(
            history,
            k,
            user_id=self.user_id,
            candidates=candidates,
            head=head,
            exclude_seen=exclude_seen,
            allow=allow,
            deny=deny,
            times=times,
            on_unknown=on_unknown,
        )
        return self._engine.recommend_many([request])[0]

    def warm(self, on_unknown: OnUnknown = "error") -> int:
        """Computes what is not cached yet, ahead of the next request; returns the rows that took.

        on_unknown: as a request's; "skip" for items that a model from before a reload knew.
        """
        history, times = self._to_send()
        return self._engine.warm(self.user_id, history, times=times, on_unknown=on_unknown)

    def _to_send(self) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        """History and times, these where the model reads any: what it held of one from before a reload stays held."""
        history, times = self._read()
        return history, times if self._engine.reads_times else None

    def _read(self) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        """History and times of one moment."""
        with (held := self._held(keep=False)).lock:
            return tuple(held.ids), tuple(held.times) or None

    def _held(self, keep: bool) -> History:
        """Asked for at every use: a session that was closed must not go on with what was to be forgotten."""
        return self._engine.held_history(self.user_id, keep)

    def close(self) -> bool:
        """As `Engine.close_session` of this user."""
        return self._engine.close_session(self.user_id)
