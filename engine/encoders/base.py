"""What an encoder is, and how one is written to a folder and read back (JSON and safetensors, never a pickle)."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from speeder_engine.encoders.features import Features
from speeder_engine.errors import ArtifactError
from speeder_engine.files import write_atomic, write_json

Input = str | bytes | None
MANIFEST = "encoder.json"
WEIGHTS = "encoder.safetensors"
FORMAT = 1


class Encoder(Protocol):
    """Turns one modality of the items into Features: text from `str`, images from the bytes of a file."""

    @property
    def modality(self) -> str:
        """`text` or `image`."""
        ...

    @property
    def name(self) -> str:
        """For people: which encoder this is."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """sha256 over kind, settings and weights: equal fingerprints give equal features."""
        ...

    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        """One row per input; `None` or an unusable input is not present. `names` are the items' ids, for warnings."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all that `load_encoder` needs into `folder`, which is made where it is missing."""
        ...


def fingerprint_of(kind: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(_BYTE).numpy())
    return digest.hexdigest()
