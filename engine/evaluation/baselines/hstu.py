"""A small HSTU (Zhai et al., arXiv 2402.17152) over item ids, without times.

Attention without a softmax: SiLU of each product plus a bias by how far apart the two stand, divided by the window.
What it gathers is normed and gated, element by element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.sequence import SequenceConfig, SequenceModel


@dataclass(frozen=True)
class HSTUConfig(SequenceConfig):
    num_heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads(self.num_heads)


class HSTULayer(nn.Module):
    """U, V, Q and K out of one projection; the attention's sum, normed, times U; then the residual."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.window
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.uvqk = nn.Linear(config.dim, 4 * config.dim)
        self.attention_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.out = nn.Linear(config.dim, config.dim)
        self.relative = nn.Parameter(torch.empty(config.num_heads, config.window))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.relative, std=0.02)

    def attend(self, value: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Each [batch, heads, length, dim / heads]."""
        slots = torch.arange(query.shape[2], device=query.device)
        apart = slots[:, None] - slots
        products = query @ key.transpose(-1, -2) + self.relative[:, apart.clamp(min=0)]
        return (F.silu(products) / self.window).masked_fill(apart < 0, 0.0) @ value

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, dim = hidden.shape
        gate, *vqk = F.silu(self.uvqk(self.norm(hidden))).chunk(4, dim=-1)
        value, query, key = (x.view(batch, length, self.num_heads, -1).transpose(1, 2) for x in vqk)
        gathered = self.attend(value, query, key).transpose(1, 2).reshape(batch, length, dim)
        return hidden + self.out(self.dropout(self.attention_norm(gathered) * gate))  # type: ignore[no-any-return]


class HSTU(SequenceModel):
    def __init__(self, num_items: int, config: HSTUConfig) -> None:
        super().__init__(num_items, config)
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.dropout(self.items(rows))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)  # type: ignore[no-any-return]
