"""The k-core of a user-item graph. Knows codes only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import ConfigError


def k_core(users: NDArray[np.integer[Any]], items: NDArray[np.integer[Any]], k: int) -> NDArray[np.bool_]:
    """Which events (user and item codes [N]) are in the largest set where every user and item has at least k of them.

    Events are counted as they are: one item taken twice counts twice. k = 0 keeps all.
    """
    if not isinstance(k, int | np.integer) or k < 0:
        raise ConfigError(f"min_interactions={k!r}: a whole number from 0 on is needed")
    core = np.zeros(len(users), np.bool_)
    kept = np.arange(len(users))
    while True:
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if enough.all():
            break
        users, items, kept = users[enough], items[enough], kept[enough]
    core[kept] = True
    return core
