"""Transfer: what a step sends to the device, in one copy, and what it answers, in one copy back.

On a GPU both copies go through pinned memory made once, so that sending waits for nothing and a step is waited for
once: where its answer is read. Nothing here knows what the arrays mean.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD = 8  # bytes
ALIGNED = 2  # words: Triton compiles a kernel anew for pointers that are no multiple of 16 bytes


class Transfer:
    """An arena of int64 words on the host and its mirror on the device, neither ever moved.

    `begin` a step, `put` arrays, `send` them: what `put` returns can be read by what is launched after `send`, and
    is overwritten by the next step. Without capacity, as on the CPU, arrays become tensors as they are.
    """

    def __init__(self, device: torch.device, capacity: int = 0) -> None:
        self.device = device
        self.capacity = capacity
        self.is_cuda = device.type == "cuda"
        self.host = torch.zeros(capacity, dtype=torch.int64, pin_memory=self.is_cuda and capacity > 0)
        self.arena = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._answers = torch.zeros(0, dtype=torch.uint8)
        self._used = self._sent = 0
        self._leaving, self._arrived = (_event(self.is_cuda) for _ in range(2))

    def begin(self, reserved: int = 0) -> None:
        """A new step, whose first `reserved` words the caller fills in `host`."""
        if self._leaving is not None:
            self._leaving.synchronize()  # what the last step sent may still be on its way
        self._used, self._sent = reserved, 0

    def put(self, array: NDArray[Any]) -> Tensor:
        """The array on the device: integers as int64, bools as they are."""
        return self._put(array if array.dtype == np.bool_ else array.astype(np.int64, copy=False))

    def put_int32(self, array: NDArray[Any]) -> Tensor:
        return self._put(array.astype(np.int32, copy=False))

    def at(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Tensor, int]:
        """The words from `start` on as an array of the host and as the tensor of the device; and where they end."""
        end, count = start + words_of(shape, dtype), math.prod(shape)
        assert end <= self.capacity, f"{end} words, the arena has {self.capacity}"
        kind = torch.bool if dtype == np.bool_ else getattr(torch, dtype.name)
        host, there = (part[start:end].view(kind)[:count].view(shape) for part in (self.host, self.arena))
        return host.numpy(), there, end

    def _put(self, array: NDArray[Any]) -> Tensor:
        if self._used + words_of(array.shape, array.dtype) > self.capacity:
            # also where there is no arena: on the CPU nothing need be copied
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        host, there, self._used = self.at(self._used, array.shape, array.dtype)
        host[...] = array
        return there

    def send(self) -> None:
        """One copy of what was put since the last `send`, or since `begin`."""
        if self._used > self._sent:
            part = slice(self._sent, self._used)
            self.arena[part].copy_(self.host[part], non_blocking=True)
            self._sent = self._used
            if self._leaving is not None:
                self._record(self._leaving)

    def _record(self, event: torch.cuda.Event) -> None:
        # `record()` alone takes the stream of the device that is current, which need not be this one
        event.record(torch.cuda.current_stream(self.device))

    def fetch(self, tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
        """The tensors on the host, waited for: the step's one synchronisation. Read before the next `fetch`."""
        if self._arrived is None:
            return [tensor.numpy() for tensor in tensors]
        bytes_of = [tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors if tensor.numel()]
        if not bytes_of:
            return [np.empty(tensor.shape, _numpy_dtype(tensor.dtype)) for tensor in tensors]
        flat = torch.cat(bytes_of) if len(bytes_of) > 1 else bytes_of[0]
        if flat.shape[0] > self._answers.shape[0]:
            self._answers = torch.zeros(2 * flat.shape[0], dtype=torch.uint8, pin_memory=True)
        answers = self._answers[: flat.shape[0]]
        answers.copy_(flat, non_blocking=True)
        self._record(self._arrived)
        self._arrived.synchronize()
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        parts = np.split(answers.numpy(), np.cumsum(sizes)[:-1])
        return [
            part.view(_numpy_dtype(tensor.dtype)).reshape(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]


def _event(is_cuda: bool) -> torch.cuda.Event | None:
    return torch.cuda.Event() if is_cuda else None


def words_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Of an array with what keeps the next one aligned."""
    return -(-math.prod(shape) * dtype.itemsize // (ALIGNED * WORD)) * ALIGNED


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))
