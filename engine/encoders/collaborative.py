"""The collaborative encoder: a SASRec fitted on training histories, whose item embeddings are the item vectors."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence_fit import Validation, fit_sequence_model
from speeder_engine.encoders.windows import Ints
from speeder_engine.errors import ArtifactError
from speeder_engine.files import write_atomic, write_json


@dataclass(frozen=True)
class CollaborativeEncoder:
    """A trained SASRec and which items [num_items] had a training event."""

    model: SASRec
    seen: Flags

    @property
    def features(self) -> Features:
        """Item vectors float32 [num_items, dim]; items without any training event are not present."""
        vectors = self.model.items.weight.detach().numpy()
        return Features.of_present(vectors[self.seen], self.seen)

    def scores(self, histories: Sequence[Ints]) -> Tensor:
        """Rows oldest first, any length -> float32 [n, num_items]; an empty history scores by popularity alone."""
        return self.model.scores(histories)

    def save(self, folder: Path) -> None:
        """Writes collaborative.json and collaborative.safetensors into `folder`."""
        tensors = {**self.model.state_dict(), "seen": torch.from_numpy(self.seen)}
        described = {"num_items": self.model.num_items, "config": asdict(self.model.config)}
        write_atomic(folder / "collaborative.safetensors", safetensors.torch.save(tensors))
        write_json(folder / "collaborative.json", described)

    @classmethod
    def load(cls, folder: Path) -> "CollaborativeEncoder":
        try:
            described = json.loads((folder / "collaborative.json").read_text())
            tensors = safetensors.torch.load((folder / "collaborative.safetensors").read_bytes())
            model = SASRec(described["num_items"], SASRecConfig(**described["config"]))
            seen = tensors.pop("seen").numpy()
            model.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder}: not a readable collaborative encoder ({error}); fit it again") from error
        return cls(model.eval(), seen)


def fit_collaborative(
    offsets: Ints,
    rows: Ints,
    num_items: int,
    config: SASRecConfig | None = None,
    validation: Validation | None = None,
) -> CollaborativeEncoder:
    """Trains on the histories `rows[offsets[u]:offsets[u + 1]]` (int64 [U + 1], int32 [N], oldest first)."""
    title = "collaborative encoder (SASRec)"
    model = fit_sequence_model(SASRec, config or SASRecConfig(), offsets, rows, num_items, validation, title)
    return CollaborativeEncoder(model, np.bincount(rows, minlength=num_items) > 0)
