"""Recommends: a question asked with arguments, whatever kind of engine answers it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NoReturn

from speeder_engine.request import Head, OnUnknown, Ranking, Request


class Recommends(ABC):
    """`recommend` for whatever has a `recommend_many`: a question with arguments is one request."""

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"{name}: can't be pickled or copied; call {name}.load in every process that needs one")

    @abstractmethod
    def recommend_many(self, requests: Iterable[Request]) -> list[Ranking]:
        """Answers in the order of the requests, all of which are checked before the first is computed."""

    def recommend(
        self,
        history: Sequence[str],
        k: int = 10,
        *,
        user_id: str | None = None,
        candidates: Sequence[str] | None = None,
        head: Head | None = None,
        exclude_seen: bool = True,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        history_offset: int = 0,
        times: Sequence[float] | None = None,
        on_unknown: OnUnknown = "error",
    ) -> Ranking:
        """The k best next items after `history` (item ids, oldest first); `Request` describes every argument.

        Raises UnknownItem or InvalidRequest before anything is computed.
        """
        request = Request(
            history,
            k,
            user_id=user_id,
            candidates=candidates,
            head=head,
            exclude_seen=exclude_seen,
            allow=allow,
            deny=deny,
            history_offset=history_offset,
            times=times,
            on_unknown=on_unknown,
        )
        return self.recommend_many([request])[0]
