"""The catalogue: item id <-> row, item tokens, titles, availability and prior. Takes finished tokens; encodes nothing.

`row` is how the inside names an item, `item_id` (always a string) how the outside does.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from speeder_engine.errors import ArtifactError, DataError, UnknownItem, name_some

ITEMS_FILE = "items.parquet"
TOKENS_FILE = "item_tokens.safetensors"


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
            seen: set[str] = set()
            twice = [item_id for item_id in self.item_ids if item_id in seen or seen.add(item_id)]  # type: ignore[func-returns-value]
            raise DataError(f"item table: item id {name_some(twice)} appears more than once")
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


class Catalogue:
    """Item tokens [I, d] with their table. `len`, `in`, and `item_ids` in row order."""

    def __init__(self, table: ItemTable, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.shape[0] != len(table):
            raise DataError(f"catalogue: item tokens of shape {tuple(tokens.shape)} for {len(table)} items")
        self.table = table
        self.tokens = tokens
        self.prior = torch.from_numpy(table.prior.copy()).to(tokens.device)
        self.available = torch.from_numpy(table.available.copy()).to(tokens.device)
        self._row_of = {item_id: row for row, item_id in enumerate(table.item_ids)}

    @property
    def item_ids(self) -> tuple[str, ...]:
        return self.table.item_ids

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and item_id in self._row_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.item_ids)

    def title(self, item_id: str) -> str:
        return self.table.titles[int(self.rows([item_id], "title")[0])]

    def rows(self, item_ids: Iterable[str], where: str) -> NDArray[np.int32]:
        """Rows of these ids, in order. Raises UnknownItem with all that are unknown; `where` names the field."""
        found = self.find(item_ids)
        unknown = [item_id for item_id, row in found if row is None]
        if unknown:
            raise UnknownItem(unknown, where)
        return np.array([row for _, row in found], dtype=np.int32)

    def find(self, item_ids: Iterable[str]) -> list[tuple[str, int | None]]:
        get = self._row_of.get
        return [(item_id, get(item_id) if isinstance(item_id, str) else None) for item_id in item_ids]

    def keys(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """What a cached position was computed from: (row, version) [n, 2]."""
        return np.stack([rows, self.table.versions[rows]], axis=1).astype(np.int32, copy=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Catalogue":
        return Catalogue(self.table, self.tokens.to(device, dtype))

    def save(self, folder: Path) -> None:
        self.table.save(folder)
        save_file({"item_tokens": self.tokens.contiguous()}, folder / TOKENS_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Catalogue":
        return cls(ItemTable.load(folder), load_file(folder / TOKENS_FILE)["item_tokens"])
