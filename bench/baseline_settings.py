"""Settings of baselines that a search has chosen on one data set: bench/results/baselines/DATA.json.

{"data": NAME, "fingerprint": SHA-256, "systems": {"itemknn": {"settings": {...}, "ndcg@10": ..., ...}, ...}}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speeder_engine.data.dataset import Dataset
from speeder_engine.errors import ConfigError
from speeder_engine.evaluation.baselines.item_knn import ItemKNNConfig
from speeder_engine.evaluation.baselines.sequence import SEQUENCE_MODELS
from speeder_engine.files import write_json

KINDS: dict[str, type] = {"itemknn": ItemKNNConfig} | {
    name: type(config) for name, (_, config) in SEQUENCE_MODELS.items()
}


def write_settings(path: Path, dataset: Dataset, systems: Mapping[str, Mapping[str, Any]]) -> None:
    """`systems`: of each the best run, with its `settings`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"data": dataset.name, "fingerprint": dataset.fingerprint(), "systems": dict(systems)})


def read_settings(path: Path, dataset: Dataset) -> dict[str, Any]:
    """The config of each system in the file. ConfigError for a file of other data, or one that isn't such a file."""
    try:
        found = json.loads(path.read_text())
        fingerprint, settings = found["fingerprint"], {name: run["settings"] for name, run in found["systems"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not settings of baselines ({error!r}); write them with tune_baselines.py"
        ) from error
    if fingerprint != dataset.fingerprint():
        raise ConfigError(
            f"{path}: chosen on other data ({found.get('data')}), not on {dataset.name}; search them there"
        )
    unknown = set(settings) - set(KINDS)
    if unknown:
        raise ConfigError(f"{path}: settings of {', '.join(sorted(unknown))}; only {', '.join(KINDS)} take some")
    try:
        return {name: KINDS[name](**each) for name, each in settings.items()}
    except TypeError as error:
        raise ConfigError(f"{path}: {error}; search again with tune_baselines.py") from error
