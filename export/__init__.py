"""Turns a checkpoint into what production loads, and an engine directory into what other stacks do."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder_engine.export.onnx_config import OnnxConfig
    from speeder_engine.export.onnx_engine import OnnxEngine
    from speeder_engine.export.to_onnx import export_onnx

_HOME_OF = {"OnnxConfig": "onnx_config", "OnnxEngine": "onnx_engine", "export_onnx": "to_onnx"}

__all__ = ["OnnxConfig", "OnnxEngine", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'speeder_engine.export' has no attribute {name!r}")
    return getattr(import_module(f"speeder_engine.export.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
