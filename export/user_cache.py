"""UserCache: keys and values of returning users for `extend`, compared by content and never trusted by name."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int32]  # [n, 3]: row, version, time bucket


@dataclass
class UserState:
    """What is known of one user. `values`: keys and values of every layer in turn, on the device; `room`: how many
    positions they have, those of a buffer that are still free included."""

    keys: Keys = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    values: Sequence[Any] = ()
    room: int = 0

    def common_len(self, keys: Keys) -> int:
        """How many leading positions were computed from just these (row, version, bucket)."""
        length = min(len(self.keys), len(keys))
        different = np.flatnonzero((self.keys[:length] != keys[:length]).any(axis=1))
        return int(different[0]) if len(different) else length


class UserCache:
    """At most `budget` bytes of users, the least recently used forgotten first."""

    def __init__(self, budget: int, position_bytes: int) -> None:
        self.budget, self.position_bytes = budget, position_bytes
        self._users: OrderedDict[str, UserState] = OrderedDict()
        self._room = 0

    def __len__(self) -> int:
        return len(self._users)

    @property
    def num_bytes(self) -> int:
        return self._room * self.position_bytes

    def take(self, user_id: str) -> UserState:
        """Out of the cache, while it is worked on: what fails in between is forgotten."""
        state = self._users.pop(user_id, UserState())
        self._room -= state.room
        return state

    def put(self, user_id: str, state: UserState) -> None:
        """Of a user who has been taken."""
        self._users[user_id] = state
        self._room += state.room
        while self.num_bytes > self.budget:
            self.take(next(iter(self._users)))

    def close(self, user_id: str) -> bool:
        """True if there was anything."""
        known = user_id in self._users
        self.take(user_id)
        return known

    def clear(self) -> None:
        self._users.clear()
        self._room = 0
