"""How sure a mean over users is: percentile intervals from resampled users, paired where two systems are compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import Values
from speeder_engine.evaluation.report import Report

DRAWS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Values, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `values` [U] and its percentile bootstrap interval; the same seed gives the same interval."""
    if len(values) == 0:
        raise DataError("bootstrap: no users to resample")
    if not 0 < level < 1 or resamples < 1:
        raise ConfigError(f"bootstrap: level {level} must be in (0, 1) and resamples {resamples} at least 1")
    means = np.concatenate(list(_resampled_means(values, resamples, seed)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference(
    first: Report, second: Report, metric: str, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """`first` - `second` in a metric that has a value per user; the same users are drawn for both."""
    if first.num_users != second.num_users or not np.array_equal(first.users, second.users):
        raise DataError(f"{first.system} and {second.system} were evaluated on other users, so they can't be paired")
    difference = first.values(metric) - second.values(metric)
    return mean_interval(difference, level=level, resamples=resamples, seed=seed)


def _resampled_means(values: Values, resamples: int, seed: int) -> Iterator[Values]:
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(values))
        yield values[rng.integers(0, len(values), shape, dtype=np.int32)].mean(axis=1)
