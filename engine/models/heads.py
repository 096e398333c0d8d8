"""The heads that turn final hidden states into scores. They know no catalogue: item tokens come as arguments.

retrieve:  score_i = (W h(last)) . z_i / (s sqrt(d)) + beta * prior_i
rank:      score_c = w . h_c + b + alpha * retrieve's product of h(last) and z_c + beta * prior_c
"""

import math

import torch
from torch import Tensor, nn

from speeder_engine.config import HeadsConfig


class RetrieveHead(nn.Module):
    """Maps h(last) to a user vector whose dot product with an item token is its score, prior aside."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        # item tokens have elements of size `scale`: dividing by it keeps logits of order one at the start
        self.factor = 1.0 / (scale * math.sqrt(hidden_size))
        self.project = nn.Linear(hidden_size, hidden_size, bias=False)
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """h(last) [..., d] -> user vectors [..., d]."""
        vector: Tensor = self.project(hidden) * self.factor
        return vector


class RankHead(nn.Module):
    """Scores isolated candidate rows by their own final hidden states."""

    def __init__(self, hidden_size: int, scale: float, config: HeadsConfig) -> None:
        super().__init__()
        self.role = nn.Parameter(torch.randn(hidden_size) * (0.1 * scale))
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.alpha = nn.Parameter(torch.full((), float(config.rank_residual)), requires_grad=config.rank_residual)
        self.beta = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, retrieved: Tensor) -> Tensor:
        """hidden [..., d] of the candidates, retrieved [...]: their retrieve scores without the prior -> [...]."""
        # a sum over d, not a matmul: a candidate's arithmetic must not depend on how many stand beside it; in fp32, as
        # the catalogue is searched, or rounding would make equals of candidates
        own = (hidden.float() * self.weight.float()).sum(dim=-1)
        return own + self.bias.float() + self.alpha.float() * retrieved.float()
