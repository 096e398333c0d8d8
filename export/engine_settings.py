"""What engines of exported graphs are loaded with, checked before anything is read."""

from pathlib import Path

import numpy as np

from speeder_engine.config import check
from speeder_engine.errors import ConfigError, shown


def read_path(path: object, where: str) -> Path:
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{where}: expected the path of an export, got {shown(path)}") from None


def read_whole(name: str, value: object, most: int) -> int:
    """A whole number from 0 to `most`."""
    number = int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else -1
    check(0 <= number <= most, f"{name}: expected a whole number within 0..{most}, got {shown(value)}")
    return number
