"""Exports of small random models, each made once for all workers: tracing a graph takes seconds."""

import fcntl
import json
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from reference import Tiny, make_tiny

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
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            tiny.parts().save(engine)
            export_onnx(engine, out, config, 40)
    return Exported(tiny, engine, out)


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
def compress(exports) -> Exported:
    """The one graph that is traced in a second; of a model without groups of queries."""
    return make(exports / "compress", OnnxConfig(graphs=("compress",)), kv_heads=6)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for it: it is met while a plan or graph is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
