"""The packages tensorrt and tensorrt_rtx, and the GPU that running a plan needs. Nothing is imported before it is asked
for: without a driver some of their libraries end the process."""

import ctypes
import importlib
from importlib.util import find_spec
from typing import Any

from speeder_engine.errors import ConfigError, MissingDependency

MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
PACKAGES = {"rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
DRIVER = "libcuda.so.1"
# of the driver's cuDeviceGetAttribute
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76


def check_installed(runtime: str, what: str) -> None:
    """Raises MissingDependency, which names the extra, where `what` lacks the package; imports nothing."""
    if find_spec(MODULES[runtime]) is None:
        raise MissingDependency(PACKAGES[runtime], runtime, what)


def load_tensorrt(runtime: str, what: str) -> Any:
    """The module of "rtx" or "tensorrt"; MissingDependency where it is not there or can't be loaded."""
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise MissingDependency(PACKAGES[runtime], runtime, what) from error


def find_chip(what: str, index: int = 0) -> int:
    """The compute capability of a GPU, without the dot. Raises ConfigError where `what` can't reach one."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise _no_gpu(what, f"{DRIVER} can't be loaded") from None
    if code := driver.cuInit(0):
        raise _no_gpu(what, f"the driver can't be started (CUDA error {code})")
    count, device = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if index >= count.value or driver.cuDeviceGet(ctypes.byref(device), index):
        raise _no_gpu(what, f"it finds {count.value} GPUs, number {index} is not among them")
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    return 10 * major.value + minor.value


def _no_gpu(what: str, reason: str) -> ConfigError:
    return ConfigError(f"{what} needs an NVIDIA GPU and its driver: {reason}; use a GPU host, or OnnxEngine here")
