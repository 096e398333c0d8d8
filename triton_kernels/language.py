"""Triton as the kernels import it, and when they run.

Triton has wheels for Linux alone. Elsewhere the kernels are never called, but their files must import: the references
stand in them.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

__all__ = [
    "await_others",
    "interpreted",
    "next_power_of_2",
    "on",
    "overlap_options",
    "overlapping",
    "runs_triton",
    "tl",
    "triton",
]

OVERLAPS = (9, 0)  # the first compute capability that launches a kernel before the one it waits for has ended


class _Launches(threading.local):
    overlap = False


_launches = _Launches()


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


@contextmanager
def overlapping(wanted: bool) -> Iterator[None]:
    """Inside, this thread's kernels are launched before those ahead of them have ended (programmatic dependent launch,
    CUDA C++ Programming Guide), where the GPU can. Each begins with `await_others`, so that what one reads is there:
    a kernel ends after all that it waited for."""
    before, _launches.overlap = _launches.overlap, wanted
    try:
        yield
    finally:
        _launches.overlap = before


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Of a launch: whether it overlaps the one ahead."""
    if not _launches.overlap or device.type != "cuda" or torch.cuda.get_device_capability(device) < OVERLAPS:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def await_others(OVERLAP: tl.constexpr):
    """Lets the next kernel begin to wait, and waits for those ahead. All before it may run beside them, and reads only
    what no kernel writes."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def interpreted(tensor: Tensor) -> bool:
    """Whether a launch on this tensor goes to Triton's interpreter, which multiplies no bf16 matrices."""
    return not tensor.is_cuda


def next_power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
