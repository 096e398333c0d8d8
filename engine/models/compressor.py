"""MRC, Multimodal Representation Compression: an item's modalities become one token (Speeder, arXiv 2511.05885).

x_m = LayerNorm_m(e_m)            m in {text, image, collaborative}
E_m = W2_m GELU(W1_m x_m)         one expert per modality
a   = W_g [x_1 ; ... ; x_M] + b   -inf where a modality is missing; + log(share) for one that is being brought in
g   = softmax(a / T)              all missing: a learned fallback token
z   = s * LayerNorm(sum_m g_m E_m)

Two alternatives to compare it with: `mean` has the experts and no router, `concat` one perceptron over all modalities.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import CompressorConfig
from speeder_engine.triton_kernels.modality_experts import Affine, Mixture, modality_experts


class ModalityExpert(nn.Module):
    """The weights of R^width -> R^hidden_size; its input is normed, so that encoders of any scale fit."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)


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
        if config.mixing == "mean":
            # a router that never moves from zero weighs the modalities that are there alike
            nn.init.zeros_(self.gate.bias)
            self.gate.requires_grad_(False)

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
        return modality_experts([features[name] for name in self.modalities], present, self.mixture(), share)

    def mixture(self) -> Mixture:
        """This module's weights, as the operation takes them."""
        experts: list[Any] = [self.experts[name] for name in self.modalities]
        return Mixture(
            norms=[_affine(expert.norm) for expert in experts],
            ups=[_affine(expert.up) for expert in experts],
            downs=[_affine(expert.down) for expert in experts],
            gate=_affine(self.gate),
            norm=_affine(self.norm),
            fallback=self.fallback,
            temperature=self.config.temperature,
            scale=self.config.scale,
            eps=self.norm.eps,
        )


class ConcatCompressor(nn.Module):
    """One perceptron over the normed modalities side by side, zeros where one is missing; the face of `Compressor`."""

    def __init__(self, config: CompressorConfig) -> None:
        super().__init__()
        self.config = config
        self.modalities = tuple(config.modalities)
        widths = config.modalities
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in widths.items()})
        self.up = nn.Linear(sum(widths.values()), config.hidden_size)
        self.down = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.fallback = nn.Parameter(torch.randn(config.hidden_size))

    def forward(self, features: Mapping[str, Tensor], present: Tensor, share: Tensor | None = None) -> Tensor:
        """As `Compressor.forward`; a share scales its modality."""
        weights = present.to(self.fallback.dtype)
        if share is not None:
            weights = weights * share
        normed = [
            self.norms[name](features[name]) * weights[:, index : index + 1]
            for index, name in enumerate(self.modalities)
        ]
        mixed = self.down(F.gelu(self.up(torch.cat(normed, dim=-1))))
        mixed = torch.where((weights > 0).any(dim=-1, keepdim=True), mixed, self.fallback)
        token: Tensor = self.config.scale * self.norm(mixed)
        return token


AnyCompressor = Compressor | ConcatCompressor


def make_compressor(config: CompressorConfig) -> AnyCompressor:
    return ConcatCompressor(config) if config.mixing == "concat" else Compressor(config)


def _affine(layer: nn.LayerNorm | nn.Linear) -> Affine:
    return Affine(layer.weight, layer.bias)
