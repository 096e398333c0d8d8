"""What an encoder is, and how one is written to a folder and read back: JSON and safetensors, never a pickle."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
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
        """Which encoder this is, for people."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """sha256 over kind, settings and weights: equal fingerprints give equal features, up to rounding."""
        ...

    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        """One row per input; `None` and what can't be used are not present. `names` are item ids, for warnings."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all that `load_encoder` needs into `folder`, which is made where it is missing."""
        ...


def write_manifest(folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    write_json(folder / MANIFEST, {"format": FORMAT, "kind": kind, "settings": settings})


def read_manifest(folder: Path) -> tuple[str, Mapping[str, Any]]:
    path = folder / MANIFEST
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        kind, settings, version = written["kind"], dict(written["settings"]), written["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a readable encoder manifest ({error}); export it again") from error
    if version != FORMAT:
        raise ArtifactError(f"{path}: encoder format {version}, this version reads {FORMAT}; export it again")
    return str(kind), settings


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    write_atomic(folder / WEIGHTS, safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}))


def read_weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


def fingerprint_of(kind: str, settings: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
