import time

import numpy as np
import pytest

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation import bootstrap
from speeder_engine.evaluation.bootstrap import mean_interval, paired_difference, values_by_seed
from speeder_engine.evaluation.report import Report


def _report(name, ranks, users=None):
    ranks = np.asarray(ranks, np.int32)
    users = np.arange(len(ranks), dtype=np.int32) if users is None else users
    return Report(name, False, users, ranks, {})


def test_the_interval_is_that_of_the_normal_approximation():
    values = (np.random.default_rng(0).random(5500) < 0.2).astype(np.float64)
    found = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == values.mean()
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrow = mean_interval(values, level=0.5)
    assert (narrow.high - narrow.low) / 2 == pytest.approx(0.6745 / 1.96 * half, rel=0.1)


def test_scipy_finds_the_same_interval_on_skewed_values():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).exponential(size=40)
    found = mean_interval(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_the_seed_decides_and_2000_resamples_of_5500_users_are_quick():
    values = np.random.default_rng(3).random(5500)
    start = time.perf_counter()
    first = mean_interval(values, seed=7)
    assert time.perf_counter() - start < 2
    assert first == mean_interval(values, seed=7) != mean_interval(values, seed=8)


def test_pairing_sees_what_two_intervals_can_not():
    rng = np.random.default_rng(4)
    ranks = rng.integers(0, 25, 3000)
    better = np.where(rng.random(3000) < 0.05, 0, ranks)
    first, second = _report("better", better), _report("base", ranks)
    found = paired_difference(first, second, "hr@10")
    assert found.mean == pytest.approx((better < 10).mean() - (ranks < 10).mean())
    assert found.excludes_zero and found.low > 0
    alone = [mean_interval(each.values("hr@10")) for each in (first, second)]
    assert alone[0].low < alone[1].high  # each by itself would overlap
    back = paired_difference(second, first, "hr@10")
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.002)
    same = paired_difference(first, first, "mrr")
    assert (same.mean, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)


def test_what_can_not_be_resampled_is_refused():
    with pytest.raises(DataError, match="can't be paired"):
        paired_difference(_report("a", [1, 2]), _report("b", [1, 2], np.array([1, 0], np.int32)), "mrr")
    with pytest.raises(DataError, match="can't be paired"):
        paired_difference(_report("a", [1, 2]), _report("b", [1]), "mrr")
    with pytest.raises(DataError, match="no users"):
        mean_interval(np.zeros(0))
    for wrong in ({"level": 1.0}, {"resamples": 0}):
        with pytest.raises(ConfigError):
            mean_interval(np.ones(3), **wrong)


def test_several_seeds_are_averaged_before_users_are_drawn():
    rng = np.random.default_rng(5)
    ranks = rng.integers(0, 25, (3, 400))
    seeds = [_report("a", each) for each in ranks]
    values = values_by_seed(seeds, "hr@10")
    np.testing.assert_array_equal(values, ranks < 10)
    assert values.dtype == np.float64
    base = _report("base", rng.integers(0, 25, 400))
    found = paired_difference(seeds, base, "hr@10", seed=3)
    same = mean_interval(values - base.values("hr@10"), seed=3)
    assert (found.mean, found.low, found.high) == pytest.approx((same.mean, same.low, same.high))
    # one seed of a system is less certain than the mean of three that differ by chance
    alone = paired_difference(seeds[0], base, "hr@10", seed=3)
    assert found.high - found.low < alone.high - alone.low
    with pytest.raises(DataError, match="can't be paired"):
        values_by_seed([*seeds, _report("a", [1, 2])], "hr@10")
    with pytest.raises(DataError, match="no reports"):
        values_by_seed([], "hr@10")


@pytest.mark.parametrize(("between", "paired"), [(0.0, True), (0.01, True), (0.01, False)])
def test_intervals_cover_what_is_so_for_other_users_and_other_trainings(between, paired):
    """A difference that is nothing, drawn again and again: trainings that differ are no finding, however many users."""
    rng, outside, rounds = np.random.default_rng(6), 0, 300
    for number in range(rounds):
        chances = rng.beta(2, 8, 2000)
        left, right = ([_drawn(rng, chances, between) for _ in range(n)] for n in ((3, 3) if paired else (3, 2)))
        outside += paired_difference(left, right, "hr@10", resamples=300, seed=number).excludes_zero
    # users alone would leave out a third of those whose trainings differ
    assert 0.005 * rounds < outside < (0.13 if between else 0.08) * rounds


def _drawn(rng, chances, between):
    return _report("a", np.where(rng.random(len(chances)) < chances + rng.normal(0, between), 0, 20))


def test_what_seeds_add_is_the_variance_component_of_the_textbook():
    """Of a balanced layout by hand: 2 seeds, 3 users."""
    values = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    # means of seeds 2/3 and 4/3, of users .5, 1, 1.5, of all 1: MS_seeds = 3 * 2/9, MS_residual = 1/3 / 2
    component = (3 * 2 / 9 - 1 / 6) / 3
    assert bootstrap._between_trainings(values) == pytest.approx(component / 2)
    assert bootstrap._between_trainings(values[:1]) == 0
    alike = np.array([[0.0, 1.0], [1.0, 0.0]])  # less between seeds than chance would have it
    assert bootstrap._between_trainings(alike) == 0
