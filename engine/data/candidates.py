"""Frozen candidate lists: one target among uniform negatives, drawn once and kept on disk. Scores nothing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.splits import Queries
from speeder_engine.data.tables import reading
from speeder_engine.errors import ConfigError, DataError, name_some
from speeder_engine.files import write_atomic
from speeder_engine.progress import track

FORMAT = "speeder candidate lists 1"
BAR_FROM_QUERIES = 50_000
FEWER = "draw fewer (--negatives, in Python num_negatives)"


@dataclass(frozen=True, eq=False)
class CandidateLists:
    """List q is `rows[q]` int32 [Q, C] item rows for user `users[q]`; the target stands in slot `target_slot[q]`."""

    rows: NDArray[np.int32]
    target_slot: NDArray[np.int32]
    users: NDArray[np.int32]
    seed: int

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not len(self.rows) == len(self.target_slot) == len(self.users):
            raise DataError("candidates: rows [Q, C], target_slot [Q] and users [Q] don't fit one another")
        if len(self) and not 0 <= self.target_slot.min() <= self.target_slot.max() < self.rows.shape[1]:
            raise DataError(f"candidates: a target slot is not within the {self.rows.shape[1]} of a list")
        ordered = np.sort(self.rows, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise DataError("candidates: an item stands twice in one list")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_negatives(self) -> int:
        return int(self.rows.shape[1]) - 1

    @property
    def targets(self) -> NDArray[np.int32]:
        """int32 [Q], the item row of each target."""
        return self.rows[np.arange(len(self)), self.target_slot]

    def take(self, lists: NDArray[np.integer[Any]]) -> "CandidateLists":
        return CandidateLists(self.rows[lists], self.target_slot[lists], self.users[lists], self.seed)

    def save(self, path: Path | str, dataset: Dataset) -> None:
        """Parquet with user and item ids as strings, so that it stays right when the data is read again."""
        ids = np.array(dataset.item_ids, dtype=object)[self.rows]
        table = pa.table(
            {
                "user_id": [dataset.user_ids[user] for user in self.users],
                "item_ids": pa.array(ids.tolist(), pa.list_(pa.string())),
                "target_slot": self.target_slot,
            }
        )
        facts = {"format": FORMAT, "seed": str(self.seed), "dataset": dataset.fingerprint()}
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(facts), sink)
        write_atomic(Path(path), sink.getvalue().to_pybytes())


def draw_candidates(dataset: Dataset, queries: Queries, *, num_negatives: int = 19, seed: int = 0) -> CandidateLists:
    """Negatives uniform, without replacement, among the items the user never took, and a uniform slot for the target.

    A list's generator is keyed by (seed, user id): neither the target, nor the part, nor the other users can move it.
    DataError where a user leaves too few items.
    """
    if num_negatives < 1 or seed < 0:
        raise ConfigError(
            f"num_negatives={num_negatives}, seed={seed}: at least 1 negative and a seed from 0 are needed"
        )
    if not len(queries):
        raise DataError(f"{dataset.name}: no queries to draw for; a user needs three interactions to have one")
    if num_negatives >= dataset.num_items:
        raise DataError(f"{dataset.name}: {num_negatives} negatives of {dataset.num_items} items; {FEWER}")
    rows = np.empty((len(queries), num_negatives + 1), np.int32)
    slots = np.empty(len(queries), np.int32)
    numbers = range(len(queries))
    for query in track(numbers, "drawing candidates") if len(queries) >= BAR_FROM_QUERIES else numbers:
        user = int(queries.users[query])
        generator = _generator(seed, dataset.user_ids[user])
        negatives = _draw_unseen(generator, np.unique(dataset.history(user)), dataset, num_negatives, user)
        slots[query] = generator.integers(num_negatives + 1)
        rows[query] = np.insert(negatives, slots[query], queries.targets[query])
    return CandidateLists(rows, slots, queries.users, seed)


def load_candidates(path: Path | str, dataset: Dataset) -> CandidateLists:
    """The lists of a file written by `save`; a DataError where it is no such file or was made for other data."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; frozen_candidates draws the lists and writes it")
    with reading(path):
        table = pq.read_table(path)
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if facts.get("format") != FORMAT:
        raise DataError(f"{path}: not a file of candidate lists ({FORMAT})")
    if facts["dataset"] != dataset.fingerprint():
        raise DataError(f"{path}: these candidate lists were made for other data than {dataset.name}; draw new ones")
    items, slots = table.column("item_ids").combine_chunks(), table.column("target_slot").to_numpy()
    row_of, user_of = dataset.items.rows, {user_id: user for user, user_id in enumerate(dataset.user_ids)}
    rows = np.array([row_of[item_id] for item_id in items.flatten().to_pylist()], np.int32)
    users = np.array([user_of[user_id] for user_id in table.column("user_id").to_pylist()], np.int32)
    return CandidateLists(rows.reshape(len(users), -1), slots, users, int(facts["seed"]))


def frozen_candidates(
    path: Path | str, dataset: Dataset, queries: Queries, *, num_negatives: int = 19, seed: int = 0
) -> CandidateLists:
    """The lists of `path` in the order of `queries`; drawn and written there first where the file does not exist.

    DataError where the file has other data, another number or seed, or not the targets of these queries.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the file that holds the lists, or is to")
    if not path.exists():
        drawn = draw_candidates(dataset, queries, num_negatives=num_negatives, seed=seed)
        drawn.save(path, dataset)
        return drawn
    lists = load_candidates(path, dataset)
    if (lists.num_negatives, lists.seed) != (num_negatives, seed):
        raise DataError(
            f"{path}: it holds {lists.num_negatives} negatives drawn with seed {lists.seed}, not {num_negatives} with"
            f" seed {seed}; ask for those or choose another file"
        )
    return _aligned(path, lists, dataset, queries)


def _generator(seed: int, user_id: str) -> np.random.Generator:
    words = np.frombuffer(hashlib.sha256(user_id.encode()).digest(), "<u4")
    return np.random.default_rng([seed, *words.tolist()])


def _draw_unseen(
    generator: np.random.Generator, seen: NDArray[np.int32], dataset: Dataset, count: int, user: int
) -> NDArray[np.int64]:
    """`count` of the items that are not in `seen` (sorted): draws their ranks, then steps over the seen ones."""
    num_unseen = dataset.num_items - len(seen)
    if num_unseen < count:
        user_id = dataset.user_ids[user]
        raise DataError(
            f"{dataset.name}: user {user_id!r} leaves {num_unseen} items, {count} negatives are needed; {FEWER}"
        )
    ranks = generator.choice(num_unseen, count, replace=False)
    return ranks + np.searchsorted(seen - np.arange(len(seen)), ranks, side="right")


def _aligned(path: Path, lists: CandidateLists, dataset: Dataset, queries: Queries) -> CandidateLists:
    place = np.full(dataset.num_users, -1, np.int64)
    place[lists.users] = np.arange(len(lists))
    chosen = place[queries.users]
    if (chosen < 0).any():
        missing = [dataset.user_ids[user] for user in queries.users[chosen < 0]]
        raise DataError(f"{path}: no candidate lists for user {name_some(missing)}; draw new ones")
    aligned = lists.take(chosen)
    if (aligned.targets != queries.targets).any():
        raise DataError(f"{path}: its targets are not those of these queries (validation and test need a file each)")
    return aligned
