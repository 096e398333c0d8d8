"""The sampled softmax stands for the full one, and no step grows with the catalogue."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, one_stage, without_dropout

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.items import Items
from speeder_engine.data.splits import leave_one_out
from speeder_engine.encoders.features import Features
from speeder_engine.errors import ConfigError, SpeederWarning
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.training.batches import PAD, TrainingBatches
from speeder_engine.training.config import HeadsConfig, TrainingConfig
from speeder_engine.training.features import make_features
from speeder_engine.training.fit import new_checkpoint, train
from speeder_engine.training.gradient import GradientMaker
from speeder_engine.training.language import make_language
from speeder_engine.training.sampled import ItemSampler, make_sampler
from speeder_engine.training.token_table import TokenTable

PLAIN = without_dropout(replace(one_stage(), heads=HeadsConfig(rank=False), rank_weight=0.0, order_weight=0.0))


def make_split(num_items, num_users=60, seed=0):
    """Popular items and a long tail; text vectors of 16 numbers."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 9, num_users)
    rows = (num_items * rng.random(lengths.sum()) ** 3).astype(np.int32)
    ids = tuple(f"{i:06d}" for i in range(num_items))
    vectors = rng.normal(size=(num_items, 16)).astype(np.float32)
    items = Items(ids, ids, ids, None, {"text": Features(vectors, np.ones(num_items, bool))})
    users = tuple(f"u{u}" for u in range(num_users))
    times = np.arange(len(rows), dtype=np.int64)
    return leave_one_out(Dataset("tail", items, users, offsets_of(lengths), rows, times))


def flat_gradient(model, gradient, batch, number=()):
    model.zero_grad()
    gradient.backward([batch], torch.ones(1), number)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_mean_of_sampled_gradients_is_near_the_full_one(tmp_path):
    split = make_split(400)
    torch.manual_seed(0)
    checkpoint = new_checkpoint(split, PLAIN, make_language(split, PLAIN), make_features(split, PLAIN, tmp_path))
    model = checkpoint.model.train()
    # scores that differ and a prior: where sampling could go wrong
    torch.nn.init.normal_(model.retrieve.project.weight, std=0.3)
    torch.nn.init.constant_(model.retrieve.beta, 0.5)
    table = TokenTable(model.compressor, checkpoint.features, 0.0)
    prior = ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    batch = next(TrainingBatches(split.train, 400, PLAIN).epoch(0))
    full = flat_gradient(model, GradientMaker(model, table, prior, PLAIN, torch.device("cpu")), batch)
    sampler = ItemSampler(np.bincount(split.train.rows, minlength=400), 200, seed=0)
    sampled = GradientMaker(model, table, prior, PLAIN, torch.device("cpu"), sampler)
    each = torch.stack([flat_gradient(model, sampled, batch, (i,)) for i in range(80)])
    error = ((each.mean(dim=0) - full).norm() / full.norm()).item()
    single = ((each - full).norm(dim=1).mean() / full.norm()).item()
    assert error < 0.03 and error < single / 3  # a bias would not shrink with the number of draws
    sampler.log_inclusion[:] = 0  # without the correction the mean is another gradient
    wrong = torch.stack([flat_gradient(model, sampled, batch, (i,)) for i in range(80)]).mean(dim=0)
    assert (wrong - full).norm() / full.norm() > 3 * error


def test_the_chance_to_be_drawn_is_the_one_that_is_corrected_for():
    counts = np.array([0, 0, 5, 40, 3, 0, 1, 0, 0, 12])
    batch = next(TrainingBatches(make_split(10, num_users=1).train, 10, CONFIG).epoch(0))
    batch = replace(batch, rows=batch.rows * 0, candidates=batch.candidates * 0, targets=batch.targets * 0 + PAD)
    sampler = ItemSampler(counts, 6, seed=1)
    seen = np.zeros(10)
    for number in range(3000):
        seen[sampler.draw(batch, (number,)).rows.numpy()] += 1
    assert seen[0] == 3000  # the batch holds it
    np.testing.assert_allclose(seen[1:] / 3000, np.exp(sampler.log_inclusion[1:]), atol=0.03)


def test_every_item_of_a_batch_is_there_once_and_uncorrected():
    split = make_split(300)
    sampler = ItemSampler(np.bincount(split.train.rows, minlength=300), 50, seed=0)
    batch = next(TrainingBatches(split.train, 300, CONFIG).epoch(0))
    sampled = sampler.draw(batch, (0, 1))
    again = sampler.draw(batch, (0, 1))
    assert torch.equal(sampled.rows, again.rows) and not torch.equal(sampled.rows, sampler.draw(batch, (0, 2)).rows)
    assert (sampled.rows.diff() > 0).all()
    renumbered = sampled.renumber(batch)
    real = batch.targets != PAD
    assert torch.equal(sampled.rows[renumbered.targets[real]], batch.targets[real])
    assert torch.equal(renumbered.targets == PAD, ~real)
    assert torch.equal(sampled.rows[renumbered.rows], batch.rows)
    assert torch.equal(sampled.rows[renumbered.candidates], batch.candidates)
    assert (sampled.log_inclusion[renumbered.targets[real]] == 0).all()
    assert (sampled.log_inclusion < 0).any()


def test_when_items_are_sampled():
    rows = np.zeros(4, np.int32)
    assert make_sampler(TrainingConfig(), np.bincount(rows, minlength=50_000)) is None
    assert make_sampler(TrainingConfig(), np.bincount(rows, minlength=50_001)).num_sampled == 8192
    assert make_sampler(TrainingConfig(full_softmax_items=100_000), np.bincount(rows, minlength=60_000)) is None
    assert make_sampler(TrainingConfig(sampled_items=7), np.bincount(rows, minlength=24)).num_sampled == 7
    assert make_sampler(TrainingConfig(sampled_items=24), np.bincount(rows, minlength=24)) is None
    with pytest.raises(ConfigError, match="label_smoothing needs a softmax over all 50,001 items"):
        make_sampler(TrainingConfig(label_smoothing=0.1), np.bincount(rows, minlength=50_001))


def test_sixty_thousand_items_train_and_few_are_compressed_in_a_step(tmp_path, monkeypatch):
    split = make_split(60_000, num_users=40)
    compressed = []
    real = TokenTable.forward

    def counted(self, share, items=None):
        tokens = real(self, share, items)
        if self.training:
            compressed.append(len(tokens))
        return tokens

    monkeypatch.setattr(TokenTable, "forward", counted)
    config = one_stage(epochs=2, validation_users=20)
    with pytest.warns(SpeederWarning, match="of 60,000 items have no training event"):
        checkpoint = train(split, replace(config, backbone=replace(config.backbone, vocab_size=300)), tmp_path / "c")
    assert compressed and max(compressed) < 9_000
    assert np.isfinite(checkpoint.metrics["loss"]) and 8 < checkpoint.metrics["loss"] < 12  # by chance log 60,000 = 11
