"""Exports of small random models, each made once for all workers: tracing a graph takes seconds."""

import functools
import json
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import traces as traces_of_tests
from reference import Tiny, make_tiny
from torch.onnx._internal.exporter._registration import ONNXRegistry
from traces import Traces, locked

from speeder_engine import Engine, EngineConfig
from speeder_engine.config import CalendarConfig, FollowersConfig
from speeder_engine.export import OnnxConfig, export_onnx
from speeder_engine.export.repeated_layers import TRACED_LAYERS

CALENDAR = CalendarConfig(first_second=0, bucket_seconds=1000, num_buckets=5)
FOLLOWERS = FollowersConfig(window=3, last=5, keep=4)


@dataclass
class Exported:
    tiny: Tiny
    engine_dir: Path
    path: Path

    @property
    def manifest(self) -> dict:
        return json.loads((self.path / "export.json").read_text())

    def engine(self) -> Engine:
        """The judge: float32, no sessions."""
        return Engine(self.tiny.parts(), EngineConfig(dtype="float32", kv_budget="0"))


def make(folder: Path, config: OnnxConfig, **shape) -> Exported:
    """The worker that asks first exports, others wait for it: what is there is whole, and nobody changes it."""
    tiny = make_tiny(**{"num_layers": 2} | shape)
    engine, out = folder / "engine", folder / "onnx"
    with locked(folder.with_suffix(".lock")):
        if not out.exists():
            tiny.parts().save(engine)
            export_onnx(engine, out, config, 40)
    return Exported(tiny, engine, out)


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """The exporter's table of operators, the same for all graphs of an opset: it parses their sources anew for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Path:
    """A folder of this run, the same for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def standard(exports) -> Exported:
    """Of more layers than are traced."""
    return make(exports / "standard", OnnxConfig("standard"), family="qwen2", num_layers=TRACED_LAYERS + 1)


@pytest.fixture(scope="session")
def ort(exports) -> Exported:
    """Of a model that reads times and knows who follows whom."""
    return make(exports / "ort", OnnxConfig("ort"), family="qwen3", calendar=CALENDAR, followers=FOLLOWERS)


@pytest.fixture(scope="session")
def compress(exports, traces) -> Exported:
    """The one graph that is traced in a second; of a model without groups of queries."""
    with traces.used():
        return make(exports / "compress", OnnxConfig(graphs=("compress",)), kv_heads=6)


@pytest.fixture(scope="session")
def traces(exports) -> Traces:
    return Traces(exports / "traces")


@pytest.fixture
def shared_traces(traces) -> Iterator[None]:
    """For what judges something else than the trace: one that was made before in this run is not made again."""
    with traces.used():
        yield


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Starts what is called with in a copy of this process, where all is imported, and tells its id."""

    def start(act: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # the others are not copied
                act()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return child

    return start


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """A limit on the size of files stands for it: it is met while a plan or graph is written."""

    @contextmanager
    def limit() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with pytest.MonkeyPatch.context() as patch:
            # a trace that is to be shared would be written too
            patch.setattr(traces_of_tests, "TRACE", lambda *_: pytest.fail("trace it before the disk is full"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit
