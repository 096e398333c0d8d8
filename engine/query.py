"""A request in rows: ids looked up, the window cut, what may be answered decided. Nothing is computed yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from speeder_engine.catalogue import Catalogue
from speeder_engine.config import HeadsConfig, ModelConfig
from speeder_engine.errors import InvalidRequest, UnknownItem
from speeder_engine.following import Following
from speeder_engine.prompt import PromptLayout
from speeder_engine.request import Head, Request
from speeder_engine.title import TitleTrie

Rows = NDArray[np.int32]
NOTHING: Rows = np.empty(0, np.int32)


@dataclass(frozen=True)
class Query:
    """What the inside needs of a request; `candidates` are sorted by row, so that their order can't matter."""

    request: Request
    window: Rows  # history rows the model sees, oldest first
    buckets: Rows | None  # their calendar buckets; None for a model without times
    head: Head
    candidates: Rows | None  # None: the whole catalogue
    excluded: Rows  # never answered: seen, denied
    allowed: Rows | None  # None: all
    unknown: tuple[str, ...]
    trie: TitleTrie | None = None  # of the candidates, where their titles are scored
    titles_of: int = 0  # how often the catalogue had changed when these were read
    following: Following | None = None  # what followed the window's items; none: a model without, or asked for titles

    @property
    def num_ranked(self) -> int:
        """Candidates that are rows of their own."""
        return len(self.candidates) if self.head == "rank" and self.candidates is not None else 0

    def may_answer(self, rows: Rows) -> NDArray[np.bool_]:
        """[n]: whether the request itself lets these rows be answered."""
        named = np.ones(len(rows), np.bool_)
        if len(self.excluded):
            named &= ~np.isin(rows, self.excluded)
        if self.allowed is not None:
            named &= np.isin(rows, self.allowed)
        return named

    @cached_property
    def followers(self) -> Rows:
        """Rows, ascending, that get more than the heads' own score and may be answered."""
        rows = np.empty(0, np.int32) if self.following is None else self.following.rows
        return rows[self.may_answer(rows)]

    @property
    def num_rows(self) -> int:
        """Rows of the forward pass when nothing is cached."""
        return len(self.window) + self.num_ranked + (self.trie.num_rows if self.trie is not None else 0)


def resolve(
    request: Request, catalogue: Catalogue, layout: PromptLayout, config: ModelConfig, head: Head | None = None
) -> Query:
    """Raises UnknownItem with every unknown id, or InvalidRequest; costs no computation.

    head: instead of the request's, for what reads the history alone and asks no head ("retrieve").
    """
    rows, unknown = _look_up(request, catalogue)
    history, candidates = rows["history"], rows.get("candidates")
    start = _window_start(request, len(history), layout)
    if candidates is not None:
        candidates.sort()
    excluded = [rows["deny"]] if "deny" in rows else []
    if request.exclude_seen and candidates is None:
        excluded.append(history)
    return Query(
        request=request,
        window=history[start:],
        buckets=_buckets(request, unknown, layout, len(history) - start),
        head=head or _head(request, config.heads),
        candidates=candidates,
        excluded=np.unique(np.concatenate(excluded)) if excluded else NOTHING,
        allowed=np.unique(rows["allow"]) if "allow" in rows else None,
        unknown=tuple(unknown),
    )


def _window_start(request: Request, num_known: int, layout: PromptLayout) -> int:
    """Where the window begins in the known part of the history that was sent."""
    left_out, sent = request.history_offset, len(request.history)
    needed = left_out + sent - layout.start(left_out + sent)
    if sent < needed:
        raise InvalidRequest(
            f"history_offset: with {left_out} older interactions left out the window still needs the last {needed}, "
            f"got {sent}; send more of the history"
        )
    # skipped ids shift the window towards what was left out: then it is what is there
    return max(layout.start(left_out + num_known) - left_out, 0)


def _buckets(request: Request, unknown: Sequence[str], layout: PromptLayout, window_len: int) -> Rows | None:
    """Calendar buckets of the window; bucket 0 is a time that was not given."""
    calendar = layout.config.calendar
    if calendar is None:
        if request.times is not None:
            raise InvalidRequest("times: this model was trained without; leave them out")
        return None
    if request.times is None:
        return np.zeros(window_len, np.int32)
    skipped = set(unknown)
    times = [time for item_id, time in zip(request.history, request.times, strict=True) if item_id not in skipped]
    return calendar.buckets(times[len(times) - window_len :])


def _head(request: Request, heads: HeadsConfig) -> Head:
    head = request.head or _usual_head(request.candidates is not None, heads)
    if head not in heads.names:
        others = [name for name in reversed(heads.names) if name == "retrieve" or request.candidates is not None]
        instead = f"use {' or '.join(map(repr, others))}" if others else "pass candidates"
        raise InvalidRequest(f"head: this model was trained without a {head} head; {instead}")
    return head


def _usual_head(with_candidates: bool, heads: HeadsConfig) -> Head:
    if not with_candidates:
        return "retrieve"
    return "rank" if heads.rank else "retrieve" if heads.retrieve else "title"


def _look_up(request: Request, catalogue: Catalogue) -> tuple[dict[str, Rows], list[str]]:
    """Rows of every id list the request has, and the ids that were not found."""
    rows: dict[str, Rows] = {}
    unknown: dict[str, str] = {}
    for field in ("history", "candidates", "allow", "deny"):
        ids = getattr(request, field)
        if ids is not None:
            found = catalogue.find(ids)
            if None in found:
                unknown |= {item_id: field for item_id, row in zip(ids, found, strict=True) if row is None}
                found = [row for row in found if row is not None]
            rows[field] = np.array(found, np.int32)
    if unknown and request.on_unknown == "error":
        remedy = "pass ids that are in engine.catalogue, or on_unknown='skip'"
        raise UnknownItem(unknown, ", ".join(dict.fromkeys(unknown.values())), remedy)
    return rows, list(unknown)
