"""Exports of small random models, each made once: tracing a graph takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from reference import Tiny, make_tiny

from speeder_engine import Engine, EngineConfig
from speeder_engine.config import CalendarConfig
from speeder_engine.export import OnnxConfig, export_onnx

CALENDAR = CalendarConfig(first_second=0, bucket_seconds=1000, num_buckets=5)


@dataclass
class Exported:
    tiny: Tiny
    engine_dir: Path
    path: Path
    manifest: dict

    def engine(self) -> Engine:
        """The judge: float32, no sessions."""
        return Engine(self.tiny.parts(), EngineConfig(dtype="float32", kv_budget="0"))


def make(folder: Path, config: OnnxConfig, **shape) -> Exported:
    tiny = make_tiny(num_layers=2, **shape)
    tiny.parts().save(folder / "engine")
    return Exported(
        tiny, folder / "engine", folder / "onnx", export_onnx(folder / "engine", folder / "onnx", config, 40)
    )


@pytest.fixture(scope="session")
def standard(tmp_path_factory) -> Exported:
    return make(tmp_path_factory.mktemp("standard"), OnnxConfig("standard"), family="qwen2")


@pytest.fixture(scope="session")
def ort(tmp_path_factory) -> Exported:
    return make(tmp_path_factory.mktemp("ort"), OnnxConfig("ort"), family="qwen3", calendar=CALENDAR)


@pytest.fixture(scope="session")
def compress(tmp_path_factory) -> Exported:
    """The one graph that is traced in a second; of a model without groups of queries."""
    return make(tmp_path_factory.mktemp("compress"), OnnxConfig(graphs=("compress",)), kv_heads=6)
