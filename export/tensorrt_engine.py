"""TensorRTEngine: a TensorRT export on a GPU, with the face of `Engine`. It has not been run on a GPU so far."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from speeder_engine.artifact import Artifact, read_artifact
from speeder_engine.catalogue import ITEMS_FILE, ItemTable
from speeder_engine.checks import given_path
from speeder_engine.config import MOST_INT32, ModelConfig
from speeder_engine.errors import ArtifactError, ConfigError, InvalidRequest
from speeder_engine.export.graph_engine import GraphEngine, read_whole
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.plan_builder import make_logger
from speeder_engine.export.plan_config import PLANS, PlanConfig
from speeder_engine.export.plan_session import PlanRuntime, PlanSession
from speeder_engine.export.tensorrt_package import PACKAGES, find_chip, load_tensorrt
from speeder_engine.export.tools import installed_version
from speeder_engine.query import Query
from speeder_engine.request import Request


@dataclass(frozen=True)
class PlanFiles:
    """What a TensorRT export holds, as objects; its files have been checked."""

    artifact: Artifact
    plans: PlanConfig
    model: ModelConfig
    table: ItemTable
    revision: str

    @property
    def config(self) -> OnnxConfig:
        """Of the graphs that the plans were built from."""
        return self.plans.graph_config

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises ArtifactError, naming the file, for anything but a whole export of this format."""
        artifact = read_artifact(path, PLANS)
        manifest = artifact.manifest
        try:
            plans, model = PlanConfig.from_json(manifest["export"]), ModelConfig.from_json(manifest["model"])
            revision, chips = str(manifest["engine_revision"]), list(manifest["chips"])
        except (ConfigError, KeyError, TypeError) as error:
            source = path / PLANS.manifest
            raise ArtifactError(f"{source}: settings that fit no export: {error}; {PLANS.again}") from None
        for name in (ITEMS_FILE, *(f"sm{chip}/{graph}.plan" for chip in chips for graph in plans.graphs)):
            artifact.file(name)
        return cls(artifact, plans, model, ItemTable.load(path), revision)

    def check_tool(self) -> None:
        """Plans are read by the version that built them alone: raises ArtifactError for another one."""
        package = PACKAGES[self.plans.runtime]
        built, here = self.artifact.manifest["tools"].get(package), installed_version(package)
        if here is not None and here != built:
            found = f"built with {package} {built}, here is {here}"
            raise ArtifactError(f"{self.artifact.path}: {found}; install that version, or {PLANS.again}")

    def plan(self, graph: str, chip: int) -> tuple[Path, str]:
        """A graph's plan for a chip, and its hash. Raises ConfigError for a chip that nothing was built for."""
        name = f"sm{chip}/{graph}.plan"
        chips = self.artifact.manifest["chips"]
        if chip not in chips:
            held = ", ".join(map(str, chips))
            raise ConfigError(
                f"chip: this GPU is an SM {chip}, {self.artifact.path} holds plans for {held}; {PLANS.again}"
            )
        return self.artifact.file(name), self.artifact.manifest["files"][name]["sha256"]


class TensorRTEngine(GraphEngine):
    """Plans under TensorRT. `TensorRTEngine.load` makes one; a request beyond the profile is an InvalidRequest."""

    files: PlanFiles

    def __init__(self, files: PlanFiles, runtime: PlanRuntime, chip: int, kv_budget: str = "1GiB") -> None:
        sessions = {}
        for name in files.plans.graphs:
            engine = runtime.deserialize(*files.plan(name, chip))
            sessions[name] = PlanSession(name, runtime, engine)
        self._runtime = runtime
        super().__init__(files, sessions, kv_budget, max_batch=files.plans.batch[1])

    @classmethod
    def load(cls, path: str | Path, device: int = 0, kv_budget: str = "1GiB") -> "TensorRTEngine":
        """Reads and verifies a TensorRT export; device: which GPU; kv_budget: what users' keys and values may take.

        Raises ArtifactError for a path that is no whole export or was built with another TensorRT, ConfigError without
        a GPU or with one that there is no plan for, MissingDependency.
        """
        device = read_whole("device", device, MOST_INT32)
        files = PlanFiles.load(given_path(path, "TensorRTEngine.load", "an export"))
        chip = find_chip("TensorRTEngine", device)
        files.check_tool()
        return cls(files, open_runtime(files.plans.runtime, device), chip, kv_budget)

    def _resolve(self, request: Request) -> Query:
        """Refuses what no profile takes before anything is computed."""
        query = super()._resolve(request)
        counts = {"k": self._depth(request), "excluded": len(self._closed_rows(query))}
        if query.candidates is not None:
            # masked and cut here: no plan is told of a k, or of what is excluded
            counts = {"candidates": len(query.candidates)}
        for name, count in counts.items():
            typical, most = getattr(self.files.plans, name)
            if count > most:
                remedy = f"export with --{name} {typical},{count}"
                raise InvalidRequest(f"{name}: {count} are more than the {most} these plans take; {remedy}")
        return query

    @property
    def _has_sessions(self) -> bool:
        return self._users.budget > 0

    def _no_past(self) -> list[Any]:
        """One position that nobody reads: profiles begin at one."""
        heads, size = self._kv_shape
        empty = torch.zeros(1, heads, 1, size, dtype=self.files.config.torch_dtype, device=self._runtime.device)
        return [empty] * len(self._past)

    def _first(self, value: Any, count: int) -> Any:
        session = self._session("extend")
        assert isinstance(session, PlanSession)
        return session.first(value, count)


def open_runtime(name: str, device: int) -> PlanRuntime:
    """TensorRT on a GPU that has been found. Raises MissingDependency, or ConfigError for a torch without CUDA."""
    trt = load_tensorrt(name, "TensorRTEngine")
    if not torch.cuda.is_available():
        raise ConfigError(f"TensorRTEngine keeps its buffers in torch, and torch {torch.__version__} has no CUDA here")
    logger = make_logger(trt)
    place = torch.device("cuda", device)
    torch.cuda.set_device(place)
    return PlanRuntime(trt, logger, trt.Runtime(logger), place, torch.cuda.Stream(place))
