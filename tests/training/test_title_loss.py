"""The title head's rows in the one forward pass against full prompts of plain transformers, and what is drawn."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import make_titled, reference_title_scores

from speeder_engine.config import HeadsConfig
from speeder_engine.data.splits import Histories
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of
from speeder_engine.title_text import TitleText
from speeder_engine.training import title_loss
from speeder_engine.training.batches import PAD, TrainingBatches
from speeder_engine.training.config import BackboneConfig, TrainingConfig
from speeder_engine.training.losses import compute_losses
from speeder_engine.training.title_targets import TitleTargets

CONFIG = TrainingConfig(
    window=12,
    window_step=4,
    batch_size=8,
    token_dropout=0.0,
    heads=HeadsConfig(title=True),
    title_weight=0.5,
    title_targets=2,
)
LENGTHS = [3, 9, 2, 30, 5]


@pytest.fixture(scope="module")
def titled():
    return make_titled()


def make_batches(tiny, config=CONFIG, lengths=LENGTHS):
    rows = np.random.default_rng(1).integers(0, 120, sum(lengths)).astype(np.int32)
    rows[:3] = [14, 3, 14]  # an untitled item, which is no answer
    targets = TitleTargets(tiny.titles, TitleText(tiny.tokenizer, 512), config.title_targets)
    return TrainingBatches(Histories(offsets_of(np.array(lengths)), rows), 120, config, titles=targets)


def losses_of(tiny, batch, config=CONFIG):
    with torch.no_grad():
        return compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, config)


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_the_prompts_that_serving_scores(tied):
    tiny = make_titled(tied=tied)
    for batch in make_batches(tiny).epoch(0):
        total, count = 0.0, 0
        for i, cuts in enumerate(batch.title_cuts.tolist()):
            for k, cut in enumerate(cuts):
                if cut < 0:
                    continue
                history, target = batch.rows[i, :cut].numpy(), int(batch.targets[i, cut])
                total += float(reference_title_scores(tiny, history, [target])[0])
                ids = [token for token in batch.titles[i, k].tolist() if token != PAD]
                assert ids == tiny.tokenizer.encode(" ".join(tiny.titles[target].split()) + "\n").ids
                count += len(ids)
        found = losses_of(tiny, batch)
        assert count > 20
        assert float(found.title) == pytest.approx(-total / count, rel=1e-5)
        expected = found.retrieve + 0.3 * found.rank + 0.1 * found.order + 0.5 * found.title
        torch.testing.assert_close(found.total, expected)


def learned(tiny, batch):
    """The title loss, its gradients, and the shapes of what was kept for the backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute_losses(tiny.model, tiny.tokens, ConstantPrior(tiny.prior), batch, CONFIG).title
    weights = [weight for weight in tiny.model.parameters() if weight.requires_grad]
    return loss.item(), torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True), kept


@pytest.mark.parametrize("rows_at_once", [1, 5])
def test_a_large_vocabulary_is_scored_in_parts(titled, monkeypatch, rows_at_once):
    batch = next(make_batches(titled).epoch(0))
    logits = int((batch.titles != PAD).sum()), titled.model.vocabulary().embedding.shape[0]
    loss, gradients, kept = learned(titled, batch)
    assert logits in kept and logits[0] > 20
    monkeypatch.setattr(title_loss, "MOST_LOGITS", rows_at_once * logits[1])
    loss_of_parts, of_parts, kept = learned(titled, batch)
    assert not any(shape[1:] == logits[1:] for shape in kept)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(of_parts, gradients, atol=1e-6, rtol=1e-4)
    assert sum(int(gradient.any()) for gradient in gradients) > 5


def test_titles_leave_the_other_losses_as_they_are(titled):
    batch = next(make_batches(titled).epoch(0))
    untitled = replace(CONFIG, heads=HeadsConfig(), title_weight=0.0)
    with_titles, without = losses_of(titled, batch), losses_of(titled, batch, untitled)
    for name in ("retrieve", "rank", "order"):
        torch.testing.assert_close(getattr(with_titles, name), getattr(without, name), atol=1e-5, rtol=1e-5)
    assert float(without.title) == 0 and without.num_targets == with_titles.num_targets


