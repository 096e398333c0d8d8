"""Traced graphs, each made once for all workers of a run: tests that judge something else than the trace share it."""

import fcntl
import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch

from speeder_engine.export import onnx_file
from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.onnx_config import OnnxConfig

TRACE = onnx_file._trace


class Traces:
    """In the place of `onnx_file._trace`: under the hash of all that goes into a trace, what comes out of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, spec: GraphSpec, opset: int) -> Any:
        path = self.folder / f"{digest((spec, opset, onnx_file.TRACED_LAYERS))}.onnx"
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                written = path.with_suffix(".part")
                onnx_ir.save(TRACE(spec, opset), written)
                written.rename(path)
        return onnx_ir.load(path)

    @contextmanager
    def used(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx_file, "_trace", self)
            yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """By one process at a time; a killed one gives it back."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Pickler(pickle.Pickler):
    """Of tensors, what is in them: torch pickles addresses too. Of settings, not which other graphs are exported."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, OnnxConfig):
            return tuple, ((value.flavour, value.dtype, value.opset),)
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        content = value.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        return tuple, ((type(value), str(value.dtype), tuple(value.shape), content),)


def digest(value: object) -> str:
    content = io.BytesIO()
    _Pickler(content).dump(value)
    return hashlib.sha256(content.getvalue()).hexdigest()
