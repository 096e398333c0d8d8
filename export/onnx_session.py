"""GraphSession: one graph under ONNX Runtime, on the provider that was asked for and no other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.config import check
from speeder_engine.errors import ArtifactError, ConfigError, MissingDependency, shown
from speeder_engine.export.tools import installed_version

Array = NDArray[Any]
# by the names that callers use; what TensorRT can't take runs on CUDA
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def load_runtime(provider: str) -> Any:
    """The package onnxruntime, or MissingDependency that names the extra with this provider."""
    known = isinstance(provider, str) and provider in PROVIDERS
    check(known, f"provider: {shown(provider)} is not one of {', '.join(PROVIDERS)}")
    extra = "ort" if provider == "cpu" else "ort-gpu"
    what = f"provider {provider!r}"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
    if len(both) > 1:
        raise ConfigError("onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall one")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime" if extra == "ort" else "onnxruntime-gpu", extra, what) from error
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise MissingDependency("onnxruntime-gpu", extra, f"{what} (uninstall onnxruntime first)")
    return onnxruntime


class GraphSession:
    """Runs one verified .onnx file. Arrays in and out; a value may also stay on the device."""

    def __init__(self, path: Path, provider: str, threads: int = 0) -> None:
        """threads: of one run; 0: as many as there are cores."""
        self.runtime = load_runtime(provider)
        self.provider = provider
        self.device = "cpu" if provider == "cpu" else "cuda"
        options = self.runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # or it keeps a plan of memory for every shape that comes by
        options.enable_mem_pattern = False
        # threads that spin while they wait make everything slower as soon as another process wants a core
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = [PROVIDERS[name] for name in ((provider, "cuda") if provider == "tensorrt" else (provider,))]
        try:
            self._session = self.runtime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # the runtime's own types say no more
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"{path}: ONNX Runtime can't load it on {provider!r}: {reason}") from error
        check_provider(self._session.get_providers(), provider)
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Any]]:
        """Arrays of `outputs`, and values that are `kept`: output name -> the value to write it into, None for a new
        one on the device. What is in neither is not computed. Inputs are arrays, or values that are on the device."""
        kept = kept or {}
        binding = self._session.io_binding()
        # as values: the binding of arrays doesn't know inputs with defaults; and held: a binding doesn't
        held = {name: self._value(value) for name, value in inputs.items()}
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        for name, value in kept.items():
            if value is None:
                binding.bind_output(name, self.device)
            else:
                binding.bind_ortvalue_output(name, value)
        options = self.runtime.RunOptions()
        options.only_execute_path_to_fetches = True
        self._session.run_with_iobinding(binding, options)
        values = binding.get_outputs()
        arrays = {name: value.numpy() for name, value in zip(outputs, values, strict=False)}
        made = zip(kept.values(), values[len(outputs) :], strict=True)
        # a value that was given owns its memory; what the binding returns in its place doesn't
        return arrays, [new if given is None else given for given, new in made]

    def _value(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        return value

    def shape(self, value: Any) -> tuple[int, ...]:
        """Of a value that was kept."""
        return tuple(value.shape())

    def to_device(self, array: Array) -> Any:
        """A copy of the array as a value on the device."""
        return self.runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)


def check_provider(running: Sequence[str], provider: str) -> None:
    """The runtime falls back to the CPU without a word; we don't."""
    if not running or running[0] != PROVIDERS[provider]:
        raise ConfigError(
            f"provider: {provider!r} was asked for, but the graph runs on {', '.join(running) or 'nothing'}; install "
            f"the driver and libraries that onnxruntime-gpu needs, or choose another provider"
        )
