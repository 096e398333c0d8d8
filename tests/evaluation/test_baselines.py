from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from speeder_engine.cli import app
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines import BASELINES, COUNTED, ENSEMBLES, TIMED, TRAINED
from speeder_engine.evaluation.baselines.markov import LastItemMarkov
from speeder_engine.evaluation.baselines.popularity import Popularity, back_off
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
from speeder_engine.evaluation.protocols import evaluate

DAY = 86_400
NUM_ITEMS = 12


@pytest.fixture
def log():
    """25 users' histories (some empty) of 12 items and their times; item 11 never stands in one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 15, 25)
    histories = [rng.integers(0, NUM_ITEMS - 1, length).tolist() for length in lengths]
    # whole days, so that events fall on the very edges of windows
    times = [np.sort(rng.integers(0, 40, length) * DAY).tolist() for length in lengths]
    return histories, times


def _order(scores):
    return np.argsort(-scores, axis=1, kind="stable").tolist()


def _by(key):
    return sorted(range(NUM_ITEMS), key=lambda row: (*[-count[row] for count in key], row))


def test_popularity_counts(log, make_train, make_queries):
    counts = Counter(row for history in log[0] for row in history)
    queries = make_queries([[], [1, 2]], [0, 0])
    scores = Popularity.fit(make_train(*log), NUM_ITEMS).scores(queries)
    assert scores.dtype == np.float32
    assert scores.tolist() == [[counts[row] for row in range(NUM_ITEMS)]] * 2


def test_markov_counts_transitions_and_backs_off_to_popularity(log, make_train, make_queries):
    popularity = Counter(row for history in log[0] for row in history)
    pairs = Counter(pair for history in log[0] for pair in pairwise(history))
    histories = [[3, last] for last in range(NUM_ITEMS)] + [[]]
    scores = LastItemMarkov.fit(make_train(*log), NUM_ITEMS).scores(make_queries(histories, [0] * 13))
    expected = [_by(({row: pairs[last, row] for row in range(NUM_ITEMS)}, popularity)) for last in range(NUM_ITEMS)]
    assert _order(scores) == [*expected, _by((popularity,))]
    assert scores.dtype == np.float32
    for last in range(NUM_ITEMS):
        assert np.floor(scores[last]).tolist() == [pairs[last, row] for row in range(NUM_ITEMS)]


@pytest.mark.parametrize("days", [0.5, 1, 7, 100])
def test_recent_popularity_counts_the_window_before_the_query(log, days, make_train, make_queries):
    histories, times = log
    popularity = Counter(row for history in histories for row in history)
    events = [
        event for history, when in zip(histories, times, strict=True) for event in zip(history, when, strict=True)
    ]
    query_times = np.random.default_rng(1).integers(-2, 45, 30) * DAY
    train = make_train(histories, times)
    scores = RecentPopularity.fit(train, NUM_ITEMS, days).scores(make_queries([[]] * 30, [0] * 30, query_times))
    for found, now in zip(scores, query_times.tolist(), strict=True):
        window = Counter(row for row, time in events if now - days * DAY <= time < now)
        assert np.floor(found).tolist() == [window[row] for row in range(NUM_ITEMS)]
        assert _order(found[None])[0] == _by((window, popularity))


@pytest.mark.parametrize("days", [1, 7])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_live_popularity_counts_all_that_was_known(log, days, part, make_split):
    """By hand, event for event; whole days make others' events, and targets, coincide with the query."""
    histories, times = log
    split = make_split(histories, times, NUM_ITEMS)
    # to validation the test's events are unknown
    last = -1 if part == "validation" else None
    seen = [(h, t) if len(h) < 3 else (h[:last], t[:last]) for h, t in zip(histories, times, strict=True)]
    events = [pair for history, when in seen for pair in zip(history, when, strict=True)]
    trained = Counter(split.train.rows.tolist())
    queries = split.queries(part)
    scores = RecentPopularity.fit_live(split, days, part=part).scores(queries)
    for found, now in zip(scores, queries.query_times.tolist(), strict=True):
        known = Counter(row for row, time in events if now - days * DAY <= time < now)
        assert np.floor(found).tolist() == [known[row] for row in range(NUM_ITEMS)]
        assert _order(found[None])[0] == _by((known, trained))


