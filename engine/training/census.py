"""What training has to do without, counted: one warning for each kind."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from speeder_engine.data.splits import Split
from speeder_engine.encoders.features import Features
from speeder_engine.errors import SpeederWarning, name_some


def warn_of_gaps(split: Split, features: Mapping[str, Features]) -> None:
    """Items without a modality that others have or without a training event, users with one, titles that several items
    share."""
    dataset = split.dataset
    names = np.array(dataset.item_ids, dtype=object)
    size = len(names)
    for modality, each in features.items():
        missing = names[~each.present]
        # a collaborative vector is missing where there is no event, which is said below
        if len(missing) and modality != "collaborative":
            _warn(f"{dataset.name}: {len(missing):,} of {size:,} items have no {modality} features", missing)
    unseen = names[np.bincount(split.train.rows, minlength=size) == 0]
    if len(unseen):
        message = f"{len(unseen):,} of {size:,} items have no training event and are known by their content alone"
        _warn(f"{dataset.name}: {message}", unseen)
    alone = np.array(dataset.user_ids, dtype=object)[split.train.lengths == 1]
    if len(alone):
        message = f"{len(alone):,} users have one training event, which counts as popularity and teaches nothing else"
        _warn(f"{dataset.name}: {message}", alone)
    titles = Counter(title for title in dataset.items.titles if title)
    shared = [title for title, count in titles.items() if count > 1]
    if shared:
        count = sum(titles[title] for title in shared)
        _warn(f"{dataset.name}: {count:,} items share {len(shared):,} titles; no title head tells them apart", shared)


def _warn(message: str, examples: Iterable[str]) -> None:
    warnings.warn(f"{message}: {name_some(examples)}", SpeederWarning, stacklevel=3)
