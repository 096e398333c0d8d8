from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines import LIVE_DAYS, fit_ensemble
from speeder_engine.evaluation.baselines.ensemble import WEIGHTS, Ensemble, Member
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.scorer import CatalogueScorer

NUM_ITEMS, DAY = 30, 86_400


@dataclass
class Fixed(CatalogueScorer):
    table: np.ndarray
    uses_time: bool = False
    name = "fixed"

    def scores(self, queries):
        return self.table[queries.users]


@pytest.fixture
def case(make_queries):
    """Three members: two know the target from different sides, one knows nothing."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, NUM_ITEMS, 90)
    queries = make_queries([rng.choice(NUM_ITEMS, 4).tolist() for _ in range(90)], targets)
    tables = [rng.normal(size=(90, NUM_ITEMS)).astype(np.float32) for _ in range(3)]
    for table in tables[:2]:
        table[np.arange(90), targets] += rng.random(90) * 3
    tables[1] = (100 * np.exp(tables[1])).round()  # counts
    return queries, [Member(Fixed(tables[0]), False), Member(Fixed(tables[1]), True), Member(Fixed(tables[2]), False)]


def _normed(table, damped):
    table = np.sqrt(np.maximum(table, 0)) if damped else table
    return (table - table.mean(axis=1, keepdims=True)) / table.std(axis=1, keepdims=True)


def test_weights_are_the_best_of_all_that_can_be_tried(case):
    queries, members = case
    found = Ensemble.fit("three", members, queries)
    tables = [_normed(member.scorer.table, member.damped) for member in members]
    gains = {}
    for second, third in product(WEIGHTS, repeat=2):
        mixed = tables[0] + np.float32(second) * tables[1] + np.float32(third) * tables[2]
        gains[second, third] = evaluate(Fixed(mixed), queries, None, show_progress=False).metrics["ndcg@10"]
    reached = evaluate(found, queries, None, show_progress=False).metrics["ndcg@10"]
    assert reached == pytest.approx(max(gains.values()), abs=1e-6)
    assert gains[found.weights[1:]] == pytest.approx(max(gains.values()), abs=1e-6)
    assert found.validated == pytest.approx(reached, abs=1e-6)
    alone = [evaluate(member.scorer, queries, None, show_progress=False).metrics["ndcg@10"] for member in members]
    assert reached > max(alone)
    assert found.weights[0] == 1 and found.weights[1] > found.weights[2]


def test_scales_of_members_change_nothing_and_a_silent_one_is_nothing(case):
    queries, members = case
    first, silent = members[0].scorer.table, np.full((90, NUM_ITEMS), 7, np.float32)
    plain = Ensemble("two", members[:2], (1.0, 0.5)).scores(queries)
    scaled = Ensemble("two", [Member(Fixed(9 * first - 3), False), members[1]], (1.0, 0.5)).scores(queries)
    np.testing.assert_allclose(scaled, plain, atol=1e-5)
    quiet = Ensemble("two", [members[0], Member(Fixed(silent), True)], (1.0, 3.0)).scores(queries)
    np.testing.assert_allclose(quiet, _normed(first, False), atol=1e-5)


def test_one_member_that_knows_the_time_is_enough(case):
    _, members = case
    timed = Member(Fixed(members[0].scorer.table, uses_time=True), False)
    assert not Ensemble("two", members[:2], (1.0, 0.5)).uses_time
    assert Ensemble("two", [members[0], timed], (1.0, 0.5)).uses_time
    with pytest.raises(ConfigError, match="two members or more"):
        Ensemble("one", members[:1], (1.0,))


@pytest.mark.parametrize("days", [1, 7])
def test_live_popularity_looks_back_as_far_as_validates_best(days, make_split):
    """What everybody takes changes once in so many days; the test's events, which a weighing must not see, are of one
    item that nobody took before."""
    rng, histories, times = np.random.default_rng(0), [], []
    for _ in range(150):
        when = np.sort(rng.integers(0, 60 * DAY, 6))
        histories.append([*(when[:-1] // (days * DAY) % (NUM_ITEMS - 1)).tolist(), NUM_ITEMS - 1])
        times.append(when.tolist())
    split = make_split(histories, times, NUM_ITEMS)
    found = fit_ensemble("itemknn+live_popularity", split)
    live = found.members[1].scorer
    assert live.days <= days < 2 * days
    tried = [
        Ensemble.fit(
            "x", [found.members[0], Member(RecentPopularity.fit_live(split, d, part="validation"), True)], asked
        )
        for asked in [split.queries("validation")]
        for d in LIVE_DAYS
    ]
    assert found.validated == max(each.validated for each in tried)
    assert live.days == LIVE_DAYS[int(np.argmax([each.validated for each in tried]))]
    # asked the test's queries, it has seen others' targets; asked those of validation, it hasn't
    assert len(live.rows) == split.dataset.num_interactions
    assert len(fit_ensemble("itemknn+live_popularity", split, "validation").members[1].scorer.rows) == 150 * 5


def test_without_validation_queries_there_is_nothing_to_weigh_by(make_split):
    split = make_split([[0, 1], [1, 2]], [[0, 1], [0, 1]], 3)
    with pytest.raises(DataError, match=r"itemknn\+live_popularity: no validation queries to weigh it by"):
        fit_ensemble("itemknn+live_popularity", split)
