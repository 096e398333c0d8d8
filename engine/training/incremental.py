"""A finished model goes on with new interactions and new items: its weights stay, its catalogue grows.

Text and images are encoded by the checkpoint's own encoders. Collaborative vectors of known items stay where they are
(the model has learned to read that space, and may have tuned them); new items that have events are fitted into it.
"""

import warnings
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from speeder_engine.catalogue import ItemTable
from speeder_engine.checkpoint import Checkpoint, TrainingState
from speeder_engine.config import ModelConfig
from speeder_engine.data.splits import Split
from speeder_engine.encoders.cache import FeatureCache
from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.neighbours import fold_in
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence_fit import fit_sequence_model
from speeder_engine.errors import ConfigError, DataError, SpeederWarning
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.features import read_images
from speeder_engine.training.follower_counts import follower_table
from speeder_engine.training.trained_on import trained_on

# what the weights and the item vectors were made for
SHAPE = (
    "instruction",
    "question",
    "text_encoder",
    "image_encoder",
    "collaborative.dim",
    "collaborative.neighbours",
    "window",
    "window_step",
    "backbone",
    "mixing",
    "positions",
    "calendar_days",
    "heads",
    "live_prior",
    "followers",
)


def recipe_to_continue(previous: Checkpoint) -> TrainingConfig:
    """The checkpoint's own recipe: of its last stage a third of the epochs, everything brought in from the start.

    The last that was trained: one whose modalities no item had was left out.
    """
    config, had = TrainingConfig.from_json(previous.training["config"]), set(previous.model.compressor.modalities)
    last = next(stage for stage in reversed(config.trained_stages) if had.intersection(stage.modalities))
    return replace(config, stages=(replace(last, epochs=max(1, last.epochs // 3), ramp=0.0),))


def continued_checkpoint(
    previous: Checkpoint, split: Split, config: TrainingConfig, prior: NDArray[np.float32], cache_dir: Path
) -> Checkpoint:
    """`previous` over the items of `split`, with `prior` [I]; untrained on what is new. ConfigError where the recipe
    wants another model."""
    trained = TrainingConfig.from_json(previous.training["config"])
    for name in SHAPE:
        if attrgetter(name)(trained) != attrgetter(name)(config):
            raise ConfigError(f"--start-from: the checkpoint was made with another {name}; keep its recipe's")
    items = split.dataset.items
    names = previous.model.compressor.modalities
    return Checkpoint(
        model=grown_model(previous.model, split),
        tokenizer=previous.tokenizer,
        table=ItemTable.fresh(items.item_ids, items.titles, prior),
        features={name: _features(name, previous, split, config, cache_dir) for name in names},
        encoders=previous.encoders,
        training=trained_on(split, config),
        state=TrainingState(),
    )


def grown_model(model: Recommender, split: Split) -> Recommender:
    """The same weights; a calendar reaches to the last training event, who follows whom is counted anew."""
    if model.followers is not None:
        weights = model.followers.weights
        model.followers = follower_table(model.followers.config, split.train, split.dataset.num_items)
        model.followers.weights = weights
        model.config = replace(model.config, followers=model.followers.config)
    calendar, times = model.config.prompt.calendar, split.train.times
    if calendar is None or model.times is None:
        return model
    if times is None:
        raise DataError(f"{split.dataset.name}: the checkpoint reads times; give a time column")
    before = int((times < calendar.first_second).sum())
    if before:
        message = (
            f"{before:,} of {len(times):,} interactions are older than the checkpoint's calendar: as its first bucket"
        )
        warnings.warn(
            f"{split.dataset.name}: {message}; train anew for one that holds them", SpeederWarning, stacklevel=2
        )
    needed = (int(times.max()) - calendar.first_second) // calendar.bucket_seconds + 1
    if needed <= calendar.num_buckets:
        return model
    prompt = replace(model.config.prompt, calendar=replace(calendar, num_buckets=needed))
    config: ModelConfig = replace(model.config, prompt=prompt)
    grown, state = Recommender(config, model.backbone), model.own_state()
    # until now later times were read as the last bucket
    rows = state["times.weight"]
    state["times.weight"] = torch.cat([rows, rows[-1:].expand(needed - calendar.num_buckets, -1)])
    grown.load_state_dict(state, strict=False)
    return grown


def _features(name: str, previous: Checkpoint, split: Split, config: TrainingConfig, cache_dir: Path) -> Features:
    items = split.dataset.items
    kept = carried(previous.features[name], previous.table.item_ids, items.item_ids)
    given = items.vectors.get(name)
    if name == "collaborative":
        if given is None:
            return fit_new_items(split, kept, config)
        tuned = TrainingConfig.from_json(previous.training["config"]).collaborative.tune
        return overlaid(given, kept, name) if tuned else overlaid(kept, given, name)
    if given is None and name in previous.encoders:
        inputs: list[str | bytes | None] = list(items.texts) if name == "text" else []
        if name == "image" and items.images is not None:
            inputs = list(read_images(split.dataset))
        if inputs:
            given = FeatureCache(cache_dir).encode(previous.encoders[name], inputs, names=items.item_ids)
    return kept if given is None else overlaid(kept, given, name)


def carried(features: Features, old_ids: tuple[str, ...], new_ids: tuple[str, ...]) -> Features:
    """The same items' vectors in the order of `new_ids`; an item that wasn't there is not present."""
    row_of = {item_id: row for row, item_id in enumerate(old_ids)}
    rows = np.array([row_of.get(item_id, -1) for item_id in new_ids])
    present = (rows >= 0) & features.present[rows]
    return Features.of_present(features.values[rows[present]], present)


def overlaid(under: Features, over: Features, modality: str = "collaborative") -> Features:
    """`over` where it has a vector, else `under`; ConfigError where their widths differ."""
    if under.dim != over.dim:
        widths = f"{over.dim} and {under.dim} numbers"
        raise ConfigError(f"--start-from: {modality} vectors of {widths}, the data's and the checkpoint's; train anew")
    values = np.where(over.present[:, None], over.values, under.values)
    return Features(values, over.present | under.present)


def fit_new_items(split: Split, known: Features, config: TrainingConfig) -> Features:
    """Vectors for the items with events that have none, fitted to the known ones, which stand still."""
    train, wanted = split.train, config.collaborative
    new = (np.bincount(train.rows, minlength=len(known)) > 0) & ~known.present
    if not new.any():
        return known
    # vectors that came with the data hold no factors, whatever the recipe says
    if not wanted.neighbours or known.dim != wanted.dim + 2 * wanted.neighbours:
        return overlaid(known, _fitted_by_sasrec(split, known, new, config))
    learned, factors = np.split(known.values, [wanted.dim], axis=1)
    # beside factors they have unit variance; a SASRec learns new ones at the spread that its own begin with
    spread = np.float32(wanted.dim**-0.5 / max(float(learned[known.present].std()), 1e-12))
    beside = _fitted_by_sasrec(split, Features(learned * spread, known.present), new, config)
    folded = fold_in(train.offsets, train.rows, Features(factors, known.present), new)
    return overlaid(known, Features(np.concatenate([beside.values / spread, folded.values], axis=1), new))


def _fitted_by_sasrec(split: Split, known: Features, new: Flags, config: TrainingConfig) -> Features:
    """Of the `new` items, learned as item embeddings of a SASRec between the known ones."""
    wanted = config.collaborative
    shape = SASRecConfig(
        dim=known.dim,
        num_heads=1 if known.dim % 2 else 2,
        window=config.window,
        epochs=wanted.epochs,
        dropout=wanted.dropout,
        learning_rate=wanted.learning_rate,
        seed=config.seed,
    )

    class AnchoredSASRec(SASRec):
        def __init__(self, num_items: int, config: SASRecConfig) -> None:
            super().__init__(num_items, config)
            parametrize.register_parametrization(self.items, "weight", Anchored(known))

    title = f"collaborative vectors of {int(new.sum()):,} new items"
    train = split.train
    model = fit_sequence_model(AnchoredSASRec, shape, train.offsets, train.rows, len(known), title=title)
    return Features.of_present(model.items.weight.detach().numpy()[new], new)


class Anchored(nn.Module):
    """Rows of a matrix that are fixed, whatever is learned."""

    values: Tensor
    present: Tensor

    def __init__(self, known: Features) -> None:
        super().__init__()
        self.register_buffer("values", torch.from_numpy(known.values))
        self.register_buffer("present", torch.from_numpy(known.present).unsqueeze(1))

    def forward(self, learned: Tensor) -> Tensor:
        return torch.where(self.present, self.values, learned)
