"""speeder_engine: multimodal LLM recommendation at one token per item.

The public names are imported when they are first used, so that `speeder --help` needn't wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder_engine.config import EngineConfig
    from speeder_engine.engine import Engine
    from speeder_engine.errors import (
        ArtifactError,
        CacheExhausted,
        CatalogueFull,
        ConfigError,
        DataError,
        DeadlineExceeded,
        EngineClosed,
        ExportError,
        InvalidRequest,
        MissingDependency,
        QueueFull,
        SpeederError,
        SpeederWarning,
        UnknownItem,
    )
    from speeder_engine.item import Item
    from speeder_engine.request import Generation, Ranking, Request
    from speeder_engine.serving import EngineStats
    from speeder_engine.session import Session

_HOMES = {
    "config": ("EngineConfig",),
    "engine": ("Engine",),
    "errors": (
        "ArtifactError",
        "CacheExhausted",
        "CatalogueFull",
        "ConfigError",
        "DataError",
        "DeadlineExceeded",
        "EngineClosed",
        "ExportError",
        "InvalidRequest",
        "MissingDependency",
        "QueueFull",
        "SpeederError",
        "SpeederWarning",
        "UnknownItem",
    ),
    "item": ("Item",),
    "request": ("Generation", "Ranking", "Request"),
    "serving": ("EngineStats",),
    "session": ("Session",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "ArtifactError",
    "CacheExhausted",
    "CatalogueFull",
    "ConfigError",
    "DataError",
    "DeadlineExceeded",
    "Engine",
    "EngineConfig",
    "EngineClosed",
    "EngineStats",
    "ExportError",
    "Generation",
    "InvalidRequest",
    "Item",
    "MissingDependency",
    "QueueFull",
    "Ranking",
    "Request",
    "Session",
    "SpeederError",
    "SpeederWarning",
    "UnknownItem",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'speeder_engine' has no attribute {name!r}")
    return getattr(import_module(f"speeder_engine.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
