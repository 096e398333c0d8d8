"""Linear layers of 8-bit weights beside torch's own of the same, rounded weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from speeder_engine.models import linear
from speeder_engine.models.linear import W8Linear, gated_linear, linear_part, quantize_linears

CPU = torch.device("cpu")
KINDS = ["int8", "fp8"]
by_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, bias=True, quantize=False):
    """A layer, and torch's with what its weights became."""
    torch.manual_seed(0)
    wide = nn.Linear(48, 40, bias)
    layer = W8Linear.of(wide, kind, CPU)
    layer.quantize = quantize
    with torch.no_grad():
        wide.weight.copy_(layer.values.float() * layer.scales[:, None])
    return layer, wide


@by_kind
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_as_torch_with_the_same_weights(kind, bias):
    layer, wide = make(kind, bias)
    x = torch.randn(16, 48)
    torch.testing.assert_close(layer(x), wide(x))
    for part in (slice(None, 24), slice(24, None)):
        torch.testing.assert_close(linear_part(layer, x, part), wide(x)[:, part])
        assert torch.equal(
            linear_part(wide, x, part), F.linear(x, wide.weight[part], wide.bias[part] if bias else None)
        )
    gate, up = wide(x).chunk(2, dim=1)
    torch.testing.assert_close(gated_linear(layer, x), F.silu(gate) * up)
    torch.testing.assert_close(gated_linear(wide, x), F.silu(gate) * up)


@by_kind
def test_rows_may_be_rounded_too(kind):
    layer, wide = make(kind, quantize=True)
    x = torch.randn(16, 48)
    scale = x.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)
    small = (x / scale).round() if kind == "int8" else (x / scale).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(layer(x), wide(small * scale))
    torch.testing.assert_close(linear_part(layer, x, slice(3, 30)), wide(small * scale)[:, 3:30])
    assert (layer(x) - wide(x)).abs().max() > 1e-3
    assert not W8Linear.of(wide, kind, CPU, with_rows=True).quantize  # no CPU multiplies fp8


@by_kind
def test_fp8_rows_are_rounded_where_it_is_asked_for_and_the_device_can(kind, monkeypatch):
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: True)
    model = nn.Sequential(nn.Linear(4, 4))
    assert not W8Linear.of(model[0], kind, CPU).quantize
    quantize_linears(model, kind, CPU, with_rows=True)
    assert model[0].quantize == (kind == "fp8")


@by_kind
def test_another_type_is_for_the_bias_alone(kind):
    layer, _ = make(kind)
    kept = copy.deepcopy(layer)
    layer = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32
    assert layer.values.dtype == kept.values.dtype
    assert torch.equal(layer.values.view(torch.uint8), kept.values.view(torch.uint8))
    assert torch.equal(layer.scales, kept.scales)
    assert layer.to("meta").values.is_meta
    assert layer.scales.is_meta


def test_every_linear_layer_below_is_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Linear(4, 8)), nn.LayerNorm(4)]))
    quantize_linears(model, "int8", CPU)
    assert [type(module) for module in model.modules() if not list(module.children())] == [
        W8Linear,
        W8Linear,
        nn.LayerNorm,
    ]
