"""Settings changed by dotted keys: `collaborative.epochs=3`, `stages.0.learning_rate=1e-3`; values are YAML."""

import json
from collections.abc import Iterable
from typing import Any

from speeder_engine.errors import ConfigError
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.yaml_text import read_yaml


def override(config: TrainingConfig, changes: Iterable[str]) -> TrainingConfig:
    """`config` with each `key=value` applied in order; ConfigError names the one that doesn't fit."""
    settings = json.loads(json.dumps(config.to_json()))  # so that tuples are lists, whose entries can be set
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {change}: write KEY=VALUE, for example collaborative.epochs=3")
        _put(settings, key.strip().split("."), read_yaml(text, f"--set {change}", "--set"), change)
    return TrainingConfig.from_json(settings)


def _put(settings: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    inner: Any = settings
    for depth, part in enumerate(path[:-1]):
        key = _key(inner, part, path[:depth], change)
        if inner[key] is None:  # a section that is off: what it lacks has defaults
            inner[key] = {}
        inner = inner[key]
    whole = isinstance(inner, dict) and len(path) > 1  # a section, which knows its keys, those too that aren't given
    inner[path[-1] if whole else _key(inner, path[-1], path[:-1], change)] = value


def _key(inner: Any, part: str, before: list[str], change: str) -> Any:
    """`part` as a key of a mapping or an index of a list."""
    where = ".".join(before) or "the recipe"
    if isinstance(inner, dict):
        if part not in inner:
            raise ConfigError(f"--set {change}: {where} has no {part!r}; it has {', '.join(inner)}")
        return part
    if isinstance(inner, list):
        if part not in [str(index) for index in range(len(inner))]:
            raise ConfigError(f"--set {change}: {where} has entries 0 to {len(inner) - 1}, not {part!r}")
        return int(part)
    raise ConfigError(f"--set {change}: {where} is {inner!r} and has no keys")
