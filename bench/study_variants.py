"""What the study trains: the declared models, one change of them each, and data that is altered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from speeder_engine.config import MODALITIES
from speeder_engine.data.splits import Split
from speeder_engine.encoders.features import Features
from speeder_engine.runs import offsets_of
from speeder_engine.training.config import TrainingConfig, load_recipe

DECLARED, WITH_TIME = "declared", "declared, with time"
LONG_WINDOW = "window of 200"
COLD_ITEMS = ("cold items", "cold items, modality dropout .5")
COLD_SHARE = 0.1
Alter = Callable[[Split, int], Split]  # with a seed


@dataclass(frozen=True)
class Variant:
    """`overrides` of a recipe as nested keys, or of its twin that knows the time; `alter` changes the training data."""

    with_time: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    alter: Alter | None = None

    def config(self, recipe: str, seed: int) -> TrainingConfig:
        base = load_recipe(f"{recipe}-time" if self.with_time else recipe)
        return TrainingConfig.from_json(merged(base.to_json(), {**self.overrides, "seed": seed}))


def merged(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of nested settings key by key; lists are replaced."""
    found = dict(settings)
    for key, value in overrides.items():
        inner = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if inner else value
    return found


def stages(*steps: tuple[str, int, float], rate: float = 0.002) -> dict[str, Any]:
    """Steps of ("text+collaborative", epochs, ramp)."""
    made = [
        {"name": f"S{i}", "modalities": names.split("+"), "epochs": epochs, "learning_rate": rate, "ramp": ramp}
        for i, (names, epochs, ramp) in enumerate(steps, 1)
    ]
    return {"stages": made}


def shuffled_images(split: Split, seed: int) -> Split:
    """Every item has the picture of another."""
    images = split.dataset.items.vectors["image"]
    order = np.random.default_rng(seed).permutation(len(images))
    return with_vectors(split, "image", images.take(order))


def noise_images(split: Split, seed: int) -> Split:
    images = split.dataset.items.vectors["image"]
    noise = np.random.default_rng(seed).normal(size=images.values.shape) * images.values.std()
    return with_vectors(split, "image", Features.of_present(noise.astype(np.float32)[images.present], images.present))


def with_vectors(split: Split, name: str, features: Features) -> Split:
    items = split.dataset.items
    vectors = {**items.vectors, name: features}
    return replace(split, dataset=replace(split.dataset, items=replace(items, vectors=vectors)))


def cold_items(num_items: int, seed: int = 0) -> np.ndarray:
    """Rows of the items that are held out of training."""
    return np.sort(np.random.default_rng(seed).permutation(num_items)[: round(COLD_SHARE * num_items)])


def without_cold_items(split: Split, seed: int) -> Split:
    """Training histories without the events of a tenth of all items: these are known by text and image alone."""
    train = split.train
    kept = ~np.isin(train.rows, cold_items(split.dataset.num_items))
    users = np.repeat(np.arange(train.num_users), train.lengths)[kept]
    lengths = np.bincount(users, minlength=train.num_users)
    times = None if train.times is None else train.times[kept]
    return replace(split, train=replace(train, offsets=offsets_of(lengths), rows=train.rows[kept], times=times))


EPOCHS = 15  # of the declared recipe, over all stages
ALL = "+".join(MODALITIES)
VARIANTS: dict[str, Variant] = {
    DECLARED: Variant(),
    WITH_TIME: Variant(with_time=True),
    # MRC
    "concat": Variant(overrides={"mixing": "concat"}),
    "mean": Variant(overrides={"mixing": "mean"}),
    "text alone": Variant(overrides=stages(("text", EPOCHS, 0.0))),
    "collaborative alone": Variant(overrides=stages(("collaborative", EPOCHS, 0.0))),
    "image alone": Variant(overrides=stages(("image", EPOCHS, 0.0))),
    "no image": Variant(overrides=stages(("text", 1, 0.0), ("text+collaborative", EPOCHS - 1, 0.3))),
    "no modality dropout": Variant(overrides={"modality_dropout": 0.0}),
    # MPO
    "all at once": Variant(overrides=stages((ALL, EPOCHS, 0.0))),
    "image before collaborative": Variant(
        overrides=stages(("text", 1, 0.0), ("text+image", 6, 0.3), ("text+image+collaborative", 8, 0.2))
    ),
    "collaborative before text": Variant(
        overrides=stages(
            ("collaborative", 1, 0.0), ("collaborative+text", 6, 0.3), ("collaborative+text+image", 8, 0.2)
        )
    ),
    "no ramp": Variant(
        overrides=stages(("text", 1, 0.0), ("text+collaborative", 6, 0.0), ("text+collaborative+image", 8, 0.0))
    ),
    # SPAE and times
    "no positions": Variant(overrides={"positions": "none"}),
    "position tokens": Variant(overrides={"positions": "token"}),
    "with the order task": Variant(overrides={"order_weight": 0.1}),
    "order task, no positions": Variant(overrides={"order_weight": 0.1, "positions": "none"}),
    "no times": Variant(overrides={"calendar_days": 0}),
    # a fourth of the segments, each four times as long: as many events a batch
    LONG_WINDOW: Variant(overrides={"window": 200, "batch_size": 8}),
    # the collaborative signal
    "no neighbours": Variant(overrides={"collaborative": {"neighbours": 0}}),
    "no followers": Variant(overrides={"followers": None}),
    "no followers, with time": Variant(with_time=True, overrides={"followers": None}),
    "neither neighbours nor followers": Variant(overrides={"followers": None, "collaborative": {"neighbours": 0}}),
    "tuned item vectors": Variant(overrides={"collaborative": {"tune": True}}),
    # heads
    "with the rank head": Variant(overrides={"rank_weight": 0.3, "heads": {"rank": True}}),
    "no prior": Variant(overrides={"heads": {"prior": False}}),
    # controls
    "shuffled images": Variant(alter=shuffled_images),
    "noise images": Variant(alter=noise_images),
    COLD_ITEMS[0]: Variant(overrides={"cold_negatives": False}, alter=without_cold_items),
    COLD_ITEMS[1]: Variant(overrides={"cold_negatives": False, "modality_dropout": 0.5}, alter=without_cold_items),
}
