"""Where an engine computes, and in which precision."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from speeder_engine.config import check
from speeder_engine.errors import ConfigError
from speeder_engine.triton_kernels.linear_w8 import multiplies_fp8
from speeder_engine.triton_kernels.quantize_rows import DTYPES as BYTES
from speeder_engine.triton_kernels.quantize_rows import Kind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """With the number of the GPU, which for "auto" and "cuda" is the caller's current one: threads of the engine's own
    have another. Raises ConfigError for what is no device, or not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device; choose 'auto', 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; choose 'auto', 'cpu' or 'cuda'")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but no CUDA device is usable here; use device='cpu'")
    number = torch.cuda.current_device() if device.index is None else device.index
    there = torch.cuda.device_count()
    check(number < there, f"device: {name!r} was asked for, but the GPUs here are 0..{there - 1}")
    return torch.device("cuda", number)


def in_one_order(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, a GPU gets this thread's work on its default stream, behind what other threads have sent it so: a caller
    may have another stream, or another GPU, and those of streams are in no order."""
    return torch.cuda.stream(torch.cuda.default_stream(device)) if device.type == "cuda" else nullcontext()


@contextmanager
def _at_work(device: torch.device) -> Iterator[None]:
    """In one order, and in inference mode: what was made in a caller's own can be written nowhere else."""
    with in_one_order(device), torch.inference_mode():
        yield


class DeviceLock:
    """A lock whose holders' work on the device is in the order in which they hold it. Who waits is let in before who
    has just left: a worker that takes it step after step keeps nobody out for longer than one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._door = threading.Lock()  # held by the one that is next
        self._work: AbstractContextManager[None] = nullcontext()  # the holder's

    def acquire(self) -> None:
        with self._door:
            self._lock.acquire()
        try:
            self._work = _at_work(self._device)
            self._work.__enter__()
        except BaseException:  # a device that is lost
            self._lock.release()
            raise

    def release(self) -> None:
        try:
            self._work.__exit__(None, None, None)
        finally:
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def pick_kv_dtype(name: str, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Of cached keys and values. Raises ConfigError for fp8 on a GPU without instructions for it."""
    if name == "auto":
        return dtype
    older = name == "fp8" and device.type == "cuda" and not multiplies_fp8(device)
    check(not older, "EngineConfig.kv: 'fp8' needs a GPU of compute capability 8.9 or later; choose 'int8'")
    return BYTES[cast(Kind, name)]
