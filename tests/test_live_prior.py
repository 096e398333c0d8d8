"""Decayed counts against the formula, and how a service takes them over."""

import numpy as np
import pytest

from speeder_engine.config import LivePriorConfig
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.live_prior import SECONDS_A_DAY, LivePopularity

HALF_LIVES = (0.5, 3.0, 1e5)


@pytest.fixture
def events():
    rng = np.random.default_rng(0)
    return rng.integers(0, 20 * SECONDS_A_DAY, 300), rng.integers(0, 7, 300).astype(np.int32)


def test_features_are_the_formula_whatever_the_order_of_moments(events):
    times, rows = events
    popularity = LivePopularity.of_events(LivePriorConfig(HALF_LIVES), 7, times, rows)
    moments = np.array([times.max() + 1, 0, 5 * SECONDS_A_DAY, times[17], 5 * SECONDS_A_DAY])
    found = popularity.features(moments)
    for moment, features in zip(moments, found, strict=True):
        for item in range(7):
            ages = (moment - times[(rows == item) & (times < moment)]) / SECONDS_A_DAY
            expected = [np.log1p((2 ** (-ages / half_life)).sum()) for half_life in HALF_LIVES]
            np.testing.assert_allclose(features[item], expected, rtol=1e-5, atol=1e-6)


def test_an_event_does_not_count_at_its_own_second():
    alone = LivePopularity.of_events(LivePriorConfig((1.0,)), 7, np.array([100]), np.array([3], np.int32))
    assert alone.features(np.array([100])).sum() == 0
    assert alone.features(np.array([101]))[0, 3, 0] > 0.69


def test_the_prior_weighs_features_and_needs_learned_weights(events):
    times, rows = events
    weights = (0.5, -1.0, 2.0)
    popularity = LivePopularity.of_events(LivePriorConfig(HALF_LIVES, weights), 7, times, rows)
    moment = 9 * SECONDS_A_DAY
    expected = popularity.features(np.array([moment]))[0] @ np.array(weights)
    np.testing.assert_allclose(popularity.prior(moment), expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="weights are learned in training"):
        LivePopularity.of_events(LivePriorConfig(HALF_LIVES), 7, times, rows).prior(moment)


def test_bad_settings_and_data_are_named():
    with pytest.raises(ConfigError, match="half_lives_days: at least one, all positive"):
        LivePriorConfig((0.0,))
    with pytest.raises(ConfigError, match=r"half_lives_days: each once; are \[2.0, 2.0\]"):
        LivePriorConfig((2.0, 2.0))
    with pytest.raises(ConfigError, match="1 for 2 half-lives"):
        LivePriorConfig((1.0, 2.0), (1.0,))
    with pytest.raises(DataError, match="no times; give a time column"):
        LivePopularity.of_events(LivePriorConfig(), 7, None, np.zeros(3, np.int32))


def test_plain_lists_are_events_and_a_model_without_says_so():
    popularity = LivePopularity.of_events(LivePriorConfig(), 3, [100, 0], [2, 1])
    assert popularity.times.tolist() == [0, 100] and popularity.rows.tolist() == [1, 2]
    with pytest.raises(ConfigError, match="live prior: this model was trained without"):
        LivePopularity.of_events(None, 3, [0], [1])


@pytest.mark.parametrize(
    ("times", "rows", "message"),
    [
        ([1, 2], [0, -1], "row -1 is none of 3 items; leave out events of unknown items"),
        ([1, 2], [3, 0], "row 3 is none of 3 items"),
        ([1, 2], [0], "2 times for 1 rows; give every event both"),
        ([1, 2], [0, 1, 2], "2 times for 3 rows"),
        ([1.0, float("nan")], [0, 1], "times: a number for each event is needed"),
        ([[1, 2]], [0, 1], "times: a number for each event is needed"),
        ([1, 2], ["a", "b"], r"rows: a number for each event is needed, got \['a', 'b'\]"),
        ([1, 2], [1.5, 0], "rows are whole numbers"),
        ([1379024968000, 2], [0, 1], "times are Unix seconds; divide milliseconds by 1000"),
    ],
)
def test_events_that_are_none_are_refused(times, rows, message):
    with pytest.raises(DataError, match=f"live prior: {message}"):
        LivePopularity.of_events(LivePriorConfig(), 3, times, rows)


@pytest.mark.parametrize("moment", [1379024968000, float("nan"), -float("inf"), "2013-09-12", True, None])
def test_a_moment_that_is_no_second_is_refused(moment):
    popularity = LivePopularity.of_events(LivePriorConfig((1.0,), (1.0,)), 3, [1379024968], [0])
    assert popularity.prior(1379024969)[0] > 0.6
    with pytest.raises(DataError, match=r"is no Unix second of these millennia; divide milliseconds by 1000"):
        popularity.prior(moment)
