"""Modules without values: of the same shapes and types as on torch's meta device, and torch's compiler stays away."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from reference import make_tiny, make_titled
from torch import nn

from speeder_engine.config import CalendarConfig, LivePriorConfig
from speeder_engine.models.recommender import ServingModel
from speeder_engine.models.shapes import ShapesOnly


def described(model):
    return {name: (value.shape, value.dtype, value.device.type) for name, value in model.state_dict().items()}


def configs():
    titled = make_titled(calendar=CalendarConfig(0, 1000, 5)).parts().config
    yield titled
    yield replace(titled, live_prior=LivePriorConfig((1.0, 7.0), (0.5, 0.5)))
    for mixing in ("mean", "concat"):
        yield replace(titled, compressor=replace(titled.compressor, mixing=mixing))


@pytest.mark.parametrize("config", configs())
def test_shapes_and_types_are_those_of_the_meta_device(config):
    with torch.device("meta"):
        expected = described(ServingModel(config))
    with ShapesOnly():
        assert described(ServingModel(config)) == expected


def test_modules_of_torch_are_made_so_too():
    with ShapesOnly():
        made = nn.ModuleList([nn.Linear(3, 4), nn.Embedding(3, 4), nn.LayerNorm(5)])
    assert all(weight.is_meta for weight in made.parameters())
    assert nn.Linear(3, 4).weight.std() > 0  # and as ever behind it


def test_loading_an_engine_imports_no_compiler(tmp_path):
    make_tiny().parts().save(tmp_path / "engine")
    code = (
        "import sys\nfrom speeder_engine import Engine\n"
        f"Engine.load({str(tmp_path / 'engine')!r}, kv_budget='1MiB').recommend(['0001'])\n"
        "sys.exit(', '.join({'torch._dynamo', 'torch._inductor', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip() == ""
