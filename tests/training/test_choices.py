"""Every alternative of a recipe trains, resumes bit for bit, and is served as it was trained or refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import resumed_after
from torch.nn import functional as F

from speeder_engine import Engine, Item, Request
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.config import CalendarConfig, FollowersConfig, HeadsConfig, LivePriorConfig, PromptConfig
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.encoders.features import Features
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.live_prior import LivePopularity
from speeder_engine.runs import offsets_of
from speeder_engine.training.batches import PAD, TrainingBatches
from speeder_engine.training.config import BackboneConfig, CollaborativeConfig, Stage, TrainingConfig
from speeder_engine.training.fit import train, training_prior
from speeder_engine.training.language import make_calendar

BASE = TrainingConfig(
    instruction="Next:",
    window=10,
    window_step=5,
    backbone=BackboneConfig(vocab_size=270, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32),
    stages=(Stage("S1", ("text",), 1, 5e-3), Stage("S2", ("text", "collaborative"), 2, 5e-3, 0.5)),
    batch_size=32,
    token_dropout=0.1,
)
DAYS = 100 / 86_400  # the made data has an event a second
CHOICES = {
    "concat": {"mixing": "concat"},
    "mean": {"mixing": "mean"},
    "no positions": {"positions": "none"},
    "position tokens": {"positions": "token"},
    "calendar": {"calendar_days": DAYS},
    "live prior": {"live_prior": LivePriorConfig((DAYS, 10 * DAYS))},
    "live prior, calibrated": {"live_prior": LivePriorConfig((DAYS, 10 * DAYS)), "calibrate": True},
    "followers": {"followers": FollowersConfig(window=2, keep=5)},
    "followers, sampled softmax": {"followers": FollowersConfig(window=2), "sampled_items": 12},
    "tuned": {"collaborative": CollaborativeConfig(tune=True)},
    "averaged": {"averaging": 0.9},
    "residual dropout": {"backbone": replace(BASE.backbone, residual_dropout=0.1)},
    "all at once": {"stages": (Stage("all", ("text", "collaborative"), 2, 5e-3),)},
}
pytestmark = pytest.mark.filterwarnings("ignore::speeder_engine.errors.SpeederWarning")


def report(checkpoint, split):
    queries = split.queries("test")
    prior = query_prior(checkpoint, split, "test")
    lists = draw_candidates(split.dataset, queries, num_negatives=5)
    return evaluate(ModelScorer(checkpoint.model, checkpoint.item_tokens(), prior), queries, lists)


@pytest.mark.parametrize("choice", CHOICES)
def test_it_trains_resumes_and_is_served(split, tmp_path, choice):
    config = replace(BASE, **CHOICES[choice])
    whole = train(split, config, tmp_path / "whole")
    assert not any(module._forward_hooks for module in whole.model.modules())  # it may be trained again
    resumed = resumed_after(1, split, config, tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert all(np.array_equal(whole.features[n].values, resumed.features[n].values) for n in whole.features)
    found = report(Checkpoint.load(tmp_path / "whole"), split)
    assert found.uses_time is choice.startswith("live prior")
    assert found.metrics["hr@10"] > 0.55  # by chance 10 in 24
    if choice == "position tokens":
        with pytest.raises(ConfigError, match="not a 'token' of their own; train with another setting"):
            export_engine(tmp_path / "whole", tmp_path / "engine")
        return
    export_engine(tmp_path / "whole", tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", dtype="float32", kv_budget="1MiB")
    queries = split.queries("test")
    times = [queries.times[queries.offsets[q] : queries.offsets[q + 1]] for q in range(9)]
    expected = ModelScorer(whole.model, whole.item_tokens(), training_prior(whole, split)).user_vectors(
        [queries.history(q) for q in range(9)], times
    )
    given = times if config.calendar_days else [None] * 9
    requests = [Request([split.dataset.item_ids[row] for row in queries.history(q)], times=given[q]) for q in range(9)]
    np.testing.assert_allclose(engine.user_vectors(requests), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    if not choice.startswith("live prior"):  # its engine has the prior as it stood at the end of training
        served = evaluate(EngineScorer(engine, split.dataset.item_ids), queries, None)
        np.testing.assert_array_equal(served.ranks, found.ranks)


def test_what_followed_is_served_as_it_was_trained(split, tmp_path):
    """Whole rankings and named candidates by both heads, against the training model's."""
    checkpoint = train(split, replace(BASE, followers=FollowersConfig(window=2, keep=3)), tmp_path / "c")
    with torch.no_grad():
        checkpoint.model.followers.weights.copy_(torch.tensor([1.5, 0.75]))
    checkpoint.save(tmp_path / "c")
    export_engine(tmp_path / "c", tmp_path / "engine")
    scorer = ModelScorer(checkpoint.model, checkpoint.item_tokens(), training_prior(checkpoint, split))
    queries, ids = split.queries("test"), split.dataset.item_ids
    queries = queries.slice(0, 12)
    whole = scorer.scores(queries)
    lists = np.tile(np.arange(3, 11, dtype=np.int32), (12, 1))
    ranked = scorer.candidate_scores(queries, lists)
    prior = training_prior(checkpoint, split)
    by_retrieve = ModelScorer(checkpoint.model, checkpoint.item_tokens(), prior, head="retrieve")
    expected = np.take_along_axis(whole, lists, axis=1)
    np.testing.assert_allclose(by_retrieve.candidate_scores(queries, lists), expected, rtol=1e-4, atol=1e-4)
    engine = Engine.load(tmp_path / "engine", dtype="float32", kv_budget="1MiB")
    engine.set_available([ids[4]], False)
    whole[:, 4], ranked[:, 1] = -np.inf, -np.inf
    histories = [[ids[row] for row in queries.history(q)] for q in range(12)]
    scores = engine.scores([Request(history, 1) for history in histories], ids)
    np.testing.assert_allclose(np.delete(scores, 4, 1), np.delete(whole, 4, 1), rtol=1e-4, atol=1e-4)
    for k in (1, 3, len(ids)):
        found = engine.recommend_many([Request(history, k, exclude_seen=False) for history in histories])
        check_rankings(found, whole, ids, k)
    found = engine.recommend_many([Request(h, 9, candidates=[ids[row] for row in lists[0]]) for h in histories])
    for ranking, scores in zip(found, ranked, strict=True):
        order = lists[0][np.argsort(-scores, kind="stable")][:7]
        assert ranking.items == tuple(ids[row] for row in order)
        np.testing.assert_allclose(ranking.scores, np.sort(scores)[::-1][:7], rtol=1e-4, atol=1e-4)
    found = engine.recommend_many(
        [Request(h, 9, candidates=[ids[row] for row in lists[0]], head="retrieve") for h in histories]
    )
    for ranking, scores in zip(found, whole, strict=True):
        np.testing.assert_allclose(ranking.scores, np.sort(scores[lists[0]])[::-1][:7], rtol=1e-4, atol=1e-4)
    # lists of the request hold for what followed, too
    allowed, denied = [ids[row] for row in (2, 5, 6, 9)], [ids[9]]
    for ranking, scores in zip(
        engine.recommend_many([Request(h, 9, exclude_seen=False, allow=allowed, deny=denied) for h in histories]),
        whole,
        strict=True,
    ):
        assert set(ranking.items) == {ids[row] for row in (2, 5, 6)}
        np.testing.assert_allclose(ranking.scores, np.sort(scores[[2, 5, 6]])[::-1], rtol=1e-4, atol=1e-4)
    # a new item has followed nobody, and is scored all the same
    vectors = {name: each.values[0] for name, each in checkpoint.features.items()}
    engine.upsert([Item("new", vectors=vectors)])
    answers = engine.recommend_many([Request([*histories[0], "new"], 99), Request(histories[0], 99)])
    assert "new" in answers[1].items and len(answers[0].items) == len(answers[1].items) - 1


