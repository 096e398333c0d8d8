"""bf16 where the hardware multiplies it; weights, moments and sums of losses stay in fp32 under it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from speeder_engine.encoders.sources import has_native_bf16


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: `auto` is bfloat16 where `has_native_bf16`, `bfloat16` so on any hardware."""
    if precision == "bfloat16" or (precision == "auto" and has_native_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
