"""PlanSession: one TensorRT plan, ready to run: its inputs checked against the profile, its buffers torch tensors.

Memory belongs to torch: TensorRT reads and writes where it is told to, on torch's stream.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speeder_engine.errors import ArtifactError, ExportError, InvalidRequest
from speeder_engine.export.onnx_session import Array
from speeder_engine.export.plan_config import PLANS

# TensorRT's names of types -> torch's
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class PlanRuntime:
    """Where plans run. `trt`: the module tensorrt or tensorrt_rtx; `stream`: with `cuda_stream` and `synchronize`."""

    trt: Any
    logger: Any
    runtime: Any
    device: torch.device
    stream: Any

    def deserialize(self, path: Path, sha256: str) -> Any:
        """The plan as an engine. A plan is a program: its hash is compared with the manifest's before it is loaded."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}: can't be read: {error.strerror}; {PLANS.again}") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactError(f"{path}: is not the plan that the manifest lists; {PLANS.again}")
        engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise ArtifactError(f"{path}: TensorRT can't load it: {self.logger.last_error}; {PLANS.again}")
        return engine


class PlanSession:
    """Runs one plan; not for several threads at once."""

    def __init__(self, name: str, runtime: PlanRuntime, engine: Any) -> None:
        trt = runtime.trt
        self.name, self.runtime, self.engine = name, runtime, engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.inputs = [each for each in names if engine.get_tensor_mode(each) == trt.TensorIOMode.INPUT]
        self.outputs = [each for each in names if each not in self.inputs]
        self.dtypes = {each: DTYPES[engine.get_tensor_dtype(each).name] for each in names}
        # values that decide about shapes are read on the host
        self._on_host = {each for each in self.inputs if engine.get_tensor_location(each) == trt.TensorLocation.HOST}
        self._context = engine.create_execution_context()

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Tensor]]:
        """Arrays of `outputs`, and the tensors on the device that are `kept`. Inputs are arrays, or such tensors.

        Raises InvalidRequest for a shape that is not in the profile, ExportError when the plan fails.
        """
        with torch.cuda.stream(self.runtime.stream):
            return self._run(inputs, outputs, list(kept or ()))

    def _run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Sequence[str]
    ) -> tuple[dict[str, Array], list[Tensor]]:
        bound = {name: self._bind(name, inputs[name]) for name in self.inputs}
        if missing := self._context.infer_shapes():
            raise ExportError(f"plan {self.name}: TensorRT misses shapes of {', '.join(missing)}; {PLANS.again}")
        made = {name: self._allocate(name) for name in self.outputs}
        started = self._context.execute_async_v3(self.runtime.stream.cuda_stream)
        self.runtime.stream.synchronize()
        del bound
        if not started:
            raise ExportError(f"plan {self.name}: failed while it ran: {self.runtime.logger.last_error}")
        return {name: made[name].cpu().numpy() for name in outputs}, [made[name] for name in kept]

    def to_device(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.runtime.device)

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(value.shape)

    def first(self, value: Tensor, count: int) -> Tensor:
        """The first positions of keys or values [B, H_kv, P, D] that were kept, in memory of their own."""
        # in the order of runs, which the next of them reads it in
        with torch.cuda.stream(self.runtime.stream):
            return value[:, :, :count].clone()

    def _bind(self, name: str, value: Any) -> Tensor:
        """Hands an input to TensorRT; the tensor must live until the plan has run."""
        tensor = torch.from_numpy(np.asarray(value, order="C")) if isinstance(value, np.ndarray) else value
        device = torch.device("cpu") if name in self._on_host else self.runtime.device
        tensor = tensor.to(device, self.dtypes[name]).contiguous()
        self._check(name, tensor)
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            raise ExportError(f"plan {self.name}: TensorRT refuses {name} of the shape {tuple(tensor.shape)}")
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _allocate(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        tensor = torch.empty(shape, dtype=self.dtypes[name], device=self.runtime.device)
        self._context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _check(self, name: str, tensor: Tensor) -> None:
        """Every dimension of an input, and the value of one that decides about shapes, is in the profile."""
        if name in self._on_host:
            least, _, most = self.engine.get_tensor_profile_values(0, name)
            self._check_sizes(name, tensor.flatten().tolist(), least, most)
        else:
            shape = self.engine.get_tensor_shape(name)
            least, most = shape, shape
            if -1 in tuple(shape):
                least, _, most = self.engine.get_tensor_profile_shape(name, 0)
            self._check_sizes(name, tensor.shape, least, most)

    def _check_sizes(self, name: str, sizes: Sequence[int], least: Sequence[int], most: Sequence[int]) -> None:
        inside = len(sizes) == len(least) and all(a <= b <= c for a, b, c in zip(least, sizes, most, strict=True))
        if not inside:
            taken = f"the plan takes {tuple(least)} to {tuple(most)}"
            raise InvalidRequest(f"{name}: {tuple(sizes)} is beyond the profile, {taken}; export with wider limits")