def check_rankings(found, scores, ids, k):
    for ranking, row in zip(found, scores, strict=True):
        order = np.argsort(-row, kind="stable")[: min(k, int(np.isfinite(row).sum()))]
        np.testing.assert_allclose(ranking.scores, row[order], rtol=1e-4, atol=1e-4)
        assert len(set(ranking.items)) == len(ranking.items)
        np.testing.assert_allclose(row[[ids.index(item) for item in ranking.items]], row[order], rtol=1e-4, atol=1e-4)


def test_mean_weighs_modalities_alike_and_concat_knows_what_is_missing(split, tmp_path):
    mean = train(split, replace(BASE, mixing="mean"), tmp_path / "mean").model.compressor
    features = {name: torch.randn(4, width) for name, width in mean.config.modalities.items()}
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    _, gates = mean.mix(features, present)
    torch.testing.assert_close(gates, torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    concat = train(split, replace(BASE, mixing="concat"), tmp_path / "concat").model.compressor.eval()
    tokens = concat(features, present)
    other = {name: torch.where(present[:, i : i + 1], x, 7.0) for i, (name, x) in enumerate(features.items())}
    torch.testing.assert_close(concat(other, present), tokens)
    fallback = concat.config.scale * F.layer_norm(concat.fallback, (32,), concat.norm.weight, concat.norm.bias)
    torch.testing.assert_close(tokens[3], fallback)
    assert not torch.allclose(concat(features, present, torch.tensor([1.0, 0.5]))[0], tokens[0])


def test_items_without_events_may_stay_out_of_the_softmax(split, tmp_path):
    """Training then doesn't depend on their features at all; by default it does."""
    events = split.train.rows != 5
    users = np.repeat(np.arange(split.train.num_users), split.train.lengths)[events]
    offsets = offsets_of(np.bincount(users, minlength=split.train.num_users))
    known = replace(split.train, offsets=offsets, rows=split.train.rows[events], times=split.train.times[events])
    cut = replace(split, train=known)
    text = split.dataset.items.vectors["text"]
    values = text.values.copy()
    values[5] = 3.0
    vectors = {**split.dataset.items.vectors, "text": Features(values, text.present)}
    other = replace(cut, dataset=replace(cut.dataset, items=replace(cut.dataset.items, vectors=vectors)))
    config = replace(BASE, cold_negatives=False, rank_weight=0.0, heads=replace(BASE.heads, rank=False))
    for each, alike in ((config, True), (replace(config, cold_negatives=True), False)):
        first, second = (
            train(part, each, tmp_path / f"{alike}{index}").model.backbone.state_dict()
            for index, part in enumerate((cut, other))
        )
        same = all(torch.equal(value, second[name]) for name, value in first.items())
        assert same is alike


def test_tuned_vectors_are_kept_and_missing_ones_stay_missing(split, tmp_path):
    config = replace(BASE, collaborative=CollaborativeConfig(tune=True))
    before = split.dataset.items.vectors["collaborative"]
    train(split, config, tmp_path / "c")
    after = Checkpoint.load(tmp_path / "c").features["collaborative"]
    assert np.array_equal(before.present, after.present) and not np.allclose(before.values, after.values)


def test_a_live_prior_never_sees_its_own_event_nor_what_validation_hides(split, tmp_path):
    config = replace(BASE, live_prior=LivePriorConfig((DAYS,)))
    checkpoint = train(split, config, tmp_path / "c")
    learned = checkpoint.model.config.live_prior
    assert learned is not None and len(learned.weights) == 1
    queries = split.queries("validation")
    prior = query_prior(checkpoint, split, "validation").at(torch.from_numpy(queries.query_times))
    data, hidden = split.dataset, split.dataset.offsets[split.users + 1] - 1
    kept = np.setdiff1d(np.arange(len(data.rows)), hidden)
    popularity = LivePopularity.of_events(learned, data.num_items, data.times[kept], data.rows[kept])
    for q in (0, 5, len(queries) - 1):
        np.testing.assert_allclose(prior[q].numpy(), popularity.prior(int(queries.query_times[q])), rtol=1e-4)
    stands = popularity_at_end(checkpoint, split)
    np.testing.assert_allclose(checkpoint.table.prior, stands, rtol=1e-4)


def popularity_at_end(checkpoint, split):
    train, live = split.train, checkpoint.model.config.live_prior
    return LivePopularity.of_events(live, 24, train.times, train.rows).prior(int(train.times.max()) + 1)


def test_calendar_buckets_reach_the_batches_and_are_dropped_by_histories(split):
    calendar = make_calendar(split, DAYS)
    assert calendar is not None and calendar.num_buckets == -(-int(np.ptp(split.train.times) + 1) // 100)
    config = replace(BASE, calendar_days=DAYS, time_dropout=0.5)
    shown = hidden = 0
    for batch in TrainingBatches(split.train, 24, config, calendar).epoch(0):
        for rows, n, buckets, times, targets in zip(
            batch.rows, batch.lengths, batch.buckets, batch.times, batch.targets, strict=True
        ):
            assert not buckets[n:].any() and len(rows) == len(buckets)
            if buckets[:n].any():
                assert np.array_equal(buckets[:n].numpy(), calendar.buckets(times[:n].numpy()))
            shown, hidden = shown + bool(buckets.any()), hidden + (not buckets.any())
            assert (times[1 : n + 1] > times[:n]).all() and (targets[n + 1 :] == PAD).all()
    assert 0.3 < shown / (shown + hidden) < 0.7


def test_what_cannot_be_is_refused(split):
    with pytest.raises(ConfigError, match="mixing: 'sum'; choose one of experts, mean, concat"):
        replace(BASE, mixing="sum")
    with pytest.raises(ConfigError, match="positions: 'late'; choose one of"):
        PromptConfig("x", (1,), positions="late")
    with pytest.raises(ConfigError, match=r"calibrate and heads\.retrieve: false contradict"):
        titles = HeadsConfig(retrieve=False, rank=False, title=True)
        replace(BASE, calibrate=True, heads=titles, retrieve_weight=0, rank_weight=0, title_weight=1)
    with pytest.raises(ConfigError, match="live_prior and heads"):
        replace(BASE, live_prior=LivePriorConfig(), heads=replace(BASE.heads, prior=False))
    of_text, both = (Stage("S", names, 1, 1e-3) for names in (("text",), ("text", "collaborative")))
    with pytest.raises(
        ConfigError, match=r"stage 'S': the last that is trained leaves out collaborative, which earlier"
    ):
        replace(BASE, stages=(both, of_text, replace(both, epochs=0)))
    # of what is never trained nothing is made
    assert replace(BASE, stages=(of_text, replace(both, epochs=0))).modalities == ("text",)
    timeless = replace(split, train=replace(split.train, times=None))
    with pytest.raises(DataError, match="calendar_days needs times"):
        make_calendar(timeless, 7)
    assert isinstance(make_calendar(split, 7), CalendarConfig)