def test_a_title_does_not_see_what_comes_after_its_cut(titled):
    batch = next(make_batches(titled, replace(CONFIG, title_targets=1)).epoch(0))
    before = losses_of(titled, batch)
    after = torch.arange(batch.rows.shape[1]) >= batch.title_cuts
    changed = replace(batch, rows=torch.where(after, (batch.rows + 7) % 120, batch.rows))
    assert float(losses_of(titled, changed).title) == pytest.approx(float(before.title), rel=1e-6)
    seen = replace(batch, rows=torch.where(after, batch.rows, (batch.rows + 7) % 120))
    assert float(losses_of(titled, seen).title) != pytest.approx(float(before.title), rel=1e-4)


def test_titles_alone(titled):
    heads = HeadsConfig(retrieve=False, rank=False, title=True)
    alone = replace(CONFIG, heads=heads, retrieve_weight=0.0, rank_weight=0.0, order_weight=0.0)
    batch = next(make_batches(titled, alone).epoch(0))
    found = losses_of(titled, batch, alone)
    assert float(found.retrieve) == float(found.rank) == float(found.order) == 0
    assert found.leading is found.title and found.num_targets == int((batch.titles != PAD).sum())
    torch.testing.assert_close(found.total, 0.5 * found.title)
    torch.testing.assert_close(found.title, losses_of(titled, batch).title, atol=1e-5, rtol=1e-5)
    assert alone.metric == "title_probability" and CONFIG.metric == "ndcg@10"


def test_every_titled_target_is_asked_for_in_its_turn(titled):
    batches = make_batches(titled)
    asked = Counter()
    for number in range(40):
        for batch in batches.epoch(number):
            cuts = batch.title_cuts
            chosen = batch.targets.gather(1, cuts.clamp(min=0))
            assert (chosen[cuts >= 0] != PAD).all() and (chosen[cuts >= 0] != 14).all()
            assert ((batch.titles[..., 0] == PAD) == (cuts < 0)).all()
            assert all(len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in cuts))
            asked.update(chosen[cuts >= 0].tolist())
    assert set(asked) == set(batches.histories.rows.tolist()) - {14}


def test_other_draws_are_untouched_by_titles(titled):
    plain = replace(CONFIG, heads=HeadsConfig(), title_weight=0.0)
    with_titles = make_batches(titled)
    without = TrainingBatches(with_titles.histories, 120, plain)
    first, second = next(with_titles.epoch(3)), next(without.epoch(3))
    for name in ("rows", "targets", "cuts", "candidates", "pairs"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert second.titles.numel() == second.title_cuts.numel() == 0


def test_contradictions_are_refused(titled):
    with pytest.raises(ConfigError, match=r"heads\.title and title_weight: give the head a weight"):
        TrainingConfig(title_weight=0.1)
    with pytest.raises(ConfigError, match=r"heads\.title and title_weight"):
        TrainingConfig(heads=HeadsConfig(title=True))
    with pytest.raises(ConfigError, match=r"question: heads\.title needs one"):
        replace(CONFIG, question="")
    with pytest.raises(ConfigError, match=r"heads\.retrieve and retrieve_weight: give the head a weight"):
        TrainingConfig(retrieve_weight=0.0)
    with pytest.raises(ConfigError, match="judge: 'title_probability'; choose 'ndcg@10'"):
        TrainingConfig(judge="title_probability")
    titles = replace(CONFIG, heads=HeadsConfig(retrieve=False, title=True), retrieve_weight=0.0)
    with pytest.raises(ConfigError, match=r"judge: 'ndcg@10'; choose 'ndcg@10' with heads\.retrieve or"):
        replace(titles, judge="ndcg@10")
    with pytest.raises(ConfigError, match="both are 0"):
        TrainingConfig(heads=HeadsConfig(retrieve=False), retrieve_weight=0.0)
    with pytest.raises(ConfigError, match="only a decoder from scratch is warmed up"):
        BackboneConfig(source="x", warmup_epochs=1)
    with pytest.raises(DataError, match="none has a title"):
        TitleTargets(["", " "], TitleText(titled.tokenizer, 512))
