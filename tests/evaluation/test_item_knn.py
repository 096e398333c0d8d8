from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.encoders import pairs
from speeder_engine.encoders.pairs import count_followers
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines.item_knn import ItemKNN, ItemKNNConfig
from speeder_engine.evaluation.protocols import evaluate

NUM_ITEMS = 8
histories_of = st.lists(st.lists(st.integers(0, NUM_ITEMS - 2), max_size=9), max_size=8)
configs = st.builds(
    ItemKNNConfig,
    window=st.none() | st.integers(1, 5),
    forward=st.booleans(),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    beta=st.sampled_from([0.0, 0.5]),
    last=st.integers(1, 6),
    decay=st.sampled_from([0.5, 1.0]),
)


def counted_pairs(histories, window, forward):
    pairs = Counter()
    for history in histories:
        for a, b in combinations(range(len(history)), 2):
            if window is None or b - a <= window:
                pairs[history[a], history[b]] += 1
                if not forward:
                    pairs[history[b], history[a]] += 1
    return pairs


def loop(histories, asked, config):
    counts = Counter(item for history in histories for item in history)
    pairs = counted_pairs(histories, config.window, config.forward)
    scores = [0.0] * NUM_ITEMS
    for back, item in enumerate(asked[::-1][: config.last]):
        for j in range(NUM_ITEMS):
            if pairs[item, j]:
                similarity = pairs[item, j] / (counts[item] ** config.beta * counts[j] ** config.alpha)
                scores[j] += config.decay**back * similarity
    return scores, counts


@settings(deadline=None, max_examples=100)
@given(histories=histories_of, asked=histories_of, config=configs)
def test_scores_are_those_of_a_loop(histories, asked, config, make_train, make_queries):
    found = ItemKNN.fit(make_train(histories), NUM_ITEMS, config).scores(make_queries(asked, [0] * len(asked)))
    assert found.shape == (len(asked), NUM_ITEMS) and found.dtype == np.float32
    for line, history in zip(found, asked, strict=True):
        expected, counts = loop(histories, history, config)
        reached = [j for j in range(NUM_ITEMS) if expected[j] > 0]
        assert np.flatnonzero(line > 0).tolist() == reached
        np.testing.assert_allclose(line[reached], [expected[j] for j in reached], rtol=1e-5)
        rest = [j for j in range(NUM_ITEMS) if expected[j] == 0]
        assert np.array_equal(np.sign(np.subtract.outer(line[rest], line[rest])), signs([counts[j] for j in rest]))


def signs(values):
    return np.sign(np.subtract.outer(np.array(values, np.int64), np.array(values, np.int64)))


@pytest.mark.parametrize("forward", [True, False])
def test_merging_now_and_then_counts_the_same(forward, make_train, monkeypatch):
    histories = np.random.default_rng(0).integers(0, NUM_ITEMS, (20, 12)).tolist()
    monkeypatch.setattr(pairs, "PAIRS_AT_ONCE", 50)
    train = make_train(histories)
    table = count_followers(train.offsets, train.rows, NUM_ITEMS, 4, forward)
    rows = np.repeat(np.arange(NUM_ITEMS), np.diff(table.offsets)).tolist()
    found = dict(zip(zip(rows, table.rows.tolist(), strict=True), table.values.tolist(), strict=True))
    assert found == counted_pairs(histories, 4, forward)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"last": 0}, "last 0"),
        ({"window": 0}, "window 0"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.5}, "decay"),
        ({"alpha": -0.1}, "alpha"),
        ({"beta": -1.0}, "beta"),
    ],
)
def test_settings_out_of_range_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        ItemKNNConfig(**change)


def test_more_items_than_there_are_is_refused(make_train):
    with pytest.raises(DataError, match="num_items is 3"):
        ItemKNN.fit(make_train([[1, 7]]), 3)


def test_real_data_gives_the_independent_reference_figures(shared_data):
    """The reference names no window: 5 gives its figures, and the one that validation chose is above them."""
    split = leave_one_out(load_dataset(shared_data / "movietweetings-mm"))
    queries, num_items = split.queries("test"), split.dataset.num_items
    close = ItemKNN.fit(split.train, num_items, ItemKNNConfig(window=5, alpha=0.3, last=10, decay=0.6))
    metrics = evaluate(close, queries, None).metrics
    assert metrics["hr@10"] == pytest.approx(0.240, abs=0.004)
    assert metrics["ndcg@10"] == pytest.approx(0.136, abs=0.004)
    assert metrics["mrr"] == pytest.approx(0.118, abs=0.004)
    tuned = evaluate(ItemKNN.fit(split.train, num_items), queries, None).metrics
    assert tuned["hr@10"] > 0.250 and tuned["ndcg@10"] > 0.140
