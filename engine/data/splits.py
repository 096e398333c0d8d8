"""Leave-one-out by time: what is trained on, and the queries that are answered. Draws nothing."""

from dataclasses import dataclass
from typing import Any, Literal
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.dataset import Dataset
from speeder_engine.errors import ConfigError, DataError, SpeederWarning, name_some
from speeder_engine.runs import Runs, offsets_of, ranges

Part = Literal["validation", "test"]
# how many events from the end of a history the part's target stands
FROM_END: dict[Part, int] = {"validation": 2, "test": 1}


@dataclass(frozen=True, eq=False)
class Histories(Runs):
    """The training events of every user, oldest first, in the order of `Dataset.user_ids`."""

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    times: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        self._check_runs("histories")

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Queries(Runs):
    """Query q: after `history(q)`, oldest first, user `users[q]` took item row `targets[q]` at `query_times[q]`.

    `users`, `targets` int32 [Q]; `offsets` int64 [Q + 1]; `rows` int32 [N]; `times` int64 [N] and `query_times`
    int64 [Q] in Unix seconds, both None where the data has no time.
    """

    users: NDArray[np.int32]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    times: NDArray[np.int64] | None
    targets: NDArray[np.int32]
    query_times: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        self._check_runs("queries")
        num_queries = len(self.offsets) - 1
        if len(self.users) != num_queries or len(self.targets) != num_queries:
            raise DataError(f"queries: {num_queries} histories, {len(self.users)} users, {len(self.targets)} targets")
        if self.query_times is not None and len(self.query_times) != num_queries:
            raise DataError(f"queries: {num_queries} histories but {len(self.query_times)} query times")

    def __len__(self) -> int:
        return len(self.targets)

    def slice(self, start: int, stop: int) -> "Queries":
        """Queries start to stop - 1 (as Python slices, cut at the end); the arrays are views."""
        start, stop, _ = slice(start, stop).indices(len(self))
        offsets = self.offsets[start : max(start, stop) + 1]
        events = slice(offsets[0], offsets[-1])
        return Queries(
            users=self.users[start:stop],
            offsets=offsets - offsets[0],
            rows=self.rows[events],
            times=None if self.times is None else self.times[events],
            targets=self.targets[start:stop],
            query_times=None if self.query_times is None else self.query_times[start:stop],
        )


@dataclass(frozen=True, eq=False)
class Split:
    """`train` has every user; `users` int32 [Q] are those with enough events for a validation and a test target."""

    dataset: Dataset
    train: Histories
    users: NDArray[np.int32]

    def known(self, part: Part) -> Histories:
        """Every event that a service has seen by the end of a part, targets among them: to validation, the test's are
        unknown."""
        data, kept = self.dataset, np.ones(self.dataset.num_interactions, np.bool_)
        lengths = data.lengths.copy()
        if part == "validation":
            kept[data.offsets[self.users + 1] - 1] = False
            lengths[self.users] -= 1
        return Histories(offsets_of(lengths), data.rows[kept], None if data.times is None else data.times[kept])

    def queries(self, part: Part, users: NDArray[np.integer[Any]] | None = None) -> Queries:
        """The part's queries of all `self.users`, or of the given ones in the given order.

        A validation history is the training events; a test history has the validation item at its end.
        """
        if part not in FROM_END:
            raise ConfigError(f"no part {part!r}; the parts are 'validation' and 'test'")
        chosen = self.users if users is None else np.asarray(users, np.int32)
        if not np.isin(chosen, self.users).all():
            strangers = chosen[~np.isin(chosen, self.users)].tolist()
            raise DataError(f"{self.dataset.name}: users {name_some(map(str, strangers))} have no {part} query")
        data, starts = self.dataset, self.dataset.offsets[chosen]
        targets = data.offsets[chosen + 1] - FROM_END[part]
        events = ranges(starts, targets)
        return Queries(
            users=chosen,
            offsets=offsets_of(targets - starts),
            rows=data.rows[events],
            times=None if data.times is None else data.times[events],
            targets=data.rows[targets],
            query_times=None if data.times is None else data.times[targets],
        )


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last event is the test target, the one before the validation target, the rest is trained on.

    Users with fewer than three events have no queries, all of theirs is trained on: one counted warning.
    """
    asked = dataset.lengths >= 3
    if not asked.all():
        short = [dataset.user_ids[user] for user in np.flatnonzero(~asked)]
        message = f"{len(short):,} users with fewer than 3 interactions are trained on but not evaluated"
        warn(f"{dataset.name}: {message}: {name_some(short)}", SpeederWarning, stacklevel=2)
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:] - 2 * asked
    events = ranges(starts, ends)
    times = None if dataset.times is None else dataset.times[events]
    train = Histories(offsets_of(ends - starts), dataset.rows[events], times)
    return Split(dataset, train, np.flatnonzero(asked).astype(np.int32))
