"""SASRec, the collaborative tower: a small causal transformer over item ids (Kang and McAuley, arXiv 1808.09781).

Knows nothing about training. Rows are padded on the right, so the causal mask alone keeps padding out of every real
position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.errors import ConfigError


@dataclass(frozen=True)
class SASRecConfig:
    """`window` is the longest history read; `tokens_per_batch` counts padded positions; rates are AdamW's."""

    dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    window: int = 50
    dropout: float = 0.3
    epochs: int = 8
    tokens_per_batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "window", "epochs", "tokens_per_batch", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"SASRecConfig.{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ConfigError(f"SASRecConfig.dim {self.dim} must be a multiple of num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"SASRecConfig.dropout must lie in [0, 1), not {self.dropout}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"SASRecConfig: learning_rate must be positive and weight_decay not negative, "
                f"not {self.learning_rate} and {self.weight_decay}"
            )


class Layer(nn.Module):
    """Pre-norm causal attention and a feed-forward of width 4 x dim."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def attend(self, hidden: Tensor) -> Tensor:
        batch, length, dim = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, dim / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, dim))  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attend(self.attention_norm(hidden)))
        return hidden + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(hidden)))))  # type: ignore[no-any-return]


class SASRec(nn.Module):
    """Item embeddings are the input and, transposed, the output; a bias per item learns popularity."""

    def __init__(self, num_items: int, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.items = nn.Embedding(num_items, config.dim)
        self.positions = nn.Embedding(config.window, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """Item rows int64 [batch, length <= window], oldest first and padded right with any row -> [.., dim]."""
        slots = torch.arange(rows.shape[1], device=rows.device)
        hidden = self.dropout(self.items(rows) + self.positions(slots))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, dim] -> scores of all items [n, num_items]."""
        return F.linear(hidden, self.items.weight, self.bias)
