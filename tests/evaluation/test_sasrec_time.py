from dataclasses import replace

import numpy as np
import pytest
import torch

from speeder_engine.encoders.sasrec import SASRecConfig
from speeder_engine.errors import DataError
from speeder_engine.evaluation.baselines.sasrec_time import SECONDS_A_WEEK, SASRecTime, SASRecWeeks
from speeder_engine.evaluation.protocols import evaluate

NUM_ITEMS, NUM_WEEKS = 24, 12
SMALL = SASRecConfig(
    dim=16, num_layers=1, window=8, dropout=0.1, epochs=12, tokens_per_batch=256, learning_rate=1e-2, patience=4
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def split(make_split):
    """What is taken is the week's item: 2 w or 2 w + 1, and nothing of the history tells which week is asked for."""
    rng = np.random.default_rng(0)
    weeks = [np.sort(rng.integers(0, NUM_WEEKS, rng.integers(12, 20))) for _ in range(300)]
    histories = [2 * each + rng.integers(0, 2, len(each)) for each in weeks]
    times = [each * SECONDS_A_WEEK + np.arange(len(each)) for each in weeks]
    return make_split(histories, times, NUM_ITEMS)


@pytest.fixture(scope="module")
def split_by_last_week(make_split):
    """What is taken is the item of the week before it: an item tells the week of the one before, not its own.

    Times don't rise: every week comes as often at every place.
    """
    rng = np.random.default_rng(0)
    weeks = [rng.integers(0, NUM_WEEKS, rng.integers(12, 20)) for _ in range(300)]
    histories = [2 * np.append(rng.integers(NUM_WEEKS), each[:-1]) + rng.integers(0, 2, len(each)) for each in weeks]
    return make_split(histories, [each * SECONDS_A_WEEK for each in weeks], NUM_ITEMS)


@pytest.fixture(scope="module")
def fitted(split):
    return SASRecTime.fit(split, SMALL)


@pytest.fixture(scope="module")
def fitted_weeks(split_by_last_week):
    return SASRecWeeks.fit(split_by_last_week, SMALL)


def test_weeks_of_interactions_are_read_and_the_query_s_is_not(fitted_weeks, split_by_last_week):
    queries = split_by_last_week.queries("test")
    first = split_by_last_week.train.times.min()
    last = queries.offsets[1:] - 1
    weeks = (queries.times[last] - first) // SECONDS_A_WEEK
    scores = fitted_weeks.scores(queries)
    assert (scores.argmax(axis=1) // 2 == weeks).mean() > 0.9
    times = queries.times.copy()
    times[last] = first + 3 * SECONDS_A_WEEK
    moved = fitted_weeks.scores(replace(queries, times=times)).argmax(axis=1) // 2
    assert (moved == 3).mean() > 0.9
    np.testing.assert_array_equal(fitted_weeks.scores(replace(queries, query_times=None)), scores)
    assert not fitted_weeks.uses_time
    with pytest.raises(DataError, match="sasrec_weeks: the queries have no times"):
        fitted_weeks.scores(replace(queries, times=None))


def test_learns_what_the_week_decides(fitted, split):
    queries = split.queries("test")
    scores = fitted.scores(queries)
    weeks = (queries.query_times - split.train.times.min()) // SECONDS_A_WEEK
    assert (scores.argmax(axis=1) // 2 == weeks).mean() > 0.9
    other = replace(queries, query_times=queries.query_times[::-1].copy())
    moved = fitted.scores(other).argmax(axis=1) // 2
    assert (moved == weeks[::-1]).mean() > 0.9
    assert fitted.uses_time


def test_equal_seeds_give_equal_scores(fitted, split):
    queries = split.queries("test").slice(0, 20)
    torch.manual_seed(99)
    np.testing.assert_array_equal(SASRecTime.fit(split, SMALL).scores(queries), fitted.scores(queries))


def test_queries_are_scored_as_if_alone(fitted, split):
    queries = split.queries("test").slice(0, 40)
    alone = np.concatenate([fitted.scores(queries.slice(q, q + 1)) for q in range(40)])
    np.testing.assert_allclose(fitted.scores(queries), alone, atol=1e-4)


@pytest.mark.parametrize("name", ["fitted", "fitted_weeks"])
def test_no_position_sees_a_later_time(request, name):
    fitted = request.getfixturevalue(name)
    rows, weeks = torch.arange(8)[None], torch.arange(8)[None]
    changed = weeks.clone()
    changed[0, 5:] = 11
    with torch.inference_mode():
        before = fitted.model(rows, weeks, weeks)[0]
        after = fitted.model(rows, changed, changed)[0]
    torch.testing.assert_close(before[:5], after[:5], atol=1e-6, rtol=0)
    assert not torch.allclose(before[5], after[5])


def test_times_beyond_training_count_as_the_nearest_and_none_are_refused(fitted, split, make_queries):
    queries = split.queries("test").slice(0, 5)
    late = [replace(queries, query_times=np.full(5, week * SECONDS_A_WEEK)) for week in (NUM_WEEKS + 3, 10**5)]
    np.testing.assert_array_equal(fitted.scores(late[0]), fitted.scores(late[1]))
    assert np.isfinite(evaluate(fitted, queries, None, show_progress=False).metrics["mrr"])
    with pytest.raises(DataError, match="queries have no times"):
        fitted.scores(replace(queries, query_times=None))
    with pytest.raises(DataError, match="interactions have no times"):
        SASRecTime.fit(replace(split, train=replace(split.train, times=None)), SMALL)
