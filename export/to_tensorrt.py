"""An engine directory -> TensorRT plans of its graphs, for chips that need not be here. What is built is not run; the
graphs it is built from are checked and compared with the engine, where ONNX Runtime can run them."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speeder_engine.artifact import write_artifact
from speeder_engine.checks import given_path
from speeder_engine.config import check
from speeder_engine.errors import ArtifactError, SpeederWarning
from speeder_engine.export.float8 import use_float8
from speeder_engine.export.graph_spec import GraphSpec, dtype_name, graph_specs
from speeder_engine.export.onnx_check import check_graph, check_model
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.parity import PARITY_USERS, compare_files, describe, why_not_compared
from speeder_engine.export.plan_builder import Limits, PlanBuilder
from speeder_engine.export.plan_config import PLANS, PlanConfig
from speeder_engine.export.tensorrt_package import PACKAGES, check_installed, find_chip, load_tensorrt
from speeder_engine.export.tools import versions
from speeder_engine.files import write_atomic
from speeder_engine.parts import EngineParts
from speeder_engine.progress import progress_bar

MOST_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class BuiltGraph:
    """What the manifest says of a graph."""

    spec: GraphSpec
    limits: Limits
    parity: dict[str, Any] | str  # of the graph with the engine; the plan is not run

    def to_json(self) -> dict[str, Any]:
        inputs = {
            name: {"dtype": dtype_name(self.spec.inputs[name]), "shape": list(shape)}
            for name, shape in self.spec.input_shapes.items()
        }
        named = {size for entry in inputs.values() for size in entry["shape"] if isinstance(size, str)}
        named |= {"k"} & inputs.keys()
        outputs = {name: list(shape) for name, shape in self.spec.outputs.items()}
        return {
            "inputs": inputs,
            "outputs": outputs,
            "profile": {name: list(self.limits[name]) for name in sorted(named)},
            "parity": self.parity,
        }


def export_tensorrt(
    engine: str | Path,
    out: str | Path,
    config: PlanConfig,
    timing_cache: Path | None = None,
    parity_users: int = PARITY_USERS,
) -> dict[str, Any]:
    """Writes `out` in one step and returns its manifest. A killed export leaves nothing that loads.

    timing_cache: a file that tensorrt's measurements are read from, if it is there, and written to. parity_users:
    random users for whom the graphs and the engine must agree, where ONNX Runtime is installed and runs them. Raises
    MissingDependency, ConfigError for limits beyond the model's, ExportError for a graph that is off or can't be built
    and ArtifactError for folders that can't be read or written.
    """
    out = given_path(out, "export", "a folder of plans")
    check_installed(config.runtime, "building TensorRT plans")
    here = config.runtime == "tensorrt"
    # before the package: without a driver its libraries end the process
    chips = (find_chip("building with tensorrt"),) if here else config.chips
    trt = load_tensorrt(config.runtime, "building TensorRT plans")
    check(timing_cache is None or here, "timing cache: tensorrt-rtx measures nothing to keep")
    parts = EngineParts.load(engine)
    config.check_model(parts.config)
    known = _read_cache(timing_cache)

    def fill(folder: Path) -> dict[str, Any]:
        nonlocal known
        parts.catalogue.table().save(folder)
        with graph_files(parts, config, folder) as graphs:
            built = _compared(parts, config, graphs, parity_users)
            with plan_progress(len(graphs) * len(chips)) as step:
                builder = PlanBuilder(trt, known, step.note)
                for chip in chips:
                    _build(builder, built, folder / f"sm{chip}", step, None if here else chip)
                known = builder.timing_cache
        return {
            "engine_revision": parts.revision,
            "export": config.to_json(),
            "chips": list(chips),
            "model": parts.config.to_json(),
            "limits": {"num_items": len(parts.catalogue), "window": parts.config.prompt.window},
            "graphs": {graph.spec.name: graph.to_json() for graph in built.values()},
            "tools": versions(("speeder-engine", "torch", "onnx", PACKAGES[config.runtime])),
            "run": "built, not run",
        }

    manifest = write_artifact(out, fill, PLANS).manifest
    if timing_cache is not None and known:
        try:
            write_atomic(timing_cache, known)
        except ArtifactError as error:  # the plans stand already
            warnings.warn(f"timing cache: {error}; the plans are whole", SpeederWarning, stacklevel=2)
    return manifest


def _compared(
    parts: EngineParts, config: PlanConfig, graphs: Mapping[Path, GraphSpec], num_users: int
) -> dict[Path, BuiltGraph]:
    """What plans are built of, by the graphs' files, which lie in one folder. Raises ExportError where one is off."""
    why_not, onnx = why_not_compared(config.dtype, num_users), config.graph_config
    parity = {} if why_not else compare_files(parts, onnx, next(iter(graphs)).parent, num_users)
    return {
        path: BuiltGraph(spec, limits_of(spec, parts, config), describe(parity.get(spec.name), why_not))
        for path, spec in graphs.items()
    }


