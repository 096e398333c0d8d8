"""A run that stops being finite names stage, step and tensor, and leaves the last good checkpoint."""

import json

import pytest
import torch
from tiny_training import one_stage

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.errors import SpeederError
from speeder_engine.training import gradient as gradient_module
from speeder_engine.training.fit import train

CONFIG = one_stage(epochs=3)
STEPS_AN_EPOCH = 8


def poison_at(monkeypatch, step, poison):
    """Calls `poison(model, losses)` at the losses of a step."""
    real, seen = gradient_module.compute_losses, []

    def poisoned(model, *given):
        if len(seen) == step:
            poison(model, None)
        losses = real(model, *given)
        if len(seen) == step:
            poison(model, losses)
        seen.append(step)
        return losses

    monkeypatch.setattr(gradient_module, "compute_losses", poisoned)


def nan_parameter(model, losses):
    model.backbone.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def nan_gradient(model, losses):
    if losses is not None:
        model.retrieve.project.weight.register_hook(lambda gradient: gradient * torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (nan_parameter, "model.backbone.layers.1.mlp.up_proj.weight is not finite; lower"),
        (nan_gradient, "the gradient of model.retrieve.project.weight is not finite; lower"),
    ],
)
def test_the_tensor_is_named_and_the_last_good_checkpoint_stays(split, tmp_path, monkeypatch, poison, named):
    poison_at(monkeypatch, STEPS_AN_EPOCH + 2, poison)
    with pytest.raises(SpeederError, match=f"^stage S1, step {STEPS_AN_EPOCH + 2}: {named}"):
        train(split, CONFIG, tmp_path / "c")
    left = Checkpoint.load(tmp_path / "c")
    assert left.state.epoch == 1 and left.state.step == STEPS_AN_EPOCH
    assert all(bool(torch.isfinite(p).all()) for p in left.model.parameters())
    monkeypatch.undo()
    resumed = train(split, CONFIG, tmp_path / "c", resume=True)
    assert resumed.state is None
    assert [json.loads(line)["epoch"] for line in (tmp_path / "c.log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_step_that_is_finite_is_not_searched(split, tmp_path, monkeypatch):
    for name in ("parameter_not_finite", "gradient_not_finite"):
        monkeypatch.delattr(f"speeder_engine.training.weights.Weights.{name}")
    assert train(split, one_stage(epochs=1), tmp_path / "c").metrics["epoch"] == 1
