"""Encoders as they are read back: which class a folder is of, imported when there is one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from speeder_engine.encoders.base import Encoder, read_manifest
from speeder_engine.errors import ArtifactError, SpeederError


def load_encoder(folder: Path) -> Encoder:
    """Reads what `Encoder.save` wrote; ArtifactError names the folder where it can't."""
    kind, settings = read_manifest(folder)
    try:
        return _load_kind(kind, folder, settings)
    except (SpeederError, OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{folder}: not a readable {kind} encoder ({error}); export it again") from error


def _load_kind(kind: str, folder: Path, settings: Mapping[str, Any]) -> Encoder:
    if kind == "transformers-text":
        from speeder_engine.encoders.text import TransformersTextEncoder

        return TransformersTextEncoder.load(folder, settings)
    if kind == "fitted-text":
        from speeder_engine.encoders.fitted_text import FittedTextEncoder

        return FittedTextEncoder.load(folder, settings)
    if kind == "transformers-image":
        from speeder_engine.encoders.image import TransformersImageEncoder

        return TransformersImageEncoder.load(folder, settings)
    if kind == "fitted-image":
        from speeder_engine.encoders.fitted_image import FittedImageEncoder

        return FittedImageEncoder.load(folder, settings)
    raise ArtifactError(f"unknown kind {kind!r}, written by another version?")
