"""S0: every item's frozen modality vectors: the user's own where the data brings them, encoded and cached otherwise."""

import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.splits import Split
from speeder_engine.encoders.base import Encoder
from speeder_engine.encoders.cache import FeatureCache
from speeder_engine.encoders.choose import choose_image_encoder, choose_text_encoder
from speeder_engine.encoders.collaborative import fit_collaborative
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.neighbours import fit_neighbours
from speeder_engine.encoders.sasrec import SASRecConfig
from speeder_engine.errors import ConfigError, DataError, SpeederWarning
from speeder_engine.training.config import TrainingConfig

log = logging.getLogger("speeder_engine")


@dataclass(frozen=True)
class ItemFeatures:
    """Features by modality, and the encoders that can make more (none for vectors the user brought)."""

    features: dict[str, Features]
    encoders: dict[str, Encoder]


def make_features(split: Split, config: TrainingConfig, cache_dir: Path) -> ItemFeatures:
    """Of the modalities that `config` uses; one that no item has is left out with a warning."""
    dataset = split.dataset
    made = ItemFeatures({}, {})
    for name in config.modalities:
        if name in dataset.items.vectors:
            log.info("%s: vectors that came with the data", name)
            made.features[name] = dataset.items.vectors[name]
        elif name == "collaborative":
            made.features[name] = _collaborative(split, config, cache_dir)
        else:
            _encode(name, dataset, config, cache_dir, made)
        if name in made.features and not made.features[name].present.any():
            del made.features[name]
        if name not in made.features:
            warnings.warn(f"{dataset.name}: no item has {name} features; trained without", SpeederWarning, stacklevel=2)
    if not made.features:
        raise ConfigError(
            f"{dataset.name}: none of {', '.join(config.modalities)} is there; add texts, images or vectors"
        )
    return made


def _encode(name: str, dataset: Dataset, config: TrainingConfig, cache_dir: Path, made: ItemFeatures) -> None:
    """Text or image: chooses the encoder, encodes what the cache on disk doesn't have."""
    items = dataset.items
    encoder: Encoder
    if name == "text":
        if not any(items.texts):
            return
        inputs: list[str | bytes | None] = list(items.texts)
        encoder = choose_text_encoder(config.text_encoder, items.texts)
    else:
        if items.images is None:
            return
        images = read_images(dataset)
        inputs = list(images)
        encoder = choose_image_encoder(config.image_encoder, images)
    made.features[name] = FeatureCache(cache_dir).encode(encoder, inputs, names=items.item_ids)
    made.encoders[name] = encoder


def read_images(dataset: Dataset) -> list[bytes | None]:
    """The images' bytes; one that can't be read out of its archive is missing, and counted."""
    items = dataset.items
    assert items.images is not None
    images: list[bytes | None] = []
    damaged: list[DataError] = []
    for item_id in items.item_ids:
        try:
            images.append(items.images.read(item_id))
        except DataError as error:
            images.append(None)
            damaged.append(error)
    if damaged:
        message = f"{dataset.name}: {len(damaged):,} of {len(images):,} images can't be read; the first: {damaged[0]}"
        warnings.warn(message, SpeederWarning, stacklevel=4)
    return images


def _collaborative(split: Split, config: TrainingConfig, cache_dir: Path) -> Features:
    """Fitted on the training events, or read from what an earlier run with the same settings and events left."""
    path = cache_dir / f"collaborative-{_collaborative_key(split, config)}.safetensors"
    if path.is_file():
        return Features.load(path)
    wanted, train, num_items = config.collaborative, split.train, split.dataset.num_items
    sasrec = SASRecConfig(
        dim=wanted.dim,
        window=config.window,
        epochs=wanted.epochs,
        dropout=wanted.dropout,
        learning_rate=wanted.learning_rate,
        seed=config.seed,
    )
    features = fit_collaborative(train.offsets, train.rows, num_items, sasrec)
    if wanted.neighbours:
        rank = min(wanted.neighbours, num_items)
        if rank < wanted.neighbours:
            message = (
                f"collaborative.neighbours: {num_items} items have no more than {rank} factors, not {wanted.neighbours}"
            )
            warnings.warn(f"{split.dataset.name}: {message}", SpeederWarning, stacklevel=2)
        factors = fit_neighbours(train.offsets, train.rows, num_items, rank, config.seed)
        spread = max(float(features.values[features.present].std()), 1e-12)
        both = np.concatenate([features.values / spread, factors.values], axis=1)
        features = Features(both.astype(np.float32), features.present)
    features.save(path)
    return features


def _collaborative_key(split: Split, config: TrainingConfig) -> str:
    """Of the events, row by row, and of all settings that the vectors depend on."""
    settings = {**config.collaborative.to_json(), "window": config.window, "seed": config.seed, "tune": None}
    told = json.dumps([settings, split.dataset.num_items, "1"], sort_keys=True).encode()
    events = split.train.offsets.tobytes() + split.train.rows.tobytes()
    return hashlib.sha256(told + events).hexdigest()[:32]
