"""Which kernels this machine has, and whether an engine runs on them."""

import torch

from speeder_engine import _cpu
from speeder_engine.config import EngineConfig, check
from speeder_engine.errors import ConfigError

NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def pick_kernels(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a CPU engine computes with: "avx512", "avx2" or "plain"; None for torch.

    Raises ConfigError where what was asked for can't be had.
    """
    if device.type != "cpu":
        return None
    found = _pick(config.cpu_path, dtype)
    if found is not None:
        _check_native(config)
    return found


def _check_native(config: EngineConfig) -> None:
    """What native kernels don't compute."""
    instead = "choose 'int8', or set cpu_path to 'torch'"
    check(config.weights != "fp8", f"EngineConfig.weights: native kernels multiply no 'fp8'; {instead}")
    searched = "EngineConfig.search: native kernels search exactly; leave it at 'exact', or set cpu_path to 'torch'"
    check(config.search == "exact", searched)
    cached = f"EngineConfig.kv: native kernels cache keys and values in dtype, not in {config.kv!r}"
    check(config.kv == "auto", f"{cached}; leave it at 'auto', or set cpu_path to 'torch'")


def _pick(path: str, dtype: torch.dtype) -> str | None:
    if path == "torch" or (path == "auto" and dtype not in NUMBERS):
        return None
    if path == "auto":
        best = _cpu.best_kernels()
        return None if best == "plain" else best  # without vectors of its own, torch is faster
    if dtype not in NUMBERS:
        raise ConfigError(f"cpu_path: {path!r} computes in float32 or bfloat16, not {dtype}; choose 'torch'")
    if not _cpu.has_kernels(path):
        raise ConfigError(f"cpu_path: this machine has no {path!r}; its best is {_cpu.best_kernels()!r}")
    return path


def advise_huge(tensor: torch.Tensor) -> None:
    """Huge pages under a large tensor, where the system gives them: a walk over it misses fewer address look-ups."""
    if tensor.device.type == "cpu" and tensor.numel():
        _cpu.advise_huge(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def read_memory(tensor: torch.Tensor) -> None:
    """Reads every byte of a tensor once, on all threads, and does nothing with it: how fast a walk over it can be."""
    assert tensor.device.type == "cpu" and tensor.is_contiguous()
    _cpu.read(tensor.data_ptr(), tensor.numel() * tensor.element_size(), "", torch.get_num_threads())
