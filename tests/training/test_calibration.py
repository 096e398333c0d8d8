"""Factors of the prior and of what followed, judged by whole rankings of the training model itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, log_of

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.config import FollowersConfig
from speeder_engine.errors import SpeederWarning
from speeder_engine.evaluation.metrics import ndcg
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.training import calibration
from speeder_engine.training.calibration import Contenders, best_factors, calibrate, scale
from speeder_engine.training.fit import train, validation_queries

SETTINGS = replace(CONFIG, stages=CONFIG.stages[:1], followers=FollowersConfig(window=2, keep=5))


@pytest.fixture(scope="module")
def trained(split, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "c"
    train(split, SETTINGS, out)
    return out


def scorer_of(folder, split):
    checkpoint = Checkpoint.load(folder)
    return ModelScorer(checkpoint.model, checkpoint.item_tokens(), query_prior(checkpoint, split, "validation"))


def gains(scorer, queries):
    fresh = ModelScorer(scorer.model, scorer.tokens, scorer.prior)  # gamma as it is now
    return ndcg(evaluate(fresh, queries, None, show_progress=False).ranks, 10)


@pytest.mark.parametrize("in_reach", [10, 100])  # less than the catalogue of 24, and all of it
def test_gains_are_those_of_a_model_with_these_weights(split, trained, monkeypatch, in_reach):
    monkeypatch.setattr(calibration, "IN_REACH", in_reach)
    monkeypatch.setattr(calibration, "AT_ONCE", 7 * 24)
    queries = split.queries("validation")
    contenders = Contenders.of(scorer_of(trained, split), queries)
    assert (len(contenders.query) < 24 * len(queries)) and len(contenders.target) == len(queries)
    for factors in ((1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.4, 0.7)):
        scorer = scorer_of(trained, split)
        scale(scorer.model, dict(zip(("prior", "followers"), factors, strict=True)))
        # another order of sums may part what is equal but for rounding
        assert (contenders.gains(factors) != gains(scorer, queries)).mean() < 0.01


def test_weights_that_training_would_not_have_left_are_found_again(split, trained):
    scorer, queries = scorer_of(trained, split), split.queries("validation")
    before = gains(scorer, queries).mean()
    scale(scorer.model, {"prior": 1.0, "followers": 0.05})
    lost = scorer_of(trained, split)
    lost.model.load_state_dict(scorer.model.state_dict())
    lost = ModelScorer(lost.model, lost.tokens, lost.prior)
    worse = gains(lost, queries).mean()
    factors = calibrate(lost, queries)
    scale(lost.model, factors)
    found = gains(lost, queries).mean()
    assert worse < before and factors["followers"] > 2 and worse < found


def test_the_best_of_all_factors_is_found_and_of_equal_ones_the_nearest_to_one():
    """Two queries of three items: the first term must count double for one of them, the second is nothing."""
    values = np.array([[1, 0, 0], [0, 0.6, 0], [0.5, 0, 0], [1, 0, 0], [0, 0.4, 0], [0, 0, 0]], np.float32)
    query, target = np.repeat([0, 1], 3), np.array([1, 3])
    contenders = Contenders(values, query, np.zeros(6, np.bool_), target)
    assert best_factors(contenders) == (1.7, 1.0)  # of 1.7 to 2.0
    np.testing.assert_allclose(contenders.gains((1.7, 1.0)), [1, 1])
    np.testing.assert_allclose(contenders.gains((1.0, 1.0)), [1 / np.log2(3), 1])


def test_a_calibrated_run_keeps_the_weights_it_has_validated(split, trained, tmp_path):
    calibrated = train(split, replace(SETTINGS, calibrate=True), tmp_path / "c")
    *epochs, last = log_of(tmp_path / "c")
    assert last["stage"] == "calibration" and epochs == strip(log_of(trained), epochs)
    assert last["ndcg@10"] >= max(record["ndcg@10"] for record in epochs)
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.metrics == last and calibrated.metrics == last
    plain = Checkpoint.load(trained).model
    torch.testing.assert_close(loaded.model.retrieve.beta, plain.retrieve.beta * last["factors"]["prior"])
    torch.testing.assert_close(loaded.model.followers.retrieve, plain.followers.retrieve * last["factors"]["followers"])
    assert torch.equal(loaded.model.followers.rank, plain.followers.rank)
    assert torch.equal(loaded.model.rank.beta, plain.rank.beta)
    found = gains(scorer_of(tmp_path / "c", split), validation_queries(split, SETTINGS)).mean()
    assert found == pytest.approx(last["ndcg@10"])


def strip(records, like):
    """Of another run: what its clock says is this one's."""
    clock = ("seconds", "targets_per_second")
    return [record | {name: other[name] for name in clock} for record, other in zip(records, like, strict=True)]


def test_a_model_that_adds_nothing_is_left_as_it_is(split, tmp_path):
    config = replace(SETTINGS, followers=None, heads=replace(SETTINGS.heads, prior=False), calibrate=True)
    train(split, config, tmp_path / "c")
    last = log_of(tmp_path / "c")[-1]
    assert last["factors"] == {} and last["ndcg@10"] == max(record["ndcg@10"] for record in log_of(tmp_path / "c"))


def test_few_users_choose_nothing(split, trained):
    scorer = scorer_of(trained, split)
    few = split.queries("validation").slice(0, calibration.FEWEST_USERS - 1)
    with pytest.warns(SpeederWarning, match="99 validation users are too few to choose weights by, 100 are needed"):
        assert calibrate(scorer, few) == {"prior": 1.0, "followers": 1.0}


def test_it_is_calibrated_on_the_items_as_they_are_served(split, tmp_path):
    """Not as a stage without epochs would have them."""
    both = replace(SETTINGS.stages[0], modalities=("text", "collaborative"))
    stages = (both, replace(SETTINGS.stages[0], name="S2", epochs=0))
    train(split, replace(SETTINGS, stages=stages, calibrate=True), tmp_path / "c")
    found = gains(scorer_of(tmp_path / "c", split), validation_queries(split, SETTINGS)).mean()
    assert found == pytest.approx(log_of(tmp_path / "c")[-1]["ndcg@10"])
