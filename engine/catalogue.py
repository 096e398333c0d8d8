"""The catalogue: item id <-> row, item tokens, titles, availability and prior. Takes finished tokens; encodes nothing.

`row` is how the inside names an item, `item_id` (always a string) how the outside does. A row is never given to
another item: what stood in a history once can be read from it for good.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike, NDArray
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
LOOKED_UP_AT_ONCE = 4096  # ids: one call looks through all it is given before another thread's Python gets a turn
READ_AT_ONCE = 16_384  # texts, for the same reason: requests go on while a reload reads millions
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
        different = set[str]()
        for start in range(0, size, READ_AT_ONCE):
            different.update(self.item_ids[start : start + READ_AT_ONCE])
        if len(different) != size:
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
                _texts(table["item_id"]),
                _texts(table["title"]),
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


@dataclass(frozen=True)
class Written:
    """Values [n, ...] for rows int64 [n] of one of a catalogue's tensors, on its device."""

    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Change:
    """What a change writes, checked and looked up: a moment's work to apply, and whole."""

    tokens: Written | None = None
    available: Written | None = None
    prior: Written | None = None
    overtaken: NDArray[np.int64] | None = None  # rows [n] whose token was another: they get a new version
    added: Mapping[str, int] = field(default_factory=dict)  # new ids and their rows, in order
    added_titles: Sequence[str] = ()
    titles: Mapping[int, str] = field(default_factory=dict)  # of known items, by row
    removed: Collection[str] = ()
    returned: Collection[str] = ()
    described: bool = False  # whether it is more than availability and priors


