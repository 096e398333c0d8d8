"""Room for large tensors: what a device can't give is refused before it is written to."""

import os
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from speeder_engine.errors import ConfigError

CPU = torch.device("cpu")
# as seen from inside a container: control groups of version 2, of version 1
CONTAINER_LIMITS = tuple(Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes"))


def host_memory() -> int:
    """Bytes that this process can have at most: the machine's memory, or what its container may take of it."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such controller; "max", which is none
            bounds.append(int(path.read_text()))
    return min(bounds)


def zeros(what: str, *shape: int, dtype: torch.dtype, device: torch.device = CPU, pin_memory: bool = False) -> Tensor:
    """A new tensor of zeros. Raises ConfigError, naming the setting `what` it is for, where there is no room."""
    num_bytes = prod(shape) * dtype.itemsize
    refuse_beyond_memory(what, num_bytes, device)
    try:
        return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pin_memory)
    except (RuntimeError, MemoryError, TypeError) as error:  # the last: more than 64 bits count
        raise _no_room(what, num_bytes, device) from error


def refuse_beyond_memory(what: str, num_bytes: int, device: torch.device) -> None:
    """A CPU's allocations succeed, and the process is killed where it writes to them: ConfigError instead."""
    if device.type == "cpu" and num_bytes > host_memory():
        raise _no_room(what, num_bytes, device)


def _no_room(what: str, num_bytes: int, device: torch.device) -> ConfigError:
    return ConfigError(f"{what} would take {num_bytes:,} bytes, which {device} can't give; lower it")
