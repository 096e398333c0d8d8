"""The standard workload and its streams."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import workload


def test_the_standard_lengths():
    standard = workload.Workload()
    assert (standard.cold_rows, standard.warm_rows) == (50, 21)
    assert standard.text_prompt_len == (30 + 20) * 17 + 50 == 900
    assert standard.multimodal_prompt_len == 900 + 30 * 32


def test_users_are_seeded_whole_and_inside_the_catalogue():
    standard = workload.Workload()
    users = workload.make_users(40, 500, standard, 7)
    assert users == workload.make_users(40, 500, standard, 7)
    assert users != workload.make_users(40, 500, standard, 8)
    for user in users:
        assert (len(user.history), len(user.candidates)) == (30, 20)
        assert len(set(user.grown)) == 31 and user.grown == (*user.history, user.next_item)
        assert len(set(user.candidates)) == 20
        assert all(0 <= row < 500 for row in (*user.grown, *user.candidates))
    assert len({user.user_id for user in users}) == 40


def test_popular_items_follow_zipf():
    drawn = workload.Zipf(1000, 1.0, np.random.default_rng(0)).draw(200_000)
    counts = [count for _, count in Counter(drawn.tolist()).most_common()]
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    assert counts[0] / counts[99] == pytest.approx(100, rel=0.25)


def test_a_small_catalogue_is_drawn_whole_and_a_smaller_one_refused():
    items = workload.Zipf(12, 1.0, np.random.default_rng(0))
    assert sorted(items.distinct(12)) == list(range(12))
    with pytest.raises(ValueError, match="13 different items asked for, there are 12"):
        items.distinct(13)


def test_open_arrivals_are_poisson():
    stream = workload.Stream(500, 1000, seed=3)
    times = np.array([time for time, _ in stream.arrivals(200.0, 20.0)])
    assert (np.diff(times) > 0).all() and times[0] > 0 and times[-1] < 20
    assert len(times) == pytest.approx(4000, rel=0.06)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.06)


def test_users_return_with_what_they_took():
    stream, last = workload.Stream(30, 1000, seed=1), {}
    for _, user in islice(stream.closed(4), 400):
        if user.user_id in last:
            assert user.history == last[user.user_id].grown
            assert user.candidates != last[user.user_id].candidates
        assert user.next_item not in user.history
        last[user.user_id] = user
    assert stream.num_requests == 400
    assert stream.returning_share == (400 - len(last)) / 400 > 0.9


def test_streams_are_seeded():
    first, again, other = (islice(workload.Stream(50, 300, seed=s).arrivals(5.0, 1e9), 60) for s in (1, 1, 2))
    first = list(first)
    assert first == list(again)
    assert first != list(other)


def test_no_two_of_those_waiting_are_one_user():
    stream = workload.Stream(12, 300, seed=0)
    names = [user.user_id for _, user in islice(stream.closed(8), 300)]
    assert all(len(set(names[at : at + 8])) == 8 for at in range(293))
    with pytest.raises(ValueError, match="13 users at a time, there are 12"):
        next(stream.closed(13))


def test_thinking_takes_its_time():
    thoughts = [time for time, _ in islice(workload.Stream(50, 300).closed(2, think_seconds=0.5), 2000)]
    assert np.mean(thoughts) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("name", ["MOVIETWEETINGS", "MOVIELENS"])
def test_first_histories_are_as_long_as_real_ones(name):
    lengths = getattr(workload, name)
    stream = workload.Stream(4000, 5000, seed=0, lengths=lengths, user_exponent=0.0)
    first = {}
    for _, user in islice(stream.closed(1), 3000):
        first.setdefault(user.user_id, len(user.history))
    found = np.quantile(list(first.values()), (0.25, 0.5, 0.75))
    wanted = [lengths[5], lengths[10], lengths[15]]
    assert found == pytest.approx(wanted, rel=0.12, abs=1)
    assert max(first.values()) <= workload.LONGEST
