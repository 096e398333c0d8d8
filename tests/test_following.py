"""What followed, by the formula in plain Python; left out of training as if a segment had not been counted."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from speeder_engine.config import FollowersConfig
from speeder_engine.data.splits import Histories
from speeder_engine.errors import ConfigError
from speeder_engine.following import Following
from speeder_engine.models.follower_table import AT_ONCE
from speeder_engine.runs import offsets_of
from speeder_engine.training.batches import PAD
from speeder_engine.training.follower_counts import follower_table

NUM_ITEMS = 30
CONFIG = FollowersConfig(window=3, last=4, decay=0.6, discounts=(0.5, 0.3), keep=NUM_ITEMS)
BOTH = {"forward": CONFIG, "both ways": replace(CONFIG, forward=False)}


def make_train(histories):
    lengths = np.array([len(history) for history in histories])
    return Histories(offsets_of(lengths), np.concatenate(histories).astype(np.int32))


@pytest.fixture
def histories():
    rng = np.random.default_rng(0)
    return [rng.permutation(NUM_ITEMS - 1)[: rng.integers(1, 12)] for _ in range(60)]


def count(histories, config):
    """pairs[i, j] and events[i]."""
    pairs, events = np.zeros((NUM_ITEMS, NUM_ITEMS)), np.zeros(NUM_ITEMS)
    for history in histories:
        for at, item in enumerate(history):
            events[item] += 1
            for follower in history[at + 1 : at + 1 + config.window]:
                pairs[item, follower] += 1
                pairs[follower, item] += not config.forward
    return pairs, events


def similarities(pairs, events, config):
    taken = np.maximum(events, 1)
    return pairs * (taken ** -config.discounts[0])[:, None] * (taken ** -config.discounts[1])[None]


def expected(similar, history, config):
    sums = np.zeros(NUM_ITEMS)
    for back, item in enumerate(history[::-1][: config.last]):
        sums += config.decay**back * similar[item]
    return np.sqrt(np.maximum(sums, 0))


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("length", [0, 1, 3, 9])
def test_it_is_the_formula(histories, length, config):
    pairs, events = count(histories, config)
    similar = similarities(pairs, events, config)
    similar /= similar[similar > 0].mean()
    scorer = follower_table(config, make_train(histories), NUM_ITEMS).scorer()
    history = np.random.default_rng(length).permutation(NUM_ITEMS)[:length].astype(np.int32)
    found = scorer.following(history)
    wanted = expected(similar, history, config)
    np.testing.assert_array_equal(found.rows, np.flatnonzero(wanted))
    np.testing.assert_allclose(found.of(np.arange(NUM_ITEMS)), wanted, rtol=1e-5, atol=1e-6)


def test_an_item_keeps_its_nearest_followers(histories):
    whole = follower_table(CONFIG, make_train(histories), NUM_ITEMS).scorer().similar
    few = follower_table(FollowersConfig(**{**CONFIG.to_json(), "keep": 2}), make_train(histories), NUM_ITEMS)
    for item, (start, end) in enumerate(pairwise(few.offsets.tolist())):
        of_item = slice(whole.offsets[item], whole.offsets[item + 1])
        best = np.sort(whole.values[of_item])[::-1][:2]
        kept = np.isin(whole.rows[of_item], few.rows[start:end].numpy())
        np.testing.assert_allclose(np.sort(whole.values[of_item][kept])[::-1], best)
        assert end - start == min(2, of_item.stop - of_item.start)


def test_items_that_came_later_and_nothing_at_all_follow_nobody():
    table = follower_table(CONFIG, make_train([[1, 2]]), NUM_ITEMS)
    scorer = table.scorer()
    assert not len(scorer.following(np.array([NUM_ITEMS + 3], np.int32)).rows)
    later = scorer.following(np.array([1, NUM_ITEMS + 3], np.int32))
    np.testing.assert_array_equal(later.rows, [2])
    np.testing.assert_allclose(later.scores, np.sqrt(CONFIG.decay), rtol=1e-6)
    alone = follower_table(CONFIG, make_train([[1], [2]]), NUM_ITEMS)
    assert not len(alone.scorer().following(np.array([1], np.int32)).rows)
    assert alone.along(torch.tensor([[1]]), torch.tensor([[1, 2]])).abs().sum() == 0
    assert (Following(later.rows[:0], later.scores[:0]).of(np.array([3], np.int32)) == 0).all()


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("at_once", [1, 700, 1 << 19])
def test_a_segment_is_left_out_of_its_own_counts(histories, at_once, config, monkeypatch):
    table = follower_table(config, make_train(histories), NUM_ITEMS)
    pairs, events = count(histories, config)
    mean = similarities(pairs, events, config)
    mean = mean[mean > 0].mean()
    chosen = [history for history in histories if len(history) > 1][:5]
    longest = max(map(len, chosen)) - 1
    rows, targets = np.zeros((5, longest), np.int64), np.full((5, longest + 1), PAD)
    for b, history in enumerate(chosen):
        rows[b, : len(history) - 1], targets[b, : len(history)] = history[:-1], history
    told = torch.from_numpy(targets) != PAD
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    found = torch.full((*targets.shape, NUM_ITEMS), torch.nan)
    found[told] = table.along(torch.from_numpy(rows), torch.from_numpy(targets))
    with torch.autocast("cpu", torch.bfloat16):
        again = table.along(torch.from_numpy(rows), torch.from_numpy(targets))
    torch.testing.assert_close(again, found[told], rtol=0, atol=0)
    for b, history in enumerate(chosen):
        own, _ = count([history], config)
        similar = similarities(pairs - own, events, config) / mean
        for at in range(len(history)):
            np.testing.assert_allclose(found[b, at], expected(similar, history[:at], config), rtol=1e-3, atol=2e-3)
    # of some items alone, as where the softmax is sampled
    items = torch.from_numpy(np.union1d(np.concatenate(chosen), [2, 29]))
    some = torch.searchsorted(items, torch.from_numpy(rows).clamp_min(int(items[0])))
    some_targets = torch.where(
        torch.from_numpy(targets) == PAD, PAD, torch.searchsorted(items, torch.from_numpy(targets))
    )
    torch.testing.assert_close(table.along(some, some_targets, items), found[..., items][told])


def test_casts_leave_the_counts_and_gamma_alone(histories):
    table = follower_table(CONFIG, make_train(histories), NUM_ITEMS)
    with torch.no_grad():
        table.weights.copy_(torch.tensor([0.3, 1.7]))  # no numbers of bf16
    before, gamma = table.scorer().similar.values, table.weighed().gamma
    np.testing.assert_array_equal(table.to(torch.bfloat16).scorer().similar.values, before)
    again = type(table)(table.config)
    again.load_state_dict(table.state_dict())
    np.testing.assert_array_equal(again.scorer().similar.values, before)
    assert table.weighed().gamma == again.weighed().gamma == gamma
    assert again.double().float().weighed().gamma == gamma


def test_what_is_filled_anew_is_told_anew():
    first, other = (follower_table(CONFIG, make_train([[1, 2]] * times + [[3, 4]]), NUM_ITEMS) for times in (1, 5))
    asked = torch.tensor([[1]]), torch.tensor([[1, 4]])
    assert not torch.equal(first.along(*asked), other.along(*asked))
    assert torch.equal(first.fill(*other.counted()).along(*asked), other.along(*asked))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 0}, "followers.window must be within 1"),
        ({"last": 0}, "followers.last must be within 1"),
        ({"decay": 0.0}, "followers.decay must be within 0..1"),
        ({"discounts": (0.5,)}, "followers.discounts: two exponents"),
        ({"dropout": 1.0}, "followers.dropout must be at least 0 and below 1"),
        ({"keep": -1}, "followers.keep must be within 1"),
        ({"num_pairs": -1}, "followers.num_pairs can't be negative"),
    ],
)
def test_bad_settings_are_named(change, says):
    with pytest.raises(ConfigError, match=says):
        FollowersConfig(**change)
