"""Turns a checkpoint into what production loads, and an engine directory into what other stacks do."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder_engine.export.onnx_config import OnnxConfig
    from speeder_engine.export.onnx_engine import OnnxEngine
    from speeder_engine.export.plan_config import PlanConfig
    from speeder_engine.export.tensorrt_engine import TensorRTEngine
    from speeder_engine.export.to_onnx import export_onnx
    from speeder_engine.export.to_tensorrt import export_tensorrt
    from speeder_engine.export.triton_config import TritonConfig
    from speeder_engine.export.triton_server import export_triton

_HOME_OF = {
    "OnnxConfig": "onnx_config",
    "OnnxEngine": "onnx_engine",
    "PlanConfig": "plan_config",
    "TensorRTEngine": "tensorrt_engine",
    "TritonConfig": "triton_config",
    "export_onnx": "to_onnx",
    "export_tensorrt": "to_tensorrt",
    "export_triton": "triton_server",
}

__all__ = [
    "OnnxConfig",
    "OnnxEngine",
    "PlanConfig",
    "TensorRTEngine",
    "TritonConfig",
    "export_onnx",
    "export_tensorrt",
    "export_triton",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'speeder_engine.export' has no attribute {name!r}")
    return getattr(import_module(f"speeder_engine.export.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
