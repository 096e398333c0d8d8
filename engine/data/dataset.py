"""Dataset: a catalogue and every user's history in it, read from a folder, cleaned and counted. Draws no splits."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.columns import Columns
from speeder_engine.data.core import k_core
from speeder_engine.data.events import sorted_events
from speeder_engine.data.folder import DatasetFolder, find_files
from speeder_engine.data.images import open_images
from speeder_engine.data.interactions import Interactions, read_interactions
from speeder_engine.data.items import Items, read_items
from speeder_engine.data.vectors import read_vectors
from speeder_engine.errors import DataError, SpeederWarning, shown
from speeder_engine.runs import Runs, offsets_of, ranges


@dataclass(frozen=True, eq=False)
class Dataset(Runs):
    """User u's events are `rows[offsets[u]:offsets[u + 1]]`, item rows of `items`, oldest first.

    `offsets` int64 [U + 1], `rows` int32 [N], `times` int64 [N] Unix seconds, or None where the data has no time and
    the order of the file counts. `notes` say what was left out, and why.
    """

    name: str
    items: Items
    user_ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    times: NDArray[np.int64] | None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_runs(self.name)
        if len(self.user_ids) != self.num_users:
            raise DataError(f"{self.name}: {len(self.user_ids)} user ids but {self.num_users} histories")
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < len(self.items):
            raise DataError(f"{self.name}: an item row is not within the {len(self.items)} items")

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def item_ids(self) -> tuple[str, ...]:
        return self.items.item_ids

    def fingerprint(self) -> str:
        """SHA-256 of who took what in which order and of the item ids; blind to the order of users and of items."""
        items, users = np.argsort(np.array(self.item_ids)), np.argsort(np.array(self.user_ids))
        place = np.empty(len(items), np.int32)
        place[items] = np.arange(len(items))
        events = ranges(self.offsets[users], self.offsets[users + 1])
        names = json.dumps([sorted(self.item_ids), sorted(self.user_ids), self.lengths[users].tolist()])
        return hashlib.sha256(names.encode() + place[self.rows[events]].tobytes()).hexdigest()

    def summary(self) -> str:
        """What is in it, a line each for events, time, content and every note."""
        lengths, items = self.lengths, self.items
        imaged = sum(item_id in items.images for item_id in items.item_ids) if items.images else 0
        content = [f"text for {sum(map(bool, items.texts)):,}", f"images for {imaged:,}"]
        content += [f"{name} vectors for {int(each.present.sum()):,}" for name, each in items.vectors.items()]
        lines = [
            f"{self.name}: {self.num_users:,} users, {self.num_items:,} items, {self.num_interactions:,} interactions"
            f" (median {np.median(lengths):.0f}, mean {lengths.mean():.1f}, at most {lengths.max():,} a user)",
            f"  {self._span()}; {', '.join(content)} of {self.num_items:,} items",
        ]
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _span(self) -> str:
        if self.times is None:
            return "no times, the order of the file"
        first, last = (datetime.fromtimestamp(int(time), UTC) for time in (self.times.min(), self.times.max()))
        return f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"


def load_dataset(
    path: Path | str,
    *,
    columns: Columns | None = None,
    min_interactions: int = 5,
    keep_all_items: bool = False,
    interactions: Path | str | None = None,
    items: Path | str | None = None,
    images: Path | str | None = None,
) -> Dataset:
    """Reads a folder whose files are found by their names (`find_files`), or taken as given.

    `min_interactions` is the k of the k-core, users and items both, 0 for none; `keep_all_items` keeps items that fall
    out of it (and have no events any more) in the catalogue. Everything skipped is one counted SpeederWarning a kind.
    """
    if not isinstance(path, str | Path):
        raise DataError(f"load_dataset: the path of a folder is needed, not {shown(path)}")
    folder = Path(path)
    given = [None if each is None else Path(each) for each in (interactions, items, images)]
    files = find_files(folder, *given)
    with _noting() as notes:
        catalogue = _read_catalogue(files, columns)
        events = read_interactions(files.interactions, columns)
        dataset = build_dataset(folder.resolve().name, events, catalogue, min_interactions, keep_all_items)
    return replace(dataset, notes=(*notes, *dataset.notes))


def build_dataset(
    name: str, interactions: Interactions, items: Items, min_interactions: int = 5, keep_all_items: bool = False
) -> Dataset:
    """Sorts events by user and time, stable: equal times keep the order of the file. Users stand as they first appear.

    Left out: events of unknown items (DataError where no item is known) and repetitions of the same user, item and
    time, each with one counted warning, then what is not in the k-core. Without times nothing counts as repeated.
    """
    events = sorted_events(name, interactions, items)
    core = k_core(events.users, events.rows, min_interactions)
    if not core.any():
        raise DataError(
            f"{name}: no users and items with {min_interactions} interactions each; "
            "lower --min-interactions, in Python min_interactions"
        )
    kept = events.take(core)
    counts = np.bincount(kept.users, minlength=len(interactions.users.names))
    user_ids = tuple(user_id for user_id, count in zip(interactions.users.names, counts, strict=True) if count)
    rows, catalogue = kept.rows, items
    if min_interactions > 0 and not keep_all_items:
        taken = np.bincount(rows, minlength=len(items)) > 0
        catalogue, rows = items.take(np.flatnonzero(taken)), (np.cumsum(taken) - 1)[rows].astype(np.int32)
    lost = (events.num_users - len(user_ids), len(items) - len(catalogue), len(core) - len(rows))
    what = f"{min_interactions}-core: {lost[0]:,} users, {lost[1]:,} items and {lost[2]:,} interactions left out"
    notes = (what,) if any(lost) else ()
    return Dataset(name, catalogue, user_ids, offsets_of(counts[counts > 0]), rows, kept.times, notes)


def _read_catalogue(files: DatasetFolder, columns: Columns | None) -> Items:
    items = read_items(files.items, columns)
    vectors = {modality: read_vectors(path, items.item_ids, columns) for modality, path in files.vectors.items()}
    if files.images is not None and items.images is not None:
        raise DataError(f"{files.items}: it has images, and {files.images.name} is there too; keep one")
    images = open_images(files.images, columns) if files.images is not None else items.images
    return replace(items, images=images, vectors=vectors)


@contextmanager
def _noting() -> Iterator[list[str]]:
    """Collects the warnings given inside as notes, and gives them on afterwards."""
    notes: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield notes
    finally:  # what led to an error is told with it
        for each in caught:
            if issubclass(each.category, SpeederWarning):
                notes.append(str(each.message))
            warnings.warn(each.message, stacklevel=4)
