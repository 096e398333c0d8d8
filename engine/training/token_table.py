"""The item-token table in training: features in, tokens out, with modality dropout and shares; some features learn."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from speeder_engine.encoders.features import Features
from speeder_engine.models.compressor import AnyCompressor


class TokenTable(nn.Module):
    """The compressor over all items. The vectors of `tuned` modalities learn with the model; others are frozen."""

    present: Tensor

    def __init__(
        self,
        compressor: AnyCompressor,
        features: Mapping[str, Features],
        modality_dropout: float,
        tuned: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.modality_dropout = modality_dropout
        names = compressor.modalities
        present = [torch.from_numpy(features[name].present) for name in names]
        self.register_buffer("present", torch.stack(present, dim=1))
        self.tuned = nn.ParameterDict()
        for name in names:
            values = torch.from_numpy(features[name].values)
            if name in tuned:
                self.tuned[name] = nn.Parameter(values.clone())
            else:
                self.register_buffer(f"frozen_{name}", values)

    def values(self, name: str) -> Tensor:
        """[I, width] of a modality."""
        found: Tensor = self.tuned[name] if name in self.tuned else getattr(self, f"frozen_{name}")
        return found

    def forward(self, share: Tensor, items: Tensor | None = None) -> Tensor:
        """Tokens [I, d], or of the given item rows; share [M]. In training some modalities of some items are missing at
        random."""
        present = self.present if items is None else self.present[items]
        if self.training and self.modality_dropout:
            present = present & (torch.rand(present.shape, device=present.device) >= self.modality_dropout)
        names = self.compressor.modalities
        features = {name: self.values(name) if items is None else self.values(name)[items] for name in names}
        tokens: Tensor = self.compressor(features, present, share)
        return tokens

    def learned_features(self) -> dict[str, Features]:
        """What the tuned modalities have become."""
        columns = dict(zip(self.compressor.modalities, self.present.T.cpu().numpy(), strict=True))
        return {
            name: Features.of_present(values.detach().cpu().numpy()[columns[name]], np.ascontiguousarray(columns[name]))
            for name, values in self.tuned.items()
        }
