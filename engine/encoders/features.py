"""Features: one vector per item of one modality, and which items have one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from speeder_engine.errors import ArtifactError, DataError
from speeder_engine.files import write_atomic

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Features:
    """`values` float32 [n, d], `present` bool [n]; a row that is not present is all zeros, so sums need no mask."""

    values: Floats
    present: Flags

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise DataError(f"features: values must be float32 [n, d], not {self.values.dtype} {self.values.shape}")
        if self.present.shape != (len(self.values),) or self.present.dtype != np.bool_:
            raise DataError(
                f"features: present must be bool [{len(self.values)}], not {self.present.dtype} {self.present.shape}"
            )
        if not np.isfinite(self.values).all():
            row = int(np.flatnonzero(~np.isfinite(self.values).all(axis=1))[0])
            raise DataError(f"features: row {row} holds NaN or infinity; mark it as not present, with zeros")
        stray = np.flatnonzero(self.values.any(axis=1) & ~self.present)
        if len(stray):
            raise DataError(f"features: row {stray[0]} is not present but not zero; set it to zeros")

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> "Features":
        """The given rows, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Features(self.values[chosen], self.present[chosen])

    @classmethod
    def of_present(cls, values: Floats, present: Flags) -> "Features":
        """Spreads `values` [k, d], the vectors of the k rows where `present` [n] is true, over n rows."""
        spread = np.zeros((len(present), values.shape[1]), np.float32)
        spread[present] = values
        return cls(spread, present)

    def save(self, path: Path) -> None:
        tensors = {"values": np.ascontiguousarray(self.values), "present": np.ascontiguousarray(self.present)}
        write_atomic(path, safetensors.numpy.save(tensors))

    @classmethod
    def load(cls, path: Path) -> "Features":
        try:
            tensors = safetensors.numpy.load(path.read_bytes())
            return cls(tensors["values"], tensors["present"])
        except (safetensors.SafetensorError, KeyError, DataError, OSError) as error:
            raise ArtifactError(
                f"{path}: not a readable features file ({error}); remove it and encode again"
            ) from error
