"""Features on disk, keyed by content: what an encoder has seen once it isn't asked again."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from speeder_engine.encoders.base import Encoder, Input
from speeder_engine.encoders.features import Features, Floats
from speeder_engine.errors import SpeederWarning
from speeder_engine.files import write_atomic

Keys = NDArray[np.uint8]
FILE = "features.safetensors"


class FeatureCache:
    """One file per encoder, in a folder named by its fingerprint: vectors and the sha256 of the inputs they stand for.

    Inputs that an encoder could not use are not stored: they are tried, and warned about, each time.
    Two processes may share a folder: the last to finish wins, and the other's vectors are encoded again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, encoder: Encoder, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        """As `encoder.encode`, but content that was encoded before is not encoded again."""
        path = self.folder / encoder.fingerprint / FILE
        keys = [content_key(content) for content in inputs]
        stored = read_vectors(path, encoder.dim)
        missing = [row for row, key in enumerate(keys) if key is not None and key not in stored]
        if missing:
            encoded = encoder.encode(
                [inputs[row] for row in missing], None if names is None else [names[row] for row in missing]
            )
            found = {keys[row]: encoded.values[i] for i, row in enumerate(missing) if encoded.present[i]}
            stored |= {key: vector for key, vector in found.items() if key is not None}
            if found:
                write_vectors(path, stored)
        present = np.array([key in stored for key in keys], dtype=np.bool_)
        values = np.zeros((len(keys), encoder.dim), np.float32)
        for row, key in enumerate(keys):
            if key in stored:
                values[row] = stored[key]
        return Features(values, present)


def content_key(content: Input) -> bytes | None:
    if content is None:
        return None
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()


def read_vectors(path: Path, dim: int) -> dict[bytes | None, Floats]:
    """The stored vectors by key; none, with a warning, where the file is damaged."""
    if not path.exists():
        return {}
    try:
        tensors = safetensors.numpy.load(path.read_bytes())
        keys, values = tensors["keys"], tensors["values"]
        if keys.shape != (len(values), 32) or values.shape[1:] != (dim,) or not np.isfinite(values).all():
            raise ValueError(f"keys {keys.shape} and values {values.shape} don't fit a {dim}-d encoder")
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        warnings.warn(f"{path}: damaged feature cache, encoding again ({error})", SpeederWarning, stacklevel=3)
        return {}
    return {key.tobytes(): vector for key, vector in zip(keys, values, strict=True)}


def write_vectors(path: Path, stored: dict[bytes | None, Floats]) -> None:
    keys: Keys = np.frombuffer(b"".join(key for key in stored if key is not None), np.uint8).reshape(-1, 32)
    values = np.stack(list(stored.values())).astype(np.float32)
    write_atomic(path, safetensors.numpy.save({"keys": keys, "values": values}))