def test_live_popularity_sees_others_targets_and_never_its_own(make_split):
    """Three users whose last events stand on days 5, 6 and 6: only the first one's can be known, by the other two."""
    histories = [[0, 1, 7], [2, 3, 8], [4, 5, 8]]
    times = [[0, DAY, 5 * DAY], [0, DAY, 6 * DAY], [0, DAY, 6 * DAY]]
    split = make_split(histories, times, NUM_ITEMS)
    queries = split.queries("test")
    live = np.floor(RecentPopularity.fit_live(split, 14).scores(queries))
    assert live[:, 7].tolist() == [0, 1, 1] and live[:, 8].tolist() == [0, 0, 0]
    trained = RecentPopularity.fit(split.train, NUM_ITEMS).scores(queries)
    assert np.floor(trained[:, 7]).tolist() == [0, 0, 0]


def test_popularity_at_last_looks_back_from_the_history(log, make_split):
    histories, times = log
    split = make_split(histories, times, NUM_ITEMS)
    events = list(zip(split.train.rows.tolist(), split.train.times.tolist(), strict=True))
    trained = Counter(split.train.rows.tolist())
    queries = split.queries("test")
    scorer = RecentPopularity.fit(split.train, NUM_ITEMS, name="popularity_at_last", until="last")
    assert not scorer.uses_time
    timeless = replace(queries, query_times=None)
    for q, found in enumerate(scorer.scores(timeless)):
        now = int(queries.history_times(q)[-1])
        window = Counter(row for row, time in events if now - 14 * DAY <= time < now)
        assert _order(found[None])[0] == _by((window, trained))


def test_an_empty_history_has_no_last_moment(log, make_train, make_queries):
    scorer = RecentPopularity.fit(make_train(*log), NUM_ITEMS, until="last")
    queries = make_queries([[], [3]], [0, 0])
    scores = scorer.scores(replace(queries, times=np.array([20 * DAY], np.int64)))
    assert scores[0].tolist() == scorer.popularity.tolist() and scores[1].max() >= 1


def test_back_off_keeps_the_order_and_stays_below_one():
    counts = np.array([5, 0, 5, 1_000_000, 3])
    found = back_off(counts)
    assert found.min() == 0 and found.max() < 1
    np.testing.assert_array_equal(np.sign(np.subtract.outer(found, found)), np.sign(np.subtract.outer(counts, counts)))


def test_names_are_those_of_the_registry(log, make_split):
    fitted = {name: factory(make_split(*log)) for name, factory in BASELINES.items()}
    assert {name: scorer.name for name, scorer in fitted.items()} == {name: name for name in BASELINES}
    timed = {*TIMED, "sasrec_time", *(name for name in ENSEMBLES if "live" in name)} - {"popularity_at_last"}
    assert {name for name, scorer in fitted.items() if scorer.uses_time} == timed
    assert set(BASELINES) == {*COUNTED, *TIMED, *TRAINED, *ENSEMBLES}


def test_help_names_every_baseline():
    said = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "120"}).output
    assert [name for name in BASELINES if name not in said] == []


def test_what_can_not_be_fitted_is_refused(log, make_train, make_queries):
    train = make_train(*log)
    for kind in (Popularity, LastItemMarkov, RecentPopularity):
        with pytest.raises(DataError, match="num_items is 5"):
            kind.fit(train, 5)
    with pytest.raises(DataError, match="no times"):
        RecentPopularity.fit(make_train(log[0]), NUM_ITEMS)
    with pytest.raises(DataError, match="queries have no times"):
        RecentPopularity.fit(train, NUM_ITEMS).scores(make_queries([[]], [0]))
    with pytest.raises(ConfigError, match="above 0"):
        RecentPopularity.fit(train, NUM_ITEMS, days=0)


REFERENCE = {
    "popularity": (0.131, 0.068, 0.064, 0.453),
    "markov": (0.198, 0.111, 0.097, 0.471),
    "recent_popularity": (0.278, 0.164, 0.144, 0.549),
    "live_popularity": (0.297, 0.179, 0.157, 0.559),
    "live_popularity_2": (0.321, 0.204, 0.179, 0.546),
}


@pytest.fixture(scope="session")
def movies(shared_data):
    dataset = load_dataset(shared_data / "movietweetings-mm")
    split = leave_one_out(dataset)
    queries = split.queries("test")
    return split, queries, draw_candidates(dataset, queries)


@pytest.mark.parametrize("name", REFERENCE)
def test_real_data_gives_the_independent_reference_figures(name, movies):
    split, queries, lists = movies
    report = evaluate(BASELINES[name](split), queries, lists)
    hits, gain, reciprocal, valid_hits = REFERENCE[name]
    assert report.metrics["hr@10"] == pytest.approx(hits, abs=0.004)
    assert report.metrics["ndcg@10"] == pytest.approx(gain, abs=0.004)
    assert report.metrics["mrr"] == pytest.approx(reciprocal, abs=0.004)
    # other lists were drawn for the reference
    assert report.metrics["vhr@1"] == pytest.approx(valid_hits, abs=0.015)
