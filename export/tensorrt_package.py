"""The packages tensorrt and tensorrt_rtx, and the driver that running a plan needs. Nothing is imported before it is
asked for: without a driver some of their libraries end the process."""

import ctypes
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from speeder_engine.errors import ConfigError, MissingDependency

MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
PACKAGES = {"rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def load_tensorrt(runtime: str, what: str) -> Any:
    """The module of "rtx" or "tensorrt". Raises MissingDependency, which names the extra, for `what` needs it."""
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise MissingDependency(PACKAGES[runtime], runtime, what) from error


def is_installed(runtime: str) -> bool:
    try:
        version(PACKAGES[runtime])
    except PackageNotFoundError:
        return False
    return True


def has_driver() -> bool:
    return _why_no_driver() is None


def check_driver(what: str) -> None:
    """Raises ConfigError where `what` can't reach an NVIDIA GPU."""
    if reason := _why_no_driver():
        raise ConfigError(f"{what} needs an NVIDIA GPU and its driver: {reason}; use a GPU host, or OnnxEngine here")


def _why_no_driver(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    try:
        driver = load(DRIVER)
    except OSError:
        return f"{DRIVER} can't be loaded"
    if code := driver.cuInit(0):
        return f"the driver can't be started (CUDA error {code})"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the driver finds no GPU"
    return None
