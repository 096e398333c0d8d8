"""The prior as it stands at a moment: decayed counts of the events so far, weighed as training found best.

f_s(i, t) = log(1 + sum over events e of item i before t of 2^(-(t - t_e) / half_life_s))
prior(i, t) = sum_s w_s f_s(i, t)

Counts move while a model serves: `engine.set_prior(dict(zip(item_ids, popularity.prior(now))))`, no cache is touched.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.checks import LATEST_SECOND
from speeder_engine.config import LivePriorConfig
from speeder_engine.errors import ConfigError, DataError, shown

SECONDS_A_DAY = 86_400
Floats = NDArray[np.float32]
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class LivePopularity:
    """Events of all users, `times` int64 [N] Unix seconds ascending and `rows` [N] of `num_items` items."""

    config: LivePriorConfig
    num_items: int
    times: NDArray[np.int64]
    rows: NDArray[np.int32]

    @classmethod
    def of_events(
        cls,
        config: LivePriorConfig | None,
        num_items: int,
        times: Ints | Sequence[int] | None,
        rows: Ints | Sequence[int],
    ) -> "LivePopularity":
        """Events in any order, `rows` places among the items. DataError for events that have no times, or no such item
        (-1 too: leave out what is not known), ConfigError for a model without a live prior."""
        if config is None:
            raise ConfigError("live prior: this model was trained without; train it with `live_prior` in its recipe")
        if times is None:
            raise DataError("live prior: the interactions have no times; give a time column or leave live_prior out")
        moments, items = _whole(times, "times"), _whole(rows, "rows")
        if not np.array_equal(items, np.asarray(rows)):
            raise DataError("live prior: rows are whole numbers, the places of the events' items")
        if len(moments) != len(items):
            raise DataError(f"live prior: {len(moments)} times for {len(items)} rows; give every event both")
        if len(items) and not 0 <= items.min() <= items.max() < num_items:
            strange = items[(items < 0) | (items >= num_items)][0]
            raise DataError(
                f"live prior: row {strange} is none of {num_items} items; leave out events of unknown items"
            )
        if len(items) and max(int(moments.max()), -int(moments.min())) > LATEST_SECOND:
            raise DataError("live prior: times are Unix seconds; divide milliseconds by 1000")
        order = np.argsort(moments, kind="stable")
        return cls(config, num_items, moments[order], items[order].astype(np.int32))

    def features(self, moments: Ints, dtype: type[np.floating[Any]] = np.float32) -> NDArray[np.floating[Any]]:
        """dtype [n, num_items, S], rounded to float32 first, at the moments int64 [n], in any order: only events
        strictly before count."""
        half_lives = np.asarray(self.config.half_lives_days) * SECONDS_A_DAY
        found = np.empty((len(moments), self.num_items, len(half_lives)), dtype)
        counts = np.zeros((self.num_items, len(half_lives)))
        now, done = int(self.times[0]) if len(self.times) else 0, 0
        ends = np.searchsorted(self.times, moments)
        for at in np.argsort(moments, kind="stable"):
            moment, end = max(int(moments[at]), now), int(ends[at])
            counts *= np.exp2(-(moment - now) / half_lives)
            weights = np.exp2(-(moment - self.times[done:end, None]) / half_lives)  # [events, S]
            np.add.at(counts, self.rows[done:end], weights)
            found[at] = np.log1p(counts).astype(np.float32)
            now, done = moment, end
        return found

    def prior(self, moment: int) -> Floats:
        """float32 [num_items] at Unix second `moment`, by row: with item ids as keys, what `Engine.set_prior` takes."""
        number = isinstance(moment, int | float | np.integer | np.floating) and not isinstance(moment, bool)
        if not (number and abs(moment) <= LATEST_SECOND):
            found = shown(moment)
            raise DataError(f"live prior: {found} is no Unix second of these millennia; divide milliseconds by 1000")
        if not self.config.weights:
            raise ConfigError("live prior: its weights are learned in training; take the config of an engine directory")
        weighed: Floats = self.features(np.array([moment]))[0] @ np.asarray(self.config.weights, np.float32)
        return weighed


def _whole(values: Ints | Sequence[int], name: str) -> NDArray[np.int64]:
    """One number an event, whole ones of it; or DataError."""
    with suppress(TypeError, ValueError, OverflowError):
        given = np.asarray(values)
        if given.ndim == 1 and (given.dtype.kind in "iu" or bool(np.isfinite(given).all())):
            return given.astype(np.int64)
    raise DataError(f"live prior: {name}: a number for each event is needed, got {shown(values)}")
