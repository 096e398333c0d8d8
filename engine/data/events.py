"""Events: interactions in terms of a catalogue's rows, in order and cleaned. Knows no core and no split."""

from dataclasses import dataclass
from typing import Any
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.interactions import Interactions
from speeder_engine.data.items import Items
from speeder_engine.errors import DataError, SpeederWarning, name_some


@dataclass(frozen=True, eq=False)
class Events:
    """Columns [N]: user codes, item rows (-1: unknown), Unix seconds."""

    users: NDArray[np.int32]
    rows: NDArray[np.int32]
    times: NDArray[np.int64] | None

    @property
    def num_users(self) -> int:
        return int(np.count_nonzero(np.bincount(self.users)))

    def take(self, chosen: NDArray[Any]) -> "Events":
        times = None if self.times is None else self.times[chosen]
        return Events(self.users[chosen], self.rows[chosen], times)


def sorted_events(name: str, interactions: Interactions, items: Items) -> Events:
    """By user, then time; stable. Those of unknown items and repeated ones are left out with a counted warning each."""
    row_of_code = np.array([items.rows.get(item_id, -1) for item_id in interactions.items.names], np.int32)
    events = Events(interactions.users.codes, row_of_code[interactions.items.codes], interactions.times)
    unknown = events.rows < 0
    if unknown.any():
        _warn_unknown(name, unknown, [interactions.items.names[code] for code in np.flatnonzero(row_of_code < 0)])
        events = events.take(~unknown)
    if events.times is None:
        return events.take(np.argsort(events.users, kind="stable"))
    order = np.lexsort((events.times, events.users))
    repeated = _repeated(events.users[order], events.times[order], events.rows[order])
    events = events.take(order)
    if repeated.any():
        first = interactions.users.names[events.users[repeated.argmax()]]
        message = f"{int(repeated.sum()):,} interactions repeat the same user, item and time, left out"
        warn(f"{name}: {message}; the first is user {first!r}'s", SpeederWarning, stacklevel=3)
        events = events.take(~repeated)
    return events


def _warn_unknown(name: str, unknown: NDArray[np.bool_], ids: list[str]) -> None:
    if unknown.all():
        raise DataError(f"{name}: no interaction's item is among the items: {name_some(ids)}; are the ids of one kind?")
    message = f"{int(unknown.sum()):,} of {len(unknown):,} interactions left out: their {len(ids):,} items are unknown"
    warn(f"{name}: {message}: {name_some(ids)}", SpeederWarning, stacklevel=4)


def _repeated(users: NDArray[np.int32], times: NDArray[np.int64], rows: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which of the events, sorted by user and time, repeat an earlier one of the same user, time and item."""
    tied = np.zeros(len(users), np.bool_)
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied[1:] |= same
    tied[:-1] |= same
    ties = np.flatnonzero(tied)
    columns = [column[ties] for column in (rows, times, users)]
    order = np.lexsort(columns)
    again = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in columns])
    repeated = np.zeros(len(users), np.bool_)
    repeated[ties[order][1:][again]] = True
    return repeated
