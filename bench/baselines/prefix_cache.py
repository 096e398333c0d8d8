"""A cache for transformers models whose beginning stays while every request overwrites what is behind it."""

import inspect
from typing import Any

import torch
from torch import Tensor

from speeder_engine.config import DecoderConfig


class PrefixCache:
    """Static buffers [1, H_kv, capacity, D] of every layer, written at `slots`: transformers' StaticCache without its
    counter, so that a request leaves nothing to take back. What of it a row sees is the 4-D mask's affair."""

    def __init__(self, shape: DecoderConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = (shape.num_layers, 2, 1, shape.num_kv_heads, capacity, shape.head_dim)
        self.capacity = capacity
        self.stored = torch.zeros(sizes, dtype=dtype, device=device)
        self.keys, self.values = ([layer[part] for layer in self.stored] for part in (0, 1))
        self.slots = torch.zeros(0, dtype=torch.int64, device=device)  # [N] of the rows that come next

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: keys and values [1, H_kv, N, D] of the rows at `slots` -> all of them."""
        kept = self.keys[layer_idx], self.values[layer_idx]
        for buffer, new in zip(kept, (keys, values), strict=True):
            buffer.index_copy_(2, self.slots, new)
        return kept

    def get_seq_length(self, *_: Any) -> int:
        """Positions are always given: nothing counts."""
        return 0


def cache_argument(body: Any) -> str:
    """What a transformers body's forward calls its cache: the name has changed in 5.2x."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
