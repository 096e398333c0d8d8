"""SPAE, Sequential Position Awareness Enhancement: where in the history an item stands (Speeder, arXiv 2511.05885).

Absolute: a position prompt per slot, added to the item's token, and so for the calendar bucket of its time.
Relative: `OrderHead`, a proxy task of training: two items of a history in random order, which came first?
"""

import torch
from torch import Tensor, nn


class PositionPrompts(nn.Module):
    """P in R^{num_slots x d}, initialised near zero beside tokens whose elements have the root mean square `scale`."""

    def __init__(self, num_slots: int, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_slots, hidden_size) * (0.1 * scale))

    def forward(self, slots: Tensor) -> Tensor:
        return self.weight[slots]


class OrderHead(nn.Module):
    """Reads the final hidden state of the second of two shown items; its logit says that the first came first."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.roles = nn.Parameter(torch.randn(2, hidden_size) * (0.1 * scale))
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, d] -> logits [B]."""
        logits: Tensor = self.score(hidden).squeeze(-1)
        return logits
