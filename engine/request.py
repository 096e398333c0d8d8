"""Request and Ranking: what goes in and what comes out, as values. They know item ids, no rows and no catalogue."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from speeder_engine.checks import LATEST_SECOND, is_unicode, repeated
from speeder_engine.errors import InvalidRequest, name_some, shown

Head = Literal["retrieve", "rank", "title"]
OnUnknown = Literal["error", "skip"]
T = TypeVar("T")
LONGEST_USER_ID = 512


@dataclass(frozen=True)
class Request:
    """One question. Checked when made; whether the ids exist is the catalogue's to say.

    history: item ids, oldest first; may be empty. k: how many items at most. user_id: names a session, whose keys and
    values are reused as far as they were computed from this very history; at most 512 characters. candidates: rank
    these (even if seen) instead of the whole catalogue. head: "retrieve" without candidates, "rank" with, unless said
    otherwise ("title": the likelihood of the candidates' titles; one without is not answered). exclude_seen: the
    history is not recommended again. allow, deny: only these, none of these. history_offset: how many older
    interactions the caller left out (what the window needs is counted with ids that are skipped). times: Unix seconds
    of the history, one each, for a model that was trained with them (a calendar). on_unknown: "error", or "skip" ids
    that are not in the catalogue (the ranking lists them).
    """

    history: Sequence[str]
    k: int = 10
    user_id: str | None = field(default=None, kw_only=True)
    candidates: Sequence[str] | None = field(default=None, kw_only=True)
    head: Head | None = field(default=None, kw_only=True)
    exclude_seen: bool = field(default=True, kw_only=True)
    allow: Sequence[str] | None = field(default=None, kw_only=True)
    deny: Sequence[str] | None = field(default=None, kw_only=True)
    history_offset: int = field(default=0, kw_only=True)
    times: Sequence[float] | None = field(default=None, kw_only=True)
    on_unknown: OnUnknown = field(default="error", kw_only=True)

    # a web framework that reads requests through pydantic refuses misspelt fields, as Python does
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number("k", self.k, 1))
        object.__setattr__(self, "history_offset", whole_number("history_offset", self.history_offset, 0))
        object.__setattr__(self, "history", item_ids(self.history, "history"))
        for name in ("candidates", "allow", "deny"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, item_ids(getattr(self, name), name))
        self._check_candidates()
        if self.times is not None:
            object.__setattr__(self, "times", finite_times(self.times, len(self.history), "times"))
        if self.user_id is not None:
            check_user(self.user_id)
        object.__setattr__(self, "exclude_seen", true_or_false("exclude_seen", self.exclude_seen))
        if not isinstance(self.head, str | None) or self.head not in (None, "retrieve", "rank", "title"):
            choice = "choose 'retrieve', 'rank' or 'title'"
            raise InvalidRequest(f"head: {shown(self.head)} is no head of this engine; {choice}")
        if self.head in ("rank", "title") and self.candidates is None:
            raise InvalidRequest(f"head: {self.head!r} scores named candidates; pass candidates, or use 'retrieve'")
        if not isinstance(self.on_unknown, str) or self.on_unknown not in ("error", "skip"):
            raise InvalidRequest(f"on_unknown: {shown(self.on_unknown)}; choose 'error' or 'skip'")

    def _check_candidates(self) -> None:
        if self.candidates is None:
            return
        if not self.candidates:
            raise InvalidRequest("candidates: the list is empty; pass None to search the whole catalogue")
        if len(set(self.candidates)) < len(self.candidates):
            raise InvalidRequest(f"candidates: {name_some(repeated(self.candidates))} more than once; name each once")


@dataclass(frozen=True)
class Ranking:
    """At most k items, best first. Iterates over (item id, score); equal scores keep the catalogue's order."""

    items: tuple[str, ...]
    scores: tuple[float, ...]
    unknown: tuple[str, ...] = ()  # ids of the request that were skipped

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(zip(self.items, self.scores, strict=True))


@dataclass(frozen=True)
class Generation:
    """What a model wrote as the next item's title; `valid` where it is the title of an item that may be answered."""

    text: str
    item_id: str | None
    valid: bool


def requests_of(values: Iterable[Request], where: str) -> list[Request]:
    """The requests as a list; InvalidRequest for what isn't one."""
    return all_of(values, Request, where, "[Request(history)]")


def all_of(values: Iterable[T], kind: type[T], where: str, example: str) -> list[T]:
    """The values as a list, or InvalidRequest where they are not all of this kind."""
    if isinstance(values, kind) or not isinstance(values, Iterable):
        got = type(values).__name__
        raise InvalidRequest(f"{where}: expected a list of {kind.__name__}s, got {got}; write {example}")
    listed = list(values)
    strange = [value for value in listed if not isinstance(value, kind)]
    if strange:
        got = type(strange[0]).__name__
        raise InvalidRequest(f"{where}: expected {kind.__name__}s, got {got}; write {example}")
    return listed


def item_ids(value: object, where: str) -> tuple[str, ...]:
    """Any iterable of strings as a tuple; a bare string, which iterates over its letters, is refused."""
    if isinstance(value, str | bytes):
        text = shown(value)
        raise InvalidRequest(f"{where}: expected a list of item ids, got the string {text}; write [{text}]")
    if where == "history" and isinstance(value, Set | Mapping):
        raise InvalidRequest(f"history: a {type(value).__name__} has no order; pass a list, oldest first")
    try:
        ids: tuple[object, ...] = tuple(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidRequest(f"{where}: expected a list of item ids, got {shown(value)}") from None
    if not {str}.issuperset(map(type, ids)):  # a subclass of str is one, too
        for item_id in ids:
            if not isinstance(item_id, str):
                raise InvalidRequest(f"{where}: item ids are strings, got {shown(item_id)} ({type(item_id).__name__})")
    texts: tuple[str, ...] = ids  # type: ignore[assignment]
    if not is_unicode("".join(texts)):  # an unknown one is told back, and could not be written there
        strange = next(each for each in texts if not is_unicode(each))
        raise InvalidRequest(f"{where}: item id {shown(strange)} is no valid Unicode text")
    return texts


def whole_number(name: str, value: Any, least: int) -> int:
    """Any integer type but bool, numpy's too."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:  # arrays have an __index__ that refuses
        number = None
    if number is None or number < least:
        raise InvalidRequest(f"{name}: expected a whole number of at least {least}, got {shown(value)}")
    return number


def true_or_false(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidRequest(f"{name}: expected true or false, got {shown(value)}")
    return bool(value)


def finite_times(times: Any, count: int, where: str) -> tuple[float, ...]:
    """Unix seconds, any iterable of numbers, as floats: one for each of `count` interactions; InvalidRequest for
    others, milliseconds among them."""
    try:
        found = None if isinstance(times, str | bytes) else tuple(float(time) for time in times)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None:
        wanted = f"expected Unix seconds, one for each of {count} interactions"
        raise InvalidRequest(f"{where}: {wanted}, got {shown(times)}")
    if len(found) != count:
        raise InvalidRequest(f"{where}: {len(found)} for {count} interactions; give one for each")
    if not all(math.isfinite(time) for time in found):
        raise InvalidRequest(f"{where}: they must be finite; leave `times` out where they are not known")
    furthest = max(found, key=abs, default=0.0)
    if abs(furthest) > LATEST_SECOND:
        raise InvalidRequest(f"{where}: {furthest:.0f} s is thousands of years away; divide milliseconds by 1000")
    return found


def check_user(user_id: object) -> None:
    if not isinstance(user_id, str):
        raise InvalidRequest(f"user_id: expected a string, got {shown(user_id)}")
    if not is_unicode(user_id):
        raise InvalidRequest(f"user_id: {shown(user_id)} is no valid Unicode text")
    if len(user_id) > LONGEST_USER_ID:
        said = f"{len(user_id):,} characters, at most {LONGEST_USER_ID}"
        raise InvalidRequest(f"user_id: {said}; sessions are kept by it, take a short one")
