"""What small models over item ids share: settings, item embeddings that are input and output, scoring.

Knows nothing about training. Rows are padded on the right, so that a causal model never reads padding from a real
position.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.windows import Ints, by_length, pad_right
from speeder_engine.errors import ConfigError

SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class SequenceConfig:
    """`window` is the longest history read; `tokens_per_batch` counts padded positions; rates are AdamW's."""

    dim: int = 64
    num_layers: int = 2
    window: int = 50
    dropout: float = 0.3
    epochs: int = 8
    tokens_per_batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "seed" and getattr(self, field.name) < 1:
                raise ConfigError(f"{name}.{field.name} must be at least 1, not {getattr(self, field.name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}.dropout must lie in [0, 1), not {self.dropout}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"{name}: learning_rate must be positive and weight_decay not negative, "
                f"not {self.learning_rate} and {self.weight_decay}"
            )

    def check_heads(self, num_heads: int) -> None:
        if self.dim % num_heads:
            raise ConfigError(f"{type(self).__name__}.dim {self.dim} must be a multiple of num_heads {num_heads}")


class SequenceModel(nn.Module, ABC):
    """Item embeddings are the input and, transposed, the output; a bias per item learns popularity."""

    def __init__(self, num_items: int, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.items = nn.Embedding(num_items, config.dim)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(config.dropout)

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """Item rows int64 [batch, length <= window], oldest first and padded right with any row -> [.., dim]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, dim] -> scores of all items [n, num_items]."""
        return F.linear(hidden, self.items.weight, self.bias)

    @torch.inference_mode()
    def scores(self, histories: Sequence[Ints]) -> Tensor:
        """Rows oldest first, any length -> float32 [n, num_items]; an empty history scores by popularity alone."""
        self.eval()
        recent = [np.asarray(history, dtype=np.int64)[-self.config.window :] for history in histories]
        scores = self.bias.detach().repeat(len(recent), 1)
        told = [user for user, history in enumerate(recent) if len(history)]
        for places in by_length([len(recent[user]) for user in told], SCORED_AT_ONCE):
            users = [told[place] for place in places]
            padded, lengths = pad_right([recent[user] for user in users])
            hidden = self(padded)[torch.arange(len(users)), lengths - 1]
            scores[users] = self.logits(hidden)
        return scores
