import numpy as np
import pytest

from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError, DataError, SpeederWarning


@pytest.fixture(scope="module")
def dataset(build, random_rows):
    return build(random_rows)


@pytest.mark.parametrize(("part", "from_end"), [("validation", 2), ("test", 1)])
def test_queries_stand_at_the_end_of_each_history(dataset, part, from_end):
    queries = leave_one_out(dataset).queries(part)
    assert queries.users.tolist() == list(range(60))
    for q, user in enumerate(queries.users):
        events, times = dataset.history(user).tolist(), dataset.history_times(user).tolist()
        assert queries.history(q).tolist() == events[:-from_end]
        assert queries.history_times(q).tolist() == times[:-from_end]
        assert (queries.targets[q], queries.query_times[q]) == (events[-from_end], times[-from_end])
    assert queries.offsets[-1] == len(queries.rows)
    assert (queries.rows.dtype, queries.targets.dtype, queries.users.dtype) == (np.int32,) * 3


def test_training_never_sees_a_target(dataset):
    train = leave_one_out(dataset).train
    assert train.num_users == dataset.num_users
    assert train.num_interactions == dataset.num_interactions - 2 * dataset.num_users
    for user in range(train.num_users):
        assert train.history(user).tolist() == dataset.history(user).tolist()[:-2]
        assert train.history_times(user).tolist() == dataset.history_times(user).tolist()[:-2]
    np.testing.assert_array_equal(train.lengths, dataset.lengths - 2)


def test_validation_does_not_know_the_tests_events(dataset):
    split = leave_one_out(dataset)
    test, validation = split.known("test"), split.known("validation")
    for user in range(dataset.num_users):
        assert test.history(user).tolist() == dataset.history(user).tolist()
        assert validation.history(user).tolist() == dataset.history(user).tolist()[:-1]
        assert validation.history_times(user).tolist() == dataset.history_times(user).tolist()[:-1]


def test_some_users_in_the_order_asked_for(dataset):
    split = leave_one_out(dataset)
    some, every = split.queries("test", np.array([7, 3, 59])), split.queries("test")
    assert some.users.tolist() == [7, 3, 59]
    for q, user in enumerate(some.users):
        np.testing.assert_array_equal(some.history(q), every.history(user))
    np.testing.assert_array_equal(some.targets, every.targets[some.users])
    assert len(split.queries("test", np.array([], np.int64))) == 0


@pytest.mark.parametrize(("start", "stop"), [(0, 60), (0, 1), (10, 25), (55, 99), (60, 60), (9, 3)])
def test_a_slice_is_those_queries(dataset, start, stop):
    every = leave_one_out(dataset).queries("test")
    part = every.slice(start, stop)
    assert part.users.tolist() == every.users[start:stop].tolist()
    assert part.targets.tolist() == every.targets[start:stop].tolist()
    assert part.query_times.tolist() == every.query_times[start:stop].tolist()
    for q in range(len(part)):
        assert part.history(q).tolist() == every.history(start + q).tolist()
        assert part.history_times(q).tolist() == every.history_times(start + q).tolist()


def test_short_histories_are_trained_on_and_counted(build):
    dataset = build([("a", "x", 1), ("b", "x", 1), ("b", "y", 2), ("c", "x", 1), ("c", "y", 2), ("c", "z", 3)])
    with pytest.warns(SpeederWarning, match=r"2 users with fewer than 3 interactions.*'a', 'b'"):
        split = leave_one_out(dataset)
    assert split.train.lengths.tolist() == [1, 2, 1]
    assert split.users.tolist() == [2]
    assert split.queries("validation").history(0).tolist() == [0]
    with pytest.raises(DataError, match=r"users '0' have no test query"):
        split.queries("test", np.array([2, 0]))


def test_without_times(build):
    split = leave_one_out(build([("a", item, None) for item in "xyzw"]))
    queries = split.queries("test")
    assert (split.train.times, queries.times, queries.query_times, queries.slice(0, 1).times) == (None,) * 4


def test_there_are_two_parts(dataset):
    with pytest.raises(ConfigError, match=r"no part 'train'"):
        leave_one_out(dataset).queries("train")
