"""MRC, Multimodal Representation Compression: an item's modalities become one token (Speeder, arXiv 2511.05885).

x_m = LayerNorm_m(e_m)            m in {text, image, collaborative}
E_m = W2_m GELU(W1_m x_m)         one expert per modality
a   = W_g [x_1 ; ... ; x_M] + b   -inf where a modality is missing; + log(share) for one that is being brought in
g   = softmax(a / T)              all missing: a learned fallback token
z   = s * LayerNorm(sum_m g_m E_m)
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import CompressorConfig


class ModalityExpert(nn.Module):
    """R^width -> R^hidden_size; its input is normed, so that encoders of any scale fit."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)

    def forward(self, normed: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(normed)))
        return out


class Compressor(nn.Module):
    """Mixture of modality experts. Knows no catalogue: features in, tokens out."""

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(config.modalities)
        widths = config.modalities
        self.experts = nn.ModuleDict({name: ModalityExpert(widths[name], config.hidden_size) for name in widths})
        self.gate = nn.Linear(sum(widths.values()), len(widths))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.fallback = nn.Parameter(torch.randn(config.hidden_size))
        nn.init.zeros_(self.gate.weight)

    def forward(self, features: Mapping[str, Tensor], present: Tensor, share: Tensor | None = None) -> Tensor:
        """Item tokens [I, d].

        features: modality -> [I, width], anything where absent. present: bool [I, M] in the order of `modalities`.
        share: [M] in 0..1, how far a modality has been brought in; None is 1 for all.
        """
        token, _ = self.mix(features, present, share)
        return token

    def mix(
        self, features: Mapping[str, Tensor], present: Tensor, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Item tokens [I, d] and their gates [I, M] (zero where all modalities are missing)."""
        normed = self._normed(features, present)
        logits = self.gate(torch.cat(normed, dim=-1)) / self.config.temperature
        open_ = present
        if share is not None:
            open_ = present & (share > 0)
            logits = logits + torch.log(share.clamp_min(1e-9))
        some = open_.any(dim=-1, keepdim=True)
        # a row without any modality would be a softmax over nothing but -inf: NaN, also in its gradient
        gates = torch.softmax(logits.masked_fill(~open_ & some, float("-inf")), dim=-1) * some
        outputs = torch.stack([self.experts[name](x) for name, x in zip(self.modalities, normed, strict=True)], dim=1)
        mixed = torch.where(some, (gates.unsqueeze(-1) * outputs).sum(dim=1), self.fallback)
        return self.config.scale * self.norm(mixed), gates

    def _normed(self, features: Mapping[str, Tensor], present: Tensor) -> list[Tensor]:
        normed = []
        for index, name in enumerate(self.modalities):
            expert = self.experts[name]
            assert isinstance(expert, ModalityExpert)
            normed.append(expert.norm(features[name]) * present[:, index : index + 1])
        return normed
