"""Packed rows against the padded batch they come from: the same losses and gradients, fewer rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import make_tiny, make_titled

from speeder_engine.config import HeadsConfig
from speeder_engine.data.splits import Histories
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.title_text import TitleText
from speeder_engine.training.batches import PAD, TrainingBatches
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.losses import compute_losses
from speeder_engine.training.packing import Packing, first_fit, packed_forward
from speeder_engine.training.title_targets import TitleTargets

LENGTHS = [3, 9, 2, 30, 5, 2, 12, 4]
HEADS = {
    "retrieve": {"heads": HeadsConfig(rank=False), "rank_weight": 0.0, "order_weight": 0.0},
    "all": {"heads": HeadsConfig(title=True), "title_weight": 0.5, "title_targets": 2},
}


def config_of(heads="all", **settings):
    shape = {"window": 12, "window_step": 4, "batch_size": 16, "token_dropout": 0.0}
    return TrainingConfig(**shape, **HEADS[heads], **settings)


def make_batches(config, lengths=LENGTHS, tiny=None):
    rows = np.random.default_rng(1).integers(0, 120, sum(lengths)).astype(np.int32)
    titles = TitleTargets(tiny.titles, TitleText(tiny.tokenizer, 512), 2) if config.heads.title else None
    return TrainingBatches(Histories(offsets_of(np.array(lengths)), rows), 120, config, titles=titles)


def learn(tiny, batch, config):
    """Losses, and the gradient of all that learned."""
    tiny.model.zero_grad()
    tokens = tiny.tokens.clone().requires_grad_()
    losses = compute_losses(tiny.model, tokens, ConstantPrior(tiny.prior), batch, config)
    losses.total.backward()
    return losses, [tokens.grad] + [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("heads", HEADS)
def test_losses_and_gradients_are_those_of_the_padded_batch(heads):
    tiny = make_titled() if heads == "all" else make_tiny()
    config = config_of(heads)
    (batch,) = make_batches(config, tiny=tiny).epoch(0)
    padded, expected = learn(tiny, batch, config)
    packed, found = learn(tiny, batch, replace(config, packing=True))
    for name in ("retrieve", "rank", "order", "title", "total"):
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), atol=1e-5, rtol=1e-5)
    assert packed.retrieve > 0 and packed.num_targets == padded.num_targets
    assert (packed.title > 0) == (packed.rank > 0) == (heads == "all")
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_position_prompts_of_their_own_are_packed_too():
    tiny = make_tiny()
    tiny.model.config = replace(tiny.model.config, prompt=replace(tiny.model.config.prompt, positions="token"))
    config = config_of("retrieve")
    (batch,) = make_batches(config).epoch(0)
    padded, _ = learn(tiny, batch, config)
    packed, _ = learn(tiny, batch, replace(config, packing=True))
    torch.testing.assert_close(packed.total, padded.total, atol=1e-5, rtol=1e-5)


def test_the_backbone_is_spared_the_padding():
    tiny, asked = make_tiny(instruction_len=2), []
    tiny.model.backbone.register_forward_pre_hook(
        lambda module, args, given: asked.append(given["inputs_embeds"].shape), with_kwargs=True
    )
    config = config_of("retrieve", packing=True)
    (batch,) = make_batches(config, [13, *[4] * 15]).epoch(0)
    losses = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, config)
    # rows of 14 places: one segment of 2 + 12, fifteen of 2 + 3 in pairs
    assert batch.rows.shape == (16, 12) and asked == [(1 + 8, 14, 48)]
    assert (losses.num_rows, losses.padding) == (9 * 14, 9 * 14 - (16 * 2 + 12 + 15 * 3))


def test_a_segment_sees_nothing_of_its_neighbours():
    tiny = make_tiny(instruction_len=2)
    embeddings = torch.randn(4, 9, 48)
    real = torch.arange(9) < torch.tensor([[9], [4], [5], [3]])
    positions = torch.arange(9).expand(4, -1)
    packing = Packing.of(real)
    with torch.no_grad():
        before = packed_forward(tiny.model, packing, embeddings, positions, None)
        changed = embeddings.clone()
        changed[1] = torch.randn(9, 48)
        after = packed_forward(tiny.model, packing, changed, positions, None)
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(after[others], before[others], atol=0, rtol=0)
    assert not torch.equal(after[1, :4], before[1, :4])
    assert not before[~real].any()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_rows_hold_every_segment_once_and_come_back(lengths):
    longest = max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    packing = Packing.of(real)
    assert len(set(packing.places.tolist())) == sum(lengths)
    values = torch.randn(len(lengths), longest, 3)
    kept = values * real.unsqueeze(2)
    assert torch.equal(packing.unpack(packing.pack(values), values), kept)
    assert packing.num_rows <= 2 * -(-sum(lengths) // longest)  # at most one row is less than half full
    mask = packing.mask(None)
    assert mask.any(dim=3).all()  # a row that sees nobody would be NaN
    assert int(mask.sum()) == sum(n * (n + 1) // 2 for n in lengths) + packing.num_rows * longest - sum(lengths)


def test_first_fit_fills_rows_to_the_brim():
    rows, starts = first_fit([2, 6, 3, 4, 1], 8)
    assert rows == [0, 0, 1, 1, 1] and starts == [6, 0, 4, 0, 7]


def test_packed_batches_are_drawn_at_random_and_train_every_target_once():
    config = config_of("retrieve", packing=True)
    batches = make_batches(replace(config, batch_size=4), [*range(2, 40)])
    spreads = []
    targets = []
    for batch in batches.epoch(1):
        targets += batch.targets[batch.targets != PAD].tolist()
        spreads.append(int(batch.lengths.max() - batch.lengths.min()))
    assert sorted(targets) == sorted(batches.histories.rows.tolist())
    by_length = make_batches(replace(config, batch_size=4, packing=False), [*range(2, 40)])
    alike = [int(batch.lengths.max() - batch.lengths.min()) for batch in by_length.epoch(1)]
    assert np.mean(spreads) > 2 * np.mean(alike)