@contextmanager
def graph_files(parts: EngineParts, config: PlanConfig, folder: Path) -> Iterator[dict[Path, GraphSpec]]:
    """The graphs as ONNX files below `folder`, with what they were traced from; gone when the block ends."""
    place = folder / "graphs"
    place.mkdir()
    onnx = config.graph_config
    graphs: dict[Path, GraphSpec] = {}
    is_float8 = False
    with WeightsFile(place) as weights:
        for spec in graph_specs(parts, onnx):
            model = spec.static_model
            # the graphs share one model: the first that reads it changes it for all
            if config.dtype == "float8" and model is not None and not is_float8:
                use_float8(model)
                is_float8 = True
            graphs[write_graph(spec, onnx.opset, weights)] = spec
    for path in graphs:
        check_graph(path, onnx.flavour)
        check_model(path)
    yield graphs
    shutil.rmtree(place)


def _build(
    builder: PlanBuilder, graphs: Mapping[Path, BuiltGraph], place: Path, step: "PlanProgress", chip: int | None
) -> None:
    """Plans of all graphs in a chip's folder; `chip` None: for the GPU that is there."""
    place.mkdir()
    for path, graph in graphs.items():
        name = graph.spec.name
        step.begin(f"{name} for SM {place.name.removeprefix('sm')}")
        plan = builder.build(path, graph.spec.input_shapes, graph.limits, chip)
        # as the builder holds it, without a second copy in memory
        (place / f"{name}.plan").write_bytes(memoryview(plan))


def limits_of(spec: GraphSpec, parts: EngineParts, config: PlanConfig) -> Limits:
    limits = config.limits(parts.config)
    # sessions are extended one by one
    return limits | {"batch": (1, 1, config.batch[1])} if spec.name == "extend" else limits


@dataclass
class PlanProgress:
    """A bar of plans, with the builder's phase beside it."""

    bar: Any
    task: Any
    begun: int = 0

    def begin(self, what: str) -> None:
        self.bar.update(self.task, description=f"building {what}", completed=self.begun)
        self.begun += 1

    def note(self, phase: str) -> None:
        self.bar.update(self.task, note=phase)


@contextmanager
def plan_progress(total: int) -> Iterator[PlanProgress]:
    with progress_bar() as bar:
        progress = PlanProgress(bar, bar.add_task("building plans", total=total, note=""))
        yield progress
        bar.update(progress.task, completed=total, note="")


def _read_cache(path: Path | None) -> bytes | None:
    """None: none is wanted; empty: a new one."""
    if path is None:
        return None
    try:
        if not path.exists():
            return b""
        check(path.is_file() and path.stat().st_size <= MOST_CACHE_BYTES, f"timing cache: {path} is no timing cache")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror}; choose another timing cache") from error
