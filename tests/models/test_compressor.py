"""MRC against its formula, written out in numpy."""

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

from speeder_engine.config import CompressorConfig
from speeder_engine.errors import ConfigError
from speeder_engine.models.compressor import Compressor

WIDTHS = {"text": 7, "image": 5, "collaborative": 3}


@pytest.fixture
def compressor():
    torch.manual_seed(0)
    made = Compressor(CompressorConfig(WIDTHS, 16, temperature=0.7, scale=0.03)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.fixture
def features():
    rng = np.random.default_rng(1)
    return {name: torch.from_numpy(rng.normal(size=(8, width))) for name, width in WIDTHS.items()}


def layer_norm(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def by_formula(compressor, features, present, share):
    p = {name: value.detach().numpy() for name, value in compressor.named_parameters()}
    tokens = []
    for i in range(len(present)):
        normed, outputs = [], []
        for m, name in enumerate(WIDTHS):
            x = layer_norm(features[name][i].numpy(), p[f"experts.{name}.norm.weight"], p[f"experts.{name}.norm.bias"])
            normed.append(x if present[i, m] else np.zeros_like(x))
            up = p[f"experts.{name}.up.weight"] @ x + p[f"experts.{name}.up.bias"]
            gelu = up * 0.5 * (1 + erf(up / np.sqrt(2)))
            outputs.append(p[f"experts.{name}.down.weight"] @ gelu + p[f"experts.{name}.down.bias"])
        logits = (p["gate.weight"] @ np.concatenate(normed) + p["gate.bias"]) / 0.7
        open_ = [m for m in range(3) if present[i, m] and share[m] > 0]
        mixed = p["fallback"]
        if open_:
            gates = softmax([logits[m] + np.log(share[m]) for m in open_])
            mixed = sum(g * outputs[m] for g, m in zip(gates, open_, strict=True))
        tokens.append(0.03 * layer_norm(mixed, p["norm.weight"], p["norm.bias"]))
    return np.array(tokens)


PRESENT = np.array([[int(bit) for bit in f"{i:03b}"] for i in range(8)], dtype=bool)  # every combination


@pytest.mark.parametrize("share", [(1.0, 1.0, 1.0), (1.0, 0.3, 1.0), (1.0, 0.0, 0.0)])
def test_tokens_follow_the_formula(compressor, features, share):
    found = compressor(features, torch.from_numpy(PRESENT), torch.tensor(share, dtype=torch.float64))
    np.testing.assert_allclose(found.detach().numpy(), by_formula(compressor, features, PRESENT, share), atol=1e-12)


def test_a_missing_modality_is_not_read(compressor, features):
    present = torch.from_numpy(PRESENT)
    before = compressor(features, present)
    for m, name in enumerate(WIDTHS):
        features[name][~present[:, m]] = 1e3 * torch.randn_like(features[name][~present[:, m]])
    torch.testing.assert_close(compressor(features, present), before, atol=0, rtol=0)


def test_a_share_of_nought_is_as_if_missing_for_the_gate(compressor, features):
    _, gates = compressor.mix(features, torch.ones(8, 3, dtype=torch.bool), torch.tensor([1.0, 0.0, 1.0]))
    assert (gates[:, 1] == 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(8, dtype=torch.float64))


def test_tokens_have_the_embeddings_scale():
    made = Compressor(CompressorConfig(WIDTHS, 64, scale=0.02))
    features = {name: torch.randn(50, width) for name, width in WIDTHS.items()}
    tokens = made(features, torch.ones(50, 3, dtype=torch.bool))
    assert tokens.square().mean(1).sqrt().detach().numpy() == pytest.approx(0.02, rel=1e-2)


def test_gradients_are_finite_when_everything_is_missing(compressor, features):
    compressor(features, torch.zeros(8, 3, dtype=torch.bool)).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in compressor.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": {}}, "at least one modality"),
        ({"modalities": {"smell": 3}}, r"unknown modalities \['smell'\]"),
        ({"modalities": {"text": 0}}, "widths must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CompressorConfig(**{"modalities": WIDTHS, "hidden_size": 8, **arguments})
