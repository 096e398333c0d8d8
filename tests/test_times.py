"""Interaction times: calendar buckets beside the slots, in the sessions' keys and in the prompt."""

import numpy as np
import pytest
import torch
from reference import make_tiny, reference_scores

from speeder_engine import Engine, EngineConfig, InvalidRequest, Request
from speeder_engine.config import CalendarConfig, ConfigError

WEEK = 7 * 86_400
FIRST = 1_600_000_000


@pytest.fixture(scope="module")
def timed():
    return make_tiny(window=12, step=4, calendar=CalendarConfig(FIRST, WEEK, 20))


def made(tiny, **settings):
    return Engine(tiny.parts(), EngineConfig(**{"dtype": "float32", "kv_budget": "4MiB", "debug": True} | settings))


@pytest.mark.parametrize("length", [0, 1, 7, 12, 30])
def test_answers_equal_transformers_with_the_buckets_prompts(timed, length):
    engine, rng = made(timed), np.random.default_rng(length)
    rows, candidates = rng.integers(0, 120, length), rng.permutation(120)[:9]
    weeks = np.sort(rng.integers(-2, 24, length))
    times = (FIRST + weeks * WEEK + rng.integers(0, WEEK, length)).tolist()
    buckets = [int(np.clip(week, 0, 19)) + 1 for week in weeks]
    retrieve, ranked = reference_scores(timed, rows, candidates, buckets or None)
    for user in (None, "a", "a"):
        asked = {"times": times, "user_id": user}
        found = dict(engine.recommend(timed.ids(rows), k=120, exclude_seen=False, **asked))
        scores = torch.tensor([found[item_id] for item_id in timed.item_ids])
        torch.testing.assert_close(scores, retrieve, atol=2e-5, rtol=1e-5)
        found = dict(engine.recommend(timed.ids(rows), candidates=timed.ids(candidates), **asked))
        scores = torch.tensor([found[item_id] for item_id in timed.ids(candidates)])
        torch.testing.assert_close(scores, ranked, atol=2e-5, rtol=1e-5)
    if length:
        without, _ = reference_scores(timed, rows, None, [0] * length)
        found = dict(engine.recommend(timed.ids(rows), k=120, exclude_seen=False))
        scores = torch.tensor([found[item_id] for item_id in timed.item_ids])
        torch.testing.assert_close(scores, without, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_time_is_recomputed_if_its_bucket_changes(timed, dtype):
    engine, cold = made(timed, dtype=dtype), made(timed, dtype=dtype, kv_budget="0")
    ids = timed.ids(range(10))
    times = [FIRST + i * WEEK for i in range(10)]
    computed = []
    for at, seconds in ((0, 0), (4, 3600), (4, WEEK), (4, WEEK)):
        times[at] = FIRST + at * WEEK + seconds
        before = engine.stats().rows_computed
        assert engine.recommend(ids, times=times, user_id="a") == cold.recommend(ids, times=times)
        computed.append(engine.stats().rows_computed - before)
    assert computed == [10, 0, 6, 0]
    # without times every bucket is the unknown one
    assert engine.recommend(ids, user_id="a") == cold.recommend(ids) != cold.recommend(ids, times=times)


def test_skipped_items_take_their_times_with_them(timed):
    engine = made(timed)
    times = [FIRST, FIRST + WEEK, FIRST + 2 * WEEK]
    skipped = engine.recommend(["0001", "nope", "0003"], times=times, on_unknown="skip")
    assert list(skipped) == list(engine.recommend(["0001", "0003"], times=[times[0], times[2]]))


def test_a_session_holds_its_times(timed):
    engine, cold = made(timed), made(timed, kv_budget="0")
    session = engine.session("ada").append("0001", "0002", times=[FIRST, FIRST + WEEK])
    session.append("0003", times=[FIRST + 5 * WEEK])
    times = [FIRST, FIRST + WEEK, FIRST + 5 * WEEK]
    assert session.warm() == 3
    assert session.recommend() == cold.recommend(["0001", "0002", "0003"], times=times)
    assert session.recommend(candidates=["0005"]) == cold.recommend(
        ["0001", "0002", "0003"], times=times, candidates=["0005"]
    )
    session.replace(["0004"], times=[FIRST])
    assert session.recommend() == cold.recommend(["0004"], times=[FIRST])


def test_a_session_takes_any_times_or_none_and_nothing_by_half(timed):
    engine, cold = made(timed), made(timed, kv_budget="0")
    session = engine.session("ada").append("0001", "0002", times=np.array([FIRST, FIRST + WEEK]))
    session.append("0003", times=(time for time in [FIRST + 2 * WEEK]))
    bad = (np.array([1.0, 2.0]), ["x"], [float("inf")], 3.0, [10**400], None)
    for times in bad:
        with pytest.raises(InvalidRequest, match="append: ") as caught:
            session.append("0004", times=times)
        assert "\n" not in str(caught.value)
        assert session.history == ("0001", "0002", "0003")
    for times in bad[:-1]:
        with pytest.raises(InvalidRequest, match="replace: times: "):
            session.replace(["0004"], times=times)
    times = [FIRST, FIRST + WEEK, FIRST + 2 * WEEK]
    assert session.recommend() == cold.recommend(["0001", "0002", "0003"], times=times)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.zeros((2, 60)), "times: expected Unix seconds"),
        ([10**400, 0], "times: expected Unix seconds"),
        ("12", "times: expected Unix seconds"),
        ([1.0], "times: 1 for 2 interactions"),
        (3.0, "times: expected Unix seconds, one for each of 2 interactions"),
        (["a", "b"], "times: expected Unix seconds"),
        ([1.0, float("nan")], "times: they must be finite"),
        ([1.0, 1_700_000_000_000], "times: 1700000000000 s is thousands of years away; divide milliseconds by 1000"),
        ([-1e12, 1.0], "times: -1000000000000 s is thousands of years away"),
    ],
)
def test_bad_times_are_refused(timed, times, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        Request(["0001", "0002"], times=times)
    assert "\n" not in str(caught.value)


def test_a_model_without_times_says_so():
    with pytest.raises(InvalidRequest, match="times: this model was trained without"):
        made(make_tiny()).recommend(["0001"], times=[0.0])


def test_buckets_are_clipped_and_checked():
    assert CalendarConfig(0, 7, 3).buckets([-5, 0, 6.9, 7, 14, 1e9]).tolist() == [1, 1, 1, 2, 3, 3]
    for wrong in ((0, 0, 3), (0, 7, 0)):
        with pytest.raises(ConfigError):
            CalendarConfig(*wrong)
