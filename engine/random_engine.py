"""Engines with random weights, in any shape: for benchmarks and tests of what does not depend on what a model knows."""

from typing import TypeVar

import numpy as np
import torch
from torch import nn

from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.config import CompressorConfig, DecoderConfig, HeadsConfig, ModelConfig, PromptConfig
from speeder_engine.errors import ConfigError
from speeder_engine.models.compressor import Compressor
from speeder_engine.models.recommender import ServingModel
from speeder_engine.models.shapes import ShapesOnly
from speeder_engine.parts import EngineParts

# the bodies of well-known models; `tiny` is what the demo trains
SHAPES = {
    "tiny": DecoderConfig(2048, 96, 2, 2, 2, 48, 256),
    "0.5b": DecoderConfig(151_936, 896, 24, 14, 2, 64, 4864, qkv_bias=True),
    "1.5b": DecoderConfig(151_936, 1536, 28, 12, 2, 128, 8960, qkv_bias=True),
    "7b": DecoderConfig(152_064, 3584, 28, 28, 4, 128, 18_944, qkv_bias=True),
}
FEATURES = {"text": 384, "image": 256, "collaborative": 64}
ROPE_THETA = 1e6
M = TypeVar("M", bound=nn.Module)
SCALE = 0.02
EMBEDDED = ("instruction", "prompts.weight")  # of the size of item tokens


def random_parts(
    shape: str | DecoderConfig = "tiny",
    *,
    num_items: int = 10_000,
    instruction_len: int = 30,
    window: int = 50,
    window_step: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> EngineParts:
    """Parts for `Engine(parts, config)`; the same seed, the same weights. Items are called "0000000", "0000001", ...

    shape: a name of `SHAPES` or a decoder's settings. dtype and device are those the weights are made in: large shapes
    needn't pass through fp32. Raises ConfigError for an unknown name.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is not known; choose one of {', '.join(SHAPES)}")
    decoder = SHAPES[shape] if isinstance(shape, str) else shape
    prompt = PromptConfig("random", tuple(range(1, instruction_len + 1)), window, window_step)
    compressor = CompressorConfig(FEATURES, decoder.hidden_size, scale=SCALE)
    config = ModelConfig(decoder, compressor, prompt, HeadsConfig())
    generator = torch.Generator(device).manual_seed(seed)
    with ShapesOnly():
        model = ServingModel(config)
    frequencies = ROPE_THETA ** -(torch.arange(0, decoder.head_dim, 2, dtype=torch.float32) / decoder.head_dim)
    model.decoder.inv_freq = frequencies  # given as they are: neither cast nor filled
    model = _filled(model.to(dtype).to_empty(device=device), generator)
    tokens = torch.empty(num_items, decoder.hidden_size, dtype=dtype, device=device).normal_(
        0, SCALE, generator=generator
    )
    item_ids = [f"{row:07d}" for row in range(num_items)]
    prior = np.random.default_rng(seed).normal(size=num_items).astype(np.float32)
    table = ItemTable.fresh(item_ids, [f"Item {item_id}" for item_id in item_ids], prior)
    small = _filled(Compressor(compressor), torch.Generator().manual_seed(seed))
    return EngineParts(config, model, Catalogue(table, tokens), dict(small.state_dict()))


def _filled(model: M, generator: torch.Generator) -> M:
    """Matrices so that activations keep their size through the layers; norms near one."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("inv_freq"):
                continue
            fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
            is_norm = "norm" in name and name.endswith("weight")
            spread = 0.1 if is_norm else SCALE if tensor.ndim < 2 or name in EMBEDDED else fan_in**-0.5
            tensor.normal_(1.0 if is_norm else 0.0, spread, generator=generator)
    return model.requires_grad_(False).eval()
