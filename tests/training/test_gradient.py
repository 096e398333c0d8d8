"""Accumulated batches are one batch; layers computed twice and bf16 give the gradients they should."""

from dataclasses import fields, replace

import pytest
import torch
from tiny_training import CONFIG, one_stage, without_dropout

from speeder_engine.errors import ConfigError
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.training.backbone import checkpoint_layers
from speeder_engine.training.batches import TrainingBatch, TrainingBatches
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.features import make_features
from speeder_engine.training.fit import new_checkpoint, train
from speeder_engine.training.gradient import GradientMaker
from speeder_engine.training.language import make_language
from speeder_engine.training.token_table import TokenTable

CPU = torch.device("cpu")
STILL = without_dropout(CONFIG)


def made(split, config, tmp_path, **settings):
    """Gradients by name and losses of one step over `batches`."""
    torch.manual_seed(0)
    checkpoint = new_checkpoint(split, config, make_language(split, config), make_features(split, config, tmp_path))
    table = TokenTable(checkpoint.model.compressor, checkpoint.features, config.modality_dropout)
    model = checkpoint.model.train()
    if settings.get("checkpoint_layers"):
        checkpoint_layers(model.backbone)
    prior = ConstantPrior(torch.from_numpy(checkpoint.table.prior))
    return model, GradientMaker(model, table, prior, replace(config, **settings), CPU)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(batch, rows):
    return TrainingBatch(*(getattr(batch, field.name)[rows] for field in fields(batch)))


def test_two_batches_of_eight_are_one_of_sixteen(split, tmp_path):
    (batch, *_) = (b for b in TrainingBatches(split.train, 24, STILL).epoch(0) if len(b) == 16)
    # unequal numbers of targets: means of means would be another loss
    order = batch.lengths.argsort()
    halves = [rows_of(batch, order[:8]), rows_of(batch, order[8:])]
    assert halves[0].lengths.sum() != halves[1].lengths.sum()
    model, whole = made(split, STILL, tmp_path)
    one = whole.backward([batch], torch.ones(2))
    expected = gradients(model)
    model, parts = made(split, STILL, tmp_path)
    two = parts.backward(halves, torch.ones(2))
    assert two.num_targets == one.num_targets
    for name in ("retrieve", "rank", "order", "total"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name).detach(), atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def test_accumulation_makes_fewer_steps(split, tmp_path):
    config = one_stage(epochs=2, accumulate=3)
    checkpoint = train(split, config, tmp_path / "c")
    assert checkpoint.metrics["step"] == 2 * -(-TrainingBatches(split.train, 24, config).batches_per_epoch // 3)
    assert checkpoint.metrics["loss"] < 3.2


def test_layers_that_are_computed_again_give_the_same_gradients(split, tmp_path):
    batch = next(TrainingBatches(split.train, 24, CONFIG).epoch(0))
    calls = []
    found = []
    for again in (False, True):
        model, gradient = made(split, CONFIG, tmp_path, checkpoint_layers=again)
        model.backbone.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, again=again: calls.append(again))
        torch.manual_seed(1)
        gradient.backward([batch], torch.ones(2))
        found.append(gradients(model))
    assert calls == [False, True, True]  # with dropout: the second pass must draw what the first has drawn
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-5)
    assert train(split, one_stage(epochs=1, checkpoint_layers=True), tmp_path / "c").metrics["epoch"] == 1


def test_bfloat16_is_near_and_not_the_same(split, tmp_path):
    batch = next(TrainingBatches(split.train, 24, STILL).epoch(0))
    losses, found = [], []
    for precision in ("float32", "bfloat16"):
        model, gradient = made(split, STILL, tmp_path, precision=precision)
        losses.append(gradient.backward([batch], torch.ones(2)).total.detach())
        found.append(gradients(model))
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=0.02, atol=0.02)
    flat = [torch.cat([value.flatten() for value in each.values()]) for each in found]
    assert flat[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.99


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_takes_bfloat16_where_the_hardware_has_it(split, tmp_path, monkeypatch, hardware):
    monkeypatch.setattr("speeder_engine.training.precision.has_native_bf16", lambda device: hardware)
    batch = next(TrainingBatches(split.train, 24, STILL).epoch(0))
    by = {}
    for precision in ("float32", "bfloat16", "auto"):
        _, gradient = made(split, STILL, tmp_path, precision=precision)
        by[precision] = float(gradient.backward([batch], torch.ones(2)).total.detach())
    assert by["auto"] == by["bfloat16" if hardware else "float32"] != by["float32" if hardware else "bfloat16"]


def test_a_precision_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="precision: 'half'; choose one of float32, bfloat16, auto"):
        TrainingConfig(precision="half")
    with pytest.raises(ConfigError, match="accumulate must be positive, is 0"):
        TrainingConfig(accumulate=0)
