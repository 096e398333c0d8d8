"""What the study trains: the declared models, one change of them each, and data that is altered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from speeder_engine.config import MODALITIES
from speeder_engine.data.splits import Split
from speeder_engine.encoders.features import Features
from speeder_engine.runs import offsets_of
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.recipe import load_recipe, merged

DECLARED, WITH_TIME = "declared", "declared, with time"
LONG_WINDOW = "window of 200"
COLD_ITEMS = ("cold items", "cold items, modality dropout .5")
COLD_SHARE = 0.1
Alter = Callable[[Split, int], Split]  # with a seed
Stages = tuple[Stage, ...]


@dataclass(frozen=True)
class Variant:
    """`overrides` of a recipe as nested keys, or of its twin that knows the time; `alter` changes the training data.

    `restage` makes other stages of the recipe's own, as long as they are in all.
    """

    with_time: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    alter: Alter | None = None
    restage: Callable[[Stages], Stages] | None = None

    def config(self, recipe: str, seed: int) -> TrainingConfig:
        base = load_recipe(f"{recipe}-time" if self.with_time else recipe)
        if self.restage is not None:
            base = replace(base, stages=self.restage(base.stages))
        return TrainingConfig.from_json(merged(base.to_json(), {**self.overrides, "seed": seed}))

    def changes(self, recipe: str) -> bool:
        """Whether this is another run than the declared one of its class: a recipe may have a change already."""
        declared = VARIANTS[WITH_TIME if self.with_time else DECLARED]
        return self.alter is not None or self.config(recipe, 0) != declared.config(recipe, 0)


def only(*modalities: str) -> Callable[[Stages], Stages]:
    """All epochs with these, from the first step on."""

    def restage(stages: Stages) -> Stages:
        epochs, rate = sum(stage.epochs for stage in stages), max(stage.learning_rate for stage in stages)
        return (Stage("S1", modalities, epochs, rate),)

    return restage


def ordered(*modalities: str) -> Callable[[Stages], Stages]:
    """These in the place of text, the collaborative signal and the image."""
    instead = dict(zip(("text", "collaborative", "image"), modalities, strict=True))
    return lambda stages: tuple(
        replace(stage, modalities=tuple(instead[name] for name in stage.modalities)) for stage in stages
    )


def without_the_last(stages: Stages) -> Stages:
    """The last stage's epochs are the one's before, so that no modality comes in with them."""
    *first, before, last = stages
    return (*first, replace(before, epochs=before.epochs + last.epochs))


def without_ramp(stages: Stages) -> Stages:
    return tuple(replace(stage, ramp=0.0) for stage in stages)


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


VARIANTS: dict[str, Variant] = {
    DECLARED: Variant(),
    WITH_TIME: Variant(with_time=True),
    # MRC
    "concat": Variant(overrides={"mixing": "concat"}),
    "mean": Variant(overrides={"mixing": "mean"}),
    "text alone": Variant(restage=only("text")),
    "collaborative alone": Variant(restage=only("collaborative")),
    "image alone": Variant(restage=only("image")),
    "no image": Variant(restage=without_the_last),
    "no modality dropout": Variant(overrides={"modality_dropout": 0.0}),
    # MPO
    "all at once": Variant(restage=only(*MODALITIES)),
    "image before collaborative": Variant(restage=ordered("text", "image", "collaborative")),
    "collaborative before text": Variant(restage=ordered("collaborative", "text", "image")),
    "no ramp": Variant(restage=without_ramp),
    # SPAE and times
    "no positions": Variant(overrides={"positions": "none"}),
    "position tokens": Variant(overrides={"positions": "token"}),
    "with the order task": Variant(overrides={"order_weight": 0.1}),
    "order task, no positions": Variant(overrides={"order_weight": 0.1, "positions": "none"}),
    "no times": Variant(overrides={"calendar_days": 0}),
    "times in weeks": Variant(overrides={"calendar_days": 7}),
    # a fourth of the segments, each four times as long: as many events a batch
    LONG_WINDOW: Variant(overrides={"window": 200, "batch_size": 8}),
    # the collaborative signal
    "no neighbours": Variant(overrides={"collaborative": {"neighbours": 0}}),
    "no followers": Variant(overrides={"followers": None}),
    "no followers, with time": Variant(with_time=True, overrides={"followers": None}),
    "followers one way": Variant(overrides={"followers": {"forward": True}}),
    "followers both ways": Variant(overrides={"followers": {"forward": False}}),
    "neither neighbours nor followers": Variant(overrides={"followers": None, "collaborative": {"neighbours": 0}}),
    "tuned item vectors": Variant(overrides={"collaborative": {"tune": True}}),
    # what is weighed last
    "calibrated": Variant(overrides={"calibrate": True}),
    "calibrated, with time": Variant(with_time=True, overrides={"calibrate": True}),
    "not calibrated, with time": Variant(with_time=True, overrides={"calibrate": False}),
    # heads
    "with the rank head": Variant(overrides={"rank_weight": 0.3, "heads": {"rank": True}}),
    "no prior": Variant(overrides={"heads": {"prior": False}}),
    # controls
    "shuffled images": Variant(alter=shuffled_images),
    "noise images": Variant(alter=noise_images),
    COLD_ITEMS[0]: Variant(overrides={"cold_negatives": False}, alter=without_cold_items),
    COLD_ITEMS[1]: Variant(overrides={"cold_negatives": False, "modality_dropout": 0.5}, alter=without_cold_items),
}
