"""How often one item stood near another in histories: counts of pairs of events. Knows no model and no scorer."""

import numpy as np
from numpy.typing import NDArray

from speeder_engine.encoders.windows import Ints
from speeder_engine.followers import Followers

PAIRS_AT_ONCE = 1 << 22
Whole = NDArray[np.int64]


def count_pairs(
    offsets: Ints, rows: Ints, num_items: int, window: int | None = 1, forward: bool = True
) -> tuple[Whole, Whole]:
    """Counts pairs of events of one history that stand at most `window` apart; None: however far.

    The earlier event's item has the later one's as follower, and the other way round unless `forward`. Returns
    item * num_items + follower, ascending, each once, and how often it came. Histories are
    `rows[offsets[u]:offsets[u + 1]]`, oldest first.
    """
    lengths = np.diff(offsets)
    histories = np.repeat(np.arange(len(lengths)), lengths)
    wide = rows.astype(np.int64)
    counted = _Counts()
    for apart in range(1, min(window or len(wide), int(lengths.max(initial=0)) - 1) + 1):
        here = np.flatnonzero(histories[:-apart] == histories[apart:])
        earlier, later = wide[here], wide[here + apart]
        counted.add(earlier * num_items + later)
        if not forward:
            counted.add(later * num_items + earlier)
    counted.merge()
    return counted.codes, counted.counts


def count_followers(
    offsets: Ints, rows: Ints, num_items: int, window: int | None = 1, forward: bool = True
) -> Followers:
    """`count_pairs` as a table."""
    return Followers.of_codes(*count_pairs(offsets, rows, num_items, window, forward), num_items)


class _Counts:
    """How often each code came, `codes` ascending; merged now and then, so that memory follows the distinct ones."""

    def __init__(self) -> None:
        self.codes = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self.pending: list[NDArray[np.int64]] = []

    def add(self, codes: NDArray[np.int64]) -> None:
        self.pending.append(codes)
        if sum(map(len, self.pending)) >= PAIRS_AT_ONCE:
            self.merge()

    def merge(self) -> None:
        codes, counts = np.unique(np.concatenate([*self.pending, np.zeros(0, np.int64)]), return_counts=True)
        known, place = np.unique(np.concatenate([self.codes, codes]), return_inverse=True)
        merged = np.zeros(len(known), np.int64)
        merged[place[: len(self.codes)]] = self.counts
        merged[place[len(self.codes) :]] += counts
        self.codes, self.counts, self.pending = known, merged, []
