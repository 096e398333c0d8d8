"""How sure a mean over users is: percentile intervals from resampled users, paired where two systems are compared.

Of a system that was trained with several seeds, a user's value is the mean over these, and users are resampled.
"""

from collections.abc import Iterator, Sequence
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


def mean_over_seeds(reports: Sequence[Report], metric: str) -> Values:
    """float64 [Q]: each user's mean over the reports of one system, which differ in the seed alone."""
    if not reports:
        raise DataError(f"bootstrap: no reports to take {metric} from")
    for report in reports[1:]:
        _check_paired(reports[0], report)
    values: Values = np.mean([report.values(metric) for report in reports], axis=0)
    return values


def paired_difference(
    first: Report | Sequence[Report],
    second: Report | Sequence[Report],
    metric: str,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`first` - `second` in a metric that has a value per user; the same users are drawn for both.

    Either may be one report or those of several seeds, their number need not be the same.
    """
    left = [first] if isinstance(first, Report) else first
    right = [second] if isinstance(second, Report) else second
    values = mean_over_seeds(left, metric), mean_over_seeds(right, metric)
    _check_paired(left[0], right[0])
    return mean_interval(values[0] - values[1], level=level, resamples=resamples, seed=seed)


def _check_paired(first: Report, second: Report) -> None:
    if not np.array_equal(first.users, second.users):
        raise DataError(f"{first.system} and {second.system} were evaluated on other users, so they can't be paired")


def _resampled_means(values: Values, resamples: int, seed: int) -> Iterator[Values]:
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(values))
        yield values[rng.integers(0, len(values), shape, dtype=np.int32)].mean(axis=1)
