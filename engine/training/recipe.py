"""Recipes: YAML files of the keys of `TrainingConfig`, packaged or a user's own; one may extend another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speeder_engine.checks import given_path
from speeder_engine.errors import ConfigError, shown
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.yaml_text import read_yaml

RECIPES = Path(__file__).parent / "recipes"
EXTENDS = "extends"  # the key that names the recipe whose settings these are laid over


def load_recipe(name_or_path: str | Path) -> TrainingConfig:
    """A packaged recipe by name ("demo") or a YAML file by path.

    `extends: small` in a file lays its other keys over that recipe, mappings key by key and lists as wholes; a path
    there is relative to the file. Raises ConfigError for what is no recipe.
    """
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(f"recipe: give a packaged one's name or a YAML file's path, not {shown(name_or_path)}")
    settings = _settings(name_or_path, Path(), ())
    try:
        return TrainingConfig.from_json(settings)
    except ConfigError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from None


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of nested settings key by key; lists are replaced."""
    found = dict(settings)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if inner else value
    return found


def _settings(name_or_path: str | Path, folder: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's settings with those it extends; `extending`: the files that led here."""
    is_path = bool(Path(name_or_path).suffix) or Path(name_or_path).name != str(name_or_path)
    path = folder / name_or_path if is_path else RECIPES / f"{name_or_path}.yaml"
    led = f"recipe {extending[-1]}: {EXTENDS}: " if extending else "recipe "
    if not given_path(path, led.strip(" :"), "a YAML file").is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{led}{name_or_path}: no such file; packaged recipes are {known}")
    if path.resolve() in extending:
        raise ConfigError(f"{led}{name_or_path}: extends itself; leave {EXTENDS} out of one of them")
    settings = _read(path)
    if not isinstance(settings, dict):
        raise ConfigError(f"recipe {path}: expected keys and their values, got {shown(settings)}")
    if EXTENDS not in settings:
        return settings
    base = settings.pop(EXTENDS)
    if not isinstance(base, str):
        raise ConfigError(f"recipe {path}: {EXTENDS}: name one packaged recipe or YAML file, not {shown(base)}")
    return merged(_settings(base, path.parent, (*extending, path.resolve())), settings)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise ConfigError(f"recipe {path}: no valid YAML: {error}") from None
    return read_yaml(text, f"recipe {path}", "reading recipes") or {}
