"""The catalogue: item id <-> row, item tokens, titles, availability and prior. Takes finished tokens; encodes nothing.

`row` is how the inside names an item, `item_id` (always a string) how the outside does. A row is never given to
another item: what stood in a history once can be read from it for good.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from speeder_engine.checks import repeated
from speeder_engine.errors import (
    ArtifactError,
    CatalogueFull,
    DataError,
    InvalidRequest,
    UnknownItem,
    name_some,
    shown,
)
from speeder_engine.memory import zeros
from speeder_engine.request import item_ids, true_or_false
from speeder_engine.triton_kernels.top_scores_two_stage import CoarseTable

ITEMS_FILE = "items.parquet"
TOKENS_FILE = "item_tokens.safetensors"
MOST_PRIOR = 1e30  # times a learned beta it is still a number of fp32
SEARCHED_STEP = 1024  # rows
Rows = NDArray[np.int32]


@dataclass(frozen=True)
class ItemTable:
    """What is known of the items besides their tokens, in row order."""

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    prior: NDArray[np.float32]  # added to scores, times a learned beta
    available: NDArray[np.bool_]  # an unavailable item is never recommended, but may stand in histories
    versions: NDArray[np.int32]  # grows when an item's token changes

    def __post_init__(self) -> None:
        size = len(self.item_ids)
        for name in ("titles", "prior", "available", "versions"):
            if len(getattr(self, name)) != size:
                raise DataError(f"item table: {len(getattr(self, name))} {name} for {size} item ids")
        if len(set(self.item_ids)) != size:
            raise DataError(f"item table: item id {name_some(repeated(self.item_ids))} appears more than once")
        if not np.isfinite(self.prior).all():
            raise DataError("item table: the prior must be finite")

    def __len__(self) -> int:
        return len(self.item_ids)

    @classmethod
    def fresh(cls, item_ids: Sequence[str], titles: Sequence[str], prior: NDArray[np.float32]) -> "ItemTable":
        """All available, all at version 0."""
        size = len(item_ids)
        return cls(tuple(item_ids), tuple(titles), prior, np.ones(size, bool), np.zeros(size, np.int32))

    def save(self, folder: Path) -> None:
        columns = {
            "item_id": pa.array(self.item_ids, pa.string()),
            "title": pa.array(self.titles, pa.string()),
            "available": self.available,
            "prior": self.prior,
            "version": self.versions,
        }
        pq.write_table(pa.table(columns), folder / ITEMS_FILE)

    @classmethod
    def load(cls, folder: Path) -> "ItemTable":
        path = folder / ITEMS_FILE
        try:
            table = pq.read_table(path)
            return cls(
                tuple(table["item_id"].to_pylist()),
                tuple(table["title"].to_pylist()),
                table["prior"].to_numpy().astype(np.float32),
                table["available"].to_numpy(zero_copy_only=False).astype(bool),
                table["version"].to_numpy().astype(np.int32),
            )
        except (KeyError, OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path}: not the item table it should be ({error}); export the engine again") from None


@dataclass(frozen=True)
class ItemUpdate:
    """Finished items to put into a catalogue, n of them: tokens [n, d], and what is known besides.

    Where `with_token` is false, and for every `None`, the catalogue keeps what it has; a new item must have a token,
    and is without a title, available and of prior 0 unless told otherwise.
    """

    item_ids: tuple[str, ...]
    tokens: Tensor
    with_token: NDArray[np.bool_]
    titles: tuple[str | None, ...]
    available: tuple[bool | None, ...]
    priors: tuple[float | None, ...]

    def __len__(self) -> int:
        return len(self.item_ids)


class Catalogue:
    """Item tokens [capacity, d] and what is known of each item. `len`, `in` and `item_ids` speak of items that have
    not been removed.

    The tensors are made once and written in place, so that whoever holds them sees every change. Changes are applied
    whole or not at all; that nobody computes meanwhile is the caller's business.
    """

    def __init__(self, table: ItemTable, tokens: Tensor, capacity: int = 0, coarse: bool = False) -> None:
        """`capacity`: how many items will fit, removed ones included; at least those of the table. `coarse`: an int8
        copy of the tokens is kept beside them, for a search in two stages."""
        size = len(table)
        if tokens.ndim != 2 or tokens.shape[0] != size:
            raise DataError(f"catalogue: item tokens of shape {tuple(tokens.shape)} for {size} items")
        self.capacity = max(capacity, size)
        self.num_rows = size
        self.tokens = _grown(tokens, self.capacity)
        self.coarse = CoarseTable.build(self.tokens) if coarse else None
        self.prior = _grown(torch.from_numpy(table.prior), self.capacity).to(tokens.device)
        self.available = _grown(torch.from_numpy(table.available), self.capacity).to(tokens.device)
        self.versions: NDArray[np.int32] = np.zeros(self.capacity, np.int32)
        self.versions[:size] = table.versions
        self._ids = list(table.item_ids)
        self._titles = list(table.titles)
        self._row_of = {item_id: row for row, item_id in enumerate(self._ids)}
        self._removed: set[str] = set()
        self.changes = 0  # of which items there are and what is known of them; availability and priors aside
        self._listed = 0, table.item_ids  # after how many changes

    @property
    def searched_rows(self) -> int:
        """How many rows hold all items: a search leaves most of the room for new ones out. By the thousand, since a
        matrix library may sum the last few rows in another order, and a score must not change with the next upsert."""
        return min(self.capacity, -(-self.num_rows // SEARCHED_STEP) * SEARCHED_STEP)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """In row order."""
        changes, listed = self._listed
        if changes != self.changes:
            changes = self.changes  # read before the ids: a list that a change has overtaken is made again
            listed = tuple(item_id for item_id in self._ids.copy() if item_id not in self._removed)
            self._listed = changes, listed
        return listed

    def __len__(self) -> int:
        return self.num_rows - len(self._removed)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and item_id in self._row_of and item_id not in self._removed

    def __iter__(self) -> Iterator[str]:
        return iter(self.item_ids)

    def title(self, item_id: str) -> str:
        return self._titles[int(self.rows([item_id], "title")[0])]

    @property
    def titles(self) -> Sequence[str]:
        """In row order, removed items included."""
        return self._titles

    def row_title(self, row: int) -> str:
        return self._titles[row]

    def ids(self, rows: Iterable[int]) -> tuple[str, ...]:
        """Item ids of these rows, in order."""
        return tuple(map(self._ids.__getitem__, rows))

    def rows(self, item_ids: Iterable[str], where: str) -> Rows:
        """Rows of these ids, in order, removed items included. Raises UnknownItem with all that are unknown; `where`
        names the field."""
        listed = list(item_ids)
        found = [self._row_of.get(item_id) if isinstance(item_id, str) else None for item_id in listed]
        if None in found:
            raise UnknownItem([item_id for item_id, row in zip(listed, found, strict=True) if row is None], where)
        return np.array(found, dtype=np.int32)

    def find(self, item_ids: Sequence[str]) -> list[int | None]:
        """Each one's row, None for what no item is called."""
        return [*map(self._row_of.get, item_ids)]

    def keys(self, rows: Rows, buckets: Rows | None = None) -> NDArray[np.int32]:
        """What cached positions were computed from: (row, version, time bucket) [n, 3]; no times are bucket 0."""
        keys = np.empty((len(rows), 3), np.int32)
        keys[:, 0], keys[:, 1], keys[:, 2] = rows, self.versions[rows], 0 if buckets is None else buckets
        return keys

    def priors(self, item_ids: Sequence[str]) -> NDArray[np.float32]:
        rows = torch.from_numpy(self.rows(item_ids, "priors").astype(np.int64))
        priors: NDArray[np.float32] = self.prior.cpu()[rows].numpy()
        return priors

    def put(self, update: ItemUpdate) -> Rows:
        """Adds new items and replaces known ones (removed ones come back); returns their rows [n].

        An item whose token changes gets a new version, so that nothing computed from the old one is reused. Raises
        CatalogueFull or DataError with the catalogue as it was.
        """
        tokens = self._checked(update)
        if len(update) == 0:
            return np.empty(0, np.int32)
        rows = np.array([self._row_of.get(item_id, -1) for item_id in update.item_ids], np.int64)
        fresh = rows < 0
        if bare := [item_id for i, item_id in enumerate(update.item_ids) if fresh[i] and not update.with_token[i]]:
            raise DataError(f"upsert: item {name_some(bare)} is new; give it a text, an image or vectors")
        self.check_room(update.item_ids)
        rows[fresh] = self.num_rows + np.arange(np.count_nonzero(fresh))
        where = torch.from_numpy(rows).to(self.tokens.device)
        changed = (self.tokens[where] != tokens).any(dim=1).cpu().numpy() & update.with_token
        self.versions[rows[changed & ~fresh]] += 1
        replaced = torch.from_numpy(changed | fresh).to(where.device)
        if self.coarse is not None:
            # first: what it needs room for may not be had
            self.coarse.put(where[replaced], tokens[replaced])
        self.tokens[where[replaced]] = tokens[replaced]
        self._describe(update, rows, fresh)
        return rows.astype(np.int32)

    def check_room(self, item_ids: Iterable[str]) -> None:
        """CatalogueFull where the new ones among these don't fit."""
        fresh = len({item_id for item_id in item_ids if item_id not in self._row_of})
        if self.num_rows + fresh > self.capacity:
            raise CatalogueFull(
                f"catalogue_capacity: {fresh} new items don't fit, {self.num_rows} of "
                f"{self.capacity} rows are taken; load the engine with a larger catalogue_capacity"
            )

    def _checked(self, update: ItemUpdate) -> Tensor:
        """The update's tokens in the catalogue's dtype, or DataError."""
        wanted = (len(update), self.tokens.shape[1])
        if tuple(update.tokens.shape) != wanted:
            raise DataError(f"upsert: tokens of shape {tuple(update.tokens.shape)}, expected {wanted}")
        if len(set(update.item_ids)) < len(update):
            raise DataError(f"upsert: item {name_some(repeated(update.item_ids))} more than once; name each once")
        tokens = update.tokens.to(self.tokens.device, self.tokens.dtype)
        finite = torch.isfinite(tokens).all(dim=1).cpu().numpy()
        if not finite.all():
            strange = [item_id for item_id, good in zip(update.item_ids, finite, strict=True) if not good]
            raise DataError(f"upsert: item {name_some(strange)} has a token with NaN or infinity; check its vectors")
        for item_id, prior in zip(update.item_ids, update.priors, strict=True):
            _check_prior(item_id, prior)
        return tokens

    def _describe(self, update: ItemUpdate, rows: NDArray[np.int64], fresh: NDArray[np.bool_]) -> None:
        """Titles, availability and priors of rows whose tokens are in place."""
        available: dict[int, bool] = {}
        priors: dict[int, float] = {}
        for i, (item_id, row) in enumerate(zip(update.item_ids, rows.tolist(), strict=True)):
            title, flag, prior = update.titles[i], update.available[i], update.priors[i]
            if fresh[i]:
                self._ids.append(item_id)
                self._titles.append(title or "")
                self._row_of[item_id] = row
            elif title is not None:
                self._titles[row] = title
            if fresh[i] or flag is not None or item_id in self._removed:
                available[row] = flag is not False
            if fresh[i] or prior is not None:
                priors[row] = prior or 0.0
            self._removed.discard(item_id)
        _assign(self.available, available)
        _assign(self.prior, priors)
        self.num_rows = len(self._ids)
        self.changes += 1

    def remove(self, ids: Sequence[str]) -> None:
        """Tombstones: never recommended again, still readable in old histories. Raises UnknownItem, nothing changed."""
        ids = item_ids(ids, "remove")
        rows = self.rows(ids, "remove")
        _assign(self.available, dict.fromkeys(rows.tolist(), False))
        self._removed.update(ids)
        self.changes += 1

    def set_available(self, ids: Sequence[str], available: bool) -> None:
        """Raises UnknownItem for unknown and removed ids, nothing changed."""
        ids, available = item_ids(ids, "set_available"), true_or_false("available", available)
        self._check_live(ids, "set_available")
        _assign(self.available, dict.fromkeys(self.rows(ids, "set_available").tolist(), available))

    def set_prior(self, priors: Mapping[str, float]) -> None:
        """Raises UnknownItem for unknown and removed ids, DataError for a prior that is not finite; nothing changed."""
        if not isinstance(priors, Mapping):
            raise InvalidRequest(f"set_prior: expected a mapping of item ids to numbers, got {type(priors).__name__}")
        self._check_live(priors, "set_prior")
        for item_id, prior in priors.items():
            _check_prior(item_id, prior, may_be_none=False)
        rows = self.rows(priors, "set_prior").tolist()
        _assign(self.prior, dict(zip(rows, map(float, priors.values()), strict=True)))

    def _check_live(self, item_ids: Iterable[str], where: str) -> None:
        gone = [item_id for item_id in item_ids if item_id not in self]
        if gone:
            raise UnknownItem(gone, where)

    def to(self, device: torch.device, dtype: torch.dtype, capacity: int = 0, coarse: bool = False) -> "Catalogue":
        """A copy elsewhere, with room for `capacity` items; `self` is not changed by what happens to it."""
        return Catalogue(self.table(), self.tokens[: self.num_rows].to(device, dtype), capacity, coarse)

    def table(self) -> ItemTable:
        """Everything but the tokens, as it stands now; removed items are unavailable ones."""
        size = self.num_rows
        prior = self.prior[:size].float().cpu().numpy().copy()
        available = self.available[:size].cpu().numpy().copy()
        return ItemTable(tuple(self._ids), tuple(self._titles), prior, available, self.versions[:size].copy())

    def served_tokens(self) -> Tensor:
        """[n, d] on the host, in the type they are served in; on a CPU no copy."""
        return self.tokens[: self.num_rows].cpu()

    def save(self, folder: Path) -> None:
        self.table().save(folder)
        save_file({"item_tokens": self.tokens[: self.num_rows].contiguous()}, folder / TOKENS_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Catalogue":
        return cls(ItemTable.load(folder), load_file(folder / TOKENS_FILE)["item_tokens"])


def _grown(rows: Tensor, capacity: int) -> Tensor:
    """[n, ...] -> a new [capacity, ...], zero behind. Raises ConfigError where there is no room for it."""
    wanted = f"catalogue_capacity: {capacity:,} items"
    grown = zeros(wanted, capacity, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    grown[: rows.shape[0]] = rows
    return grown


def _assign(target: Tensor, values: Mapping[int, float]) -> None:
    if values:
        rows = torch.tensor(list(values), dtype=torch.int64, device=target.device)
        target[rows] = torch.tensor(list(values.values()), dtype=target.dtype, device=target.device)


def _check_prior(item_id: str, prior: object, may_be_none: bool = True) -> None:
    if prior is None and may_be_none:
        return
    number = isinstance(prior, int | float | np.integer | np.floating) and not isinstance(prior, bool)
    if not (number and abs(prior) <= MOST_PRIOR):  # type: ignore[arg-type]
        wanted = f"expected a number within {MOST_PRIOR:g} of 0"
        raise DataError(f"prior of item {item_id!r}: {wanted}, got {shown(prior)}")
