"""Where an engine computes, and in which precision."""

from typing import cast

import torch

from speeder_engine.config import check
from speeder_engine.errors import ConfigError
from speeder_engine.triton_kernels.linear_w8 import multiplies_fp8
from speeder_engine.triton_kernels.quantize_rows import DTYPES as EIGHT_BITS
from speeder_engine.triton_kernels.quantize_rows import Kind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device; choose 'auto', 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; choose 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but no CUDA device is usable here; use device='cpu'")
    return device


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
    return EIGHT_BITS[cast(Kind, name)]
