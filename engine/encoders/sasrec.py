"""SASRec, the collaborative tower: a small causal transformer over item ids (Kang and McAuley, arXiv 1808.09781)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.sequence import SequenceConfig, SequenceModel


@dataclass(frozen=True)
class SASRecConfig(SequenceConfig):
    num_heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads(self.num_heads)


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


class SASRec(SequenceModel):
    def __init__(self, num_items: int, config: SASRecConfig) -> None:
        super().__init__(num_items, config)
        self.positions = nn.Embedding(config.window, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, rows: Tensor, added: Tensor | None = None) -> Tensor:
        """`added` [batch, length, dim] goes into the inputs, beside items and positions."""
        slots = torch.arange(rows.shape[1], device=rows.device)
        inputs = self.items(rows) + self.positions(slots)
        hidden = self.dropout(inputs if added is None else inputs + added)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]
