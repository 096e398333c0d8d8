"""How sure a mean over users is: percentile intervals from resampled users, paired where two systems are compared.

Of a system that was trained with several seeds, a user's value is the mean over these, and users are resampled; what
trainings differ by, all users alike, is added to every resample as sqrt(v / S) times a draw from Student's t of S - 1
degrees of freedom, since few seeds tell little of their own spread. v is the variance component of the S seeds in a
two-way layout of seeds and users (Searle, Casella and McCulloch, Variance Components, 1992):

v = (MS_seeds - MS_residual) / U, at least 0

One seed says nothing of it: such an interval tells users apart, not trainings. Three seeds may agree by chance: where
trainings differ much, intervals of 95 % hold the truth in 90.
"""

import math
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
    """The mean of `values` [U], or [S, U] by seed, and its percentile interval; equal seeds give equal intervals."""
    by_seed = np.atleast_2d(values)
    return _interval(by_seed.mean(axis=0), [by_seed], level, resamples, seed)


def values_by_seed(reports: Sequence[Report], metric: str) -> Values:
    """float64 [S, Q]: each user's values in the reports of one system, which differ in the seed alone."""
    if not reports:
        raise DataError(f"bootstrap: no reports to take {metric} from")
    for report in reports[1:]:
        _check_paired(reports[0], report)
    return np.stack([report.values(metric) for report in reports])


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

    Either may be one report or those of several seeds. As many on both sides are taken in pairs, in their order.
    """
    left = [first] if isinstance(first, Report) else first
    right = [second] if isinstance(second, Report) else second
    mine, others = values_by_seed(left, metric), values_by_seed(right, metric)
    _check_paired(left[0], right[0])
    if len(mine) == len(others):
        return mean_interval(mine - others, level=level, resamples=resamples, seed=seed)
    return _interval(mine.mean(axis=0) - others.mean(axis=0), [mine, others], level, resamples, seed)


def _interval(values: Values, trainings: Sequence[Values], level: float, resamples: int, seed: int) -> Interval:
    """Of the mean of `values` [U], which are made of the means over each [S, U] of `trainings`."""
    if len(values) == 0:
        raise DataError("bootstrap: no users to resample")
    if not 0 < level < 1 or resamples < 1:
        raise ConfigError(f"bootstrap: level {level} must be in (0, 1) and resamples {resamples} at least 1")
    rng = np.random.default_rng(seed)
    means = np.concatenate(list(_resampled_means(values, resamples, rng)))
    for by_seed in trainings:
        spread = math.sqrt(_between_trainings(by_seed))
        means += spread * rng.standard_t(len(by_seed) - 1, resamples) if spread else 0
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _between_trainings(values: Values) -> float:
    """Of the mean over all seeds of `values` [S, U]: the variance that comes from what a seed does to all users."""
    num_seeds, num_users = values.shape
    if num_seeds < 2 or num_users < 2:
        return 0.0
    of_seed, of_user = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    left = values - of_seed - of_user + values.mean()
    residual = (left**2).sum() / ((num_seeds - 1) * (num_users - 1))
    between = num_users * of_seed.var(ddof=1)
    return float(max(0.0, between - residual) / (num_users * num_seeds))


def _check_paired(first: Report, second: Report) -> None:
    if not np.array_equal(first.users, second.users):
        raise DataError(f"{first.system} and {second.system} were evaluated on other users, so they can't be paired")


def _resampled_means(values: Values, resamples: int, rng: np.random.Generator) -> Iterator[Values]:
    rows = max(1, DRAWS_AT_ONCE // len(values))
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(values))
        yield values[rng.integers(0, len(values), shape, dtype=np.int32)].mean(axis=1)
