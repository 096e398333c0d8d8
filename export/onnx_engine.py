"""OnnxEngine: the graphs of an ONNX export under ONNX Runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from speeder_engine.artifact import read_artifact
from speeder_engine.catalogue import ITEMS_FILE, ItemTable
from speeder_engine.checks import given_path
from speeder_engine.config import ModelConfig
from speeder_engine.errors import ArtifactError, ConfigError
from speeder_engine.export.graph_engine import GraphEngine, read_whole
from speeder_engine.export.onnx_check import check_graph
from speeder_engine.export.onnx_config import INSTRUCTION_FILE, ONNX, OnnxConfig
from speeder_engine.export.onnx_session import Array, GraphSession

MOST_THREADS = 1024  # of one run; more are a slip


@dataclass(frozen=True)
class OnnxFiles:
    """What an ONNX export holds, as objects; its files have been checked."""

    path: Path
    config: OnnxConfig
    model: ModelConfig
    table: ItemTable
    revision: str

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ArtifactError, naming the file, for anything but a whole export of this format."""
        artifact = read_artifact(path, ONNX)
        manifest = artifact.manifest
        try:
            config, model = OnnxConfig.from_json(manifest["export"]), ModelConfig.from_json(manifest["model"])
            revision = str(manifest["engine_revision"])
        except (ConfigError, KeyError) as error:
            raise ArtifactError(f"{path / ONNX.manifest}: settings that fit no export: {error}; {ONNX.again}") from None
        artifact.file(ITEMS_FILE)
        if config.has_instruction:
            artifact.file(INSTRUCTION_FILE)
        for name in config.graphs:
            check_graph(artifact.file(f"{name}.onnx"), config.flavour)
        return cls(path, config, model, ItemTable.load(path), revision)

    def graph(self, name: str) -> Path:
        return self.path / f"{name}.onnx"

    def read_instruction(self) -> dict[str, Array]:
        """What a new user's keys and values begin with, by the inputs' names; empty for graphs that need none. Read
        once: while an engine runs, another export may take this one's place."""
        if not self.config.has_instruction:
            return {}
        path = self.path / INSTRUCTION_FILE
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: can't be read: {error}; {ONNX.again}") from error


class OnnxEngine(GraphEngine):
    """An ONNX export under ONNX Runtime. `OnnxEngine.load` makes one."""

    def __init__(self, files: OnnxFiles, provider: str = "cpu", kv_budget: str = "1GiB", threads: int = 0) -> None:
        config, threads = files.config, read_whole("threads", threads, MOST_THREADS)
        if provider == "tensorrt" and config.flavour == "ort":
            raise ConfigError("provider: TensorRT knows no GroupQueryAttention; export with --flavour standard")
        if provider == "cpu" and config.dtype == "bfloat16":
            raise ConfigError("provider: ONNX Runtime has no bfloat16 on the CPU; export float32 or choose 'cuda'")
        self.provider = provider
        sessions = {name: GraphSession(files.graph(name), provider, threads) for name in config.graphs}
        super().__init__(files, sessions, kv_budget)
        self._instruction = files.read_instruction() if self._has_sessions else {}

    @classmethod
    def load(cls, path: str | Path, provider: str = "cpu", kv_budget: str = "1GiB", threads: int = 0) -> "OnnxEngine":
        """Reads and verifies an ONNX export.

        provider: "cpu", "cuda" or "tensorrt". kv_budget: bytes that users' keys and values may take. threads: of one
        run on the CPU; 0: all. Raises ArtifactError for a path that is no whole export, MissingDependency where the
        runtime lacks, ConfigError where it would run elsewhere than asked.
        """
        return cls(OnnxFiles.load(given_path(path, "OnnxEngine.load", "an export")), provider, kv_budget, threads)

    @property
    def _in_place(self) -> bool:
        return self.files.config.flavour == "ort"

    def _first(self, value: Any, count: int) -> Any:
        """By way of the host: the runtime cuts no values."""
        return self._session("extend").to_device(value.numpy()[:, :, :count])

    def _new_buffers(self) -> list[Any]:
        """Keys and values of a whole window, behind the instruction's, on the device."""
        heads, size = self._kv_shape
        session, buffers = self._session("extend"), []
        for name in self._past:
            first = self._instruction[name]
            buffer = np.zeros((1, heads, first.shape[2] + self.layout.config.window, size), first.dtype)
            buffer[:, :, : first.shape[2]] = first
            buffers.append(session.to_device(buffer))
        return buffers
