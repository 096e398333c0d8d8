"""Settings changed by dotted keys: `collaborative.epochs=3`, `stages.0.learning_rate=1e-3`; values are YAML."""

import json
from collections.abc import Iterable
from typing import Any

from speeder_engine.errors import ConfigError, MissingDependency
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.recipe import numbered


def override(config: TrainingConfig, changes: Iterable[str]) -> TrainingConfig:
    """`config` with each `key=value` applied in order; ConfigError names the one that doesn't fit."""
    settings = json.loads(json.dumps(config.to_json()))  # so that tuples are lists, whose entries can be set
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {change}: write KEY=VALUE, for example collaborative.epochs=3")
        _put(settings, key.strip().split("."), _value(change, text), change)
    return TrainingConfig.from_json(settings)


def _value(change: str, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingDependency("pyyaml", "train", "--set") from None
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter: no such number or date
        raise ConfigError(f"--set {change}: no valid YAML: {' '.join(str(error).split())}") from None
    return numbered(value)


def _put(settings: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    inner: Any = settings
    for depth, part in enumerate(path[:-1]):
        inner = inner[_key(inner, part, path[:depth], change)]
    inner[_key(inner, path[-1], path[:-1], change)] = value


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
