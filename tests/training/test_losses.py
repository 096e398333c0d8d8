"""The one packed forward pass against separate ones: nothing may leak between its parts."""

import numpy as np
import pytest
import torch
from reference import make_tiny, reference_scores
from torch.nn import functional as F

from speeder_engine.config import FollowersConfig, HeadsConfig
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.training.batches import PAD, TrainingBatch, no_titles
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.losses import compute_losses

CONFIG = TrainingConfig(window=12, window_step=4, token_dropout=0.0, modality_dropout=0.0)


@pytest.fixture
def tiny():
    made = make_tiny(window=12, step=4)
    made.model.eval()
    return made


def make_batch(lengths=(3, 7, 1), seed=0):
    rng = np.random.default_rng(seed)
    size, longest = len(lengths), max(lengths)
    rows, targets = np.zeros((size, longest), np.int64), np.full((size, longest + 1), PAD)
    for i, n in enumerate(lengths):
        items = rng.integers(0, 120, n + 1)
        rows[i, :n], targets[i, : n + 1] = items[:-1], items
    cuts = np.array([rng.integers(1, n + 1) for n in lengths])
    negatives = rng.integers(0, 120, (size, 4))
    candidates = np.concatenate([targets[np.arange(size), cuts][:, None], negatives], axis=1)
    pairs = np.array([[max(n - 1, 0), 0] for n in lengths])
    arrays = (rows, np.array(lengths), targets, cuts, candidates, pairs)
    return TrainingBatch(
        *(torch.from_numpy(array) for array in arrays),
        torch.zeros(size),
        torch.zeros(size, longest, dtype=torch.long),
        torch.zeros(size, longest + 1, dtype=torch.long),
        *(torch.from_numpy(array) for array in no_titles(size)),
    )


def test_losses_equal_those_of_separate_prompts(tiny):
    batch = make_batch()
    losses = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, CONFIG)
    retrieve, rank = [], []
    for i, n in enumerate(batch.lengths.tolist()):
        rows = batch.rows[i, :n].numpy()
        for position in range(n + 1):
            scores, _ = reference_scores(tiny, rows[:position])
            retrieve.append(F.cross_entropy(scores, batch.targets[i, position]))
        _, scores = reference_scores(tiny, rows[: int(batch.cuts[i])], batch.candidates[i].tolist())
        rank.append(F.cross_entropy(scores, torch.tensor(0)))
    torch.testing.assert_close(losses.retrieve, torch.stack(retrieve).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.rank, torch.stack(rank).mean(), atol=1e-5, rtol=1e-5)
    assert losses.num_targets == int((batch.targets != PAD).sum())


def test_padding_and_company_change_nothing(tiny):
    whole = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), make_batch((3, 7, 1)), CONFIG)
    order, rank, retrieve, count = [], [], 0.0, 0
    batch = make_batch((3, 7, 1))
    for i, n in enumerate(batch.lengths.tolist()):
        alone = TrainingBatch(
            batch.rows[i : i + 1, :n],
            batch.lengths[i : i + 1],
            batch.targets[i : i + 1, : n + 1],
            *(getattr(batch, name)[i : i + 1] for name in ("cuts", "candidates", "pairs", "first_is_earlier")),
            batch.buckets[i : i + 1, :n],
            batch.times[i : i + 1, : n + 1],
            batch.title_cuts[i : i + 1],
            batch.titles[i : i + 1],
        )
        losses = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), alone, CONFIG)
        rank.append(losses.rank)
        if n > 1:
            order.append(losses.order)
        retrieve, count = retrieve + losses.retrieve * losses.num_targets, count + losses.num_targets
    torch.testing.assert_close(whole.rank, torch.stack(rank).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.order, torch.stack(order).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.retrieve, retrieve / count, atol=1e-5, rtol=1e-5)


def test_the_order_task_sees_the_history(tiny):
    """The same two items in another history must be able to get another answer."""
    batch = make_batch((7,))
    before = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, CONFIG).order
    batch.rows[0, 3] = (batch.rows[0, 3] + 1) % 120
    assert compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, CONFIG).order != before


def test_a_loss_without_weight_is_not_computed(tiny):
    without = HeadsConfig(rank=False)
    config = TrainingConfig(
        window=12, window_step=4, token_dropout=0.0, rank_weight=0.0, order_weight=0.0, heads=without
    )
    full = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), make_batch(), CONFIG)
    bare = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), make_batch(), config)
    torch.testing.assert_close(bare.retrieve, full.retrieve, atol=1e-5, rtol=1e-5)
    assert bare.rank == bare.order == 0 and bare.total == bare.retrieve


def test_gradients_reach_every_part(tiny):
    tiny.tokens.requires_grad_()
    compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), make_batch(), CONFIG).total.backward()
    untouched = [
        name
        for name, parameter in tiny.model.named_parameters()
        if parameter.grad is None and not name.startswith("compressor.")
    ]
    assert untouched == []
    assert tiny.tokens.grad is not None


def test_a_share_of_segments_is_scored_without_followers():
    """In training alone; who is dropped is scored as if gamma were 0."""
    tiny = make_tiny(window=12, step=4, followers=FollowersConfig(dropout=0.9999999, keep=50))

    def loss():
        return compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), make_batch(), CONFIG).retrieve

    with_all = loss()
    tiny.model.train()
    tiny.model.backbone.eval()
    dropped = loss()
    tiny.model.eval()
    with torch.no_grad():
        tiny.model.followers.weights.zero_()
    without = loss()
    torch.testing.assert_close(dropped, without)
    assert not torch.allclose(with_all, without, atol=1e-3)
