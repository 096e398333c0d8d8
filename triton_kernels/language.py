"""Triton as the kernels import it, and when they run.

Triton has wheels for Linux alone. Elsewhere the kernels are never called, but their files must import: the references
stand in them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Whatever a kernel's definition asks of triton: decorators and annotations."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    triton = tl = _Absent()

__all__ = ["interpreted", "next_power_of_2", "on", "runs_triton", "tl", "triton"]


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether a public function launches its kernel: plain tensors on a GPU, nothing traced, nothing differentiated.

    None stands for a tensor that is left out.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    traced = torch.compiler.is_compiling() or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in given)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return not traced and not differentiated and all(tensor.is_cuda for tensor in given)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreted(tensor: Tensor) -> bool:
    """Whether a launch on this tensor goes to Triton's interpreter, which multiplies no bf16 matrices."""
    return not tensor.is_cuda


def next_power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