class Catalogue:
    """Item tokens [capacity, d] and what is known of each item. `len`, `in` and `item_ids` speak of items that have
    not been removed.

    The tensors are made once and written in place, so that whoever holds them sees every change. Changes are applied
    whole or not at all: `prepare_...` checks and looks up beside whoever reads, `apply` writes. That nobody computes
    meanwhile, and nothing else is changed between both, is the caller's business.
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
        self.placed: tuple[torch.device, torch.dtype] | None = None  # where an engine serves it, and in which type
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

    def put(self, update: ItemUpdate) -> Rows:
        """Adds new items and replaces known ones (removed ones come back); returns their rows [n].

        An item whose token changes gets a new version, so that nothing computed from the old one is reused. Raises
        CatalogueFull or DataError with the catalogue as it was.
        """
        self.apply(self.prepare_put(update))
        return self.rows(update.item_ids, "upsert")

    def prepare_put(self, update: ItemUpdate) -> Change:
        """What `put` writes."""
        tokens = self._checked(update)
        if len(update) == 0:
            return Change()
        rows = np.array([self._row_of.get(item_id, -1) for item_id in update.item_ids], np.int64)
        fresh = rows < 0
        if bare := [item_id for i, item_id in enumerate(update.item_ids) if fresh[i] and not update.with_token[i]]:
            raise DataError(f"upsert: item {name_some(bare)} is new; give it a text, an image or vectors")
        self.check_room(update.item_ids)
        rows[fresh] = self.num_rows + np.arange(np.count_nonzero(fresh))
        where = torch.from_numpy(rows).to(self.tokens.device)
        changed = (self.tokens[where] != tokens).any(dim=1).cpu().numpy() & update.with_token
        replaced = torch.from_numpy(changed | fresh).to(where.device)
        return replace(
            self._description(update, rows, fresh),
            tokens=Written(where[replaced], tokens[replaced]),
            overtaken=rows[changed & ~fresh],
        )

    def apply(self, change: Change) -> None:
        """Puts a change in place that was prepared here, behind the last one."""
        if change.tokens is not None:
            if self.coarse is not None:
                # first: what it needs room for may not be had
                self.coarse.put(change.tokens.rows, change.tokens.values)
            self.tokens[change.tokens.rows] = change.tokens.values
        for target, written in ((self.available, change.available), (self.prior, change.prior)):
            if written is not None:
                target[written.rows] = written.values
        if change.overtaken is not None:
            self.versions[change.overtaken] += 1
        self._ids.extend(change.added)
        self._titles.extend(change.added_titles)
        for row, title in change.titles.items():
            self._titles[row] = title
        # behind all that is read of a row: whoever looks ids up waits for nobody
        self._row_of.update(change.added)
        self._removed.difference_update(change.returned)
        self._removed.update(change.removed)
        self.num_rows = len(self._ids)
        self.changes += change.described

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

    def _description(self, update: ItemUpdate, rows: NDArray[np.int64], fresh: NDArray[np.bool_]) -> Change:
        """Ids, titles, availability and priors, without the tokens."""
        added, titles = dict[str, int](), dict[int, str]()
        added_titles, returned = list[str](), list[str]()
        available, priors = dict[int, bool](), dict[int, float]()
        for i, (item_id, row) in enumerate(zip(update.item_ids, rows.tolist(), strict=True)):
            title, flag, prior = update.titles[i], update.available[i], update.priors[i]
            if fresh[i]:
                added[item_id] = row
                added_titles.append(title or "")
            elif title is not None:
                titles[row] = title
            if item_id in self._removed:
                returned.append(item_id)
            if fresh[i] or flag is not None or item_id in self._removed:
                available[row] = flag is not False
            if fresh[i] or prior is not None:
                priors[row] = prior or 0.0
        return Change(
            available=_written(self.available, [*available], [*available.values()]),
            prior=_written(self.prior, [*priors], [*priors.values()]),
            added=added,
            added_titles=added_titles,
            titles=titles,
            returned=returned,
            described=True,
        )

    def remove(self, ids: Sequence[str]) -> None:
        """Tombstones: never recommended again, still readable in old histories. Raises UnknownItem, nothing changed."""
        self.apply(self.prepare_remove(ids))

    def prepare_remove(self, ids: Sequence[str]) -> Change:
        """What `remove` writes."""
        ids = item_ids(ids, "remove")
        rows = self.rows(ids, "remove")
        available = _written(self.available, rows, np.zeros(len(rows), np.bool_))
        return Change(available=available, removed=ids, described=True)

    def set_available(self, ids: Sequence[str], available: bool) -> None:
        """Raises UnknownItem for unknown and removed ids, nothing changed."""
        self.apply(self.prepare_available(ids, available))

    def prepare_available(self, ids: Sequence[str], available: bool) -> Change:
        """What `set_available` writes."""
        ids, available = item_ids(ids, "set_available"), true_or_false("available", available)
        rows = self._live_rows(ids, "set_available")
        return Change(available=_written(self.available, rows, np.full(len(rows), available)))

    def set_prior(self, priors: Mapping[str, float]) -> None:
        """Raises UnknownItem for unknown and removed ids, DataError for a prior that is not finite; nothing changed."""
        self.apply(self.prepare_prior(priors))

    def prepare_prior(self, priors: Mapping[str, float]) -> Change:
        """What `set_prior` writes."""
        if not isinstance(priors, Mapping):
            raise InvalidRequest(f"set_prior: expected a mapping of item ids to numbers, got {type(priors).__name__}")
        given = dict(priors)  # whoever passed it may write to it meanwhile
        rows = self._live_rows([*given], "set_prior")
        return Change(prior=_written(self.prior, rows, _checked_priors(given)))

    def _live_rows(self, item_ids: Sequence[str], where: str) -> Rows:
        """Rows of items that have not been removed; UnknownItem for others."""
        found = list[int | None]()
        for start in range(0, len(item_ids), LOOKED_UP_AT_ONCE):
            found += self.find(item_ids[start : start + LOOKED_UP_AT_ONCE])
        if None in found or not self._removed.isdisjoint(item_ids):
            raise UnknownItem([item_id for item_id in item_ids if item_id not in self], where)
        return np.array(found, np.int32)

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


def _texts(column: pa.ChunkedArray) -> tuple[str, ...]:
    parts = (column.slice(start, READ_AT_ONCE) for start in range(0, len(column), READ_AT_ONCE))
    return tuple(text for part in parts for text in part.to_pylist())


def _grown(rows: Tensor, capacity: int) -> Tensor:
    """[n, ...] -> a new [capacity, ...], zero behind. Raises ConfigError where there is no room for it."""
    wanted = f"catalogue_capacity: {capacity:,} items"
    grown = zeros(wanted, capacity, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    grown[: rows.shape[0]] = rows
    return grown


def _written(target: Tensor, rows: ArrayLike, values: ArrayLike) -> Written:
    """Of numbers on the host, in the target's type."""
    where = torch.from_numpy(np.asarray(rows, np.int64)).to(target.device)
    kind = np.bool_ if target.dtype == torch.bool else np.float64
    return Written(where, torch.from_numpy(np.asarray(values, kind)).to(target.device, target.dtype))


def _checked_priors(priors: Mapping[str, float]) -> NDArray[np.float64]:
    """Priors [n], or DataError; a whole catalogue of plain floats is not looked at one by one."""
    if {float}.issuperset(map(type, priors.values())):
        values = np.fromiter(priors.values(), np.float64, len(priors))
        if (np.abs(values) <= MOST_PRIOR).all():
            return values
    for item_id, prior in priors.items():
        _check_prior(item_id, prior, may_be_none=False)
    return np.array([*map(float, priors.values())], np.float64)


def _check_prior(item_id: str, prior: object, may_be_none: bool = True) -> None:
    if prior is None and may_be_none:
        return
    number = isinstance(prior, int | float | np.integer | np.floating) and not isinstance(prior, bool)
    if not (number and abs(prior) <= MOST_PRIOR):  # type: ignore[arg-type]
        wanted = f"expected a number within {MOST_PRIOR:g} of 0"
        raise DataError(f"prior of item {item_id!r}: {wanted}, got {shown(prior)}")
