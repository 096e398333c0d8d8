"""The catalogue as it lies in files: ids, titles, one text an item, images and ready-made vectors. Decodes no image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from speeder_engine.checks import is_unicode, repeated
from speeder_engine.data.columns import Columns
from speeder_engine.data.ids import id_text
from speeder_engine.data.images import ImageSource, ParquetImages, is_image_type
from speeder_engine.data.tables import column_names, read_columns, read_jsonl, refuse_repeated, table_format
from speeder_engine.encoders.features import Features
from speeder_engine.errors import DataError, SpeederWarning, name_some, shown

# columns whose lists, if they are lists, hold sentences rather than names
PROSE = ("overview", "description", "features")
DEEPEST = 8  # lists in lists that a cell may hold


@dataclass(frozen=True, eq=False)
class Items:
    """Item row i is `item_ids[i]`; `texts[i]` is what a text encoder reads, '' where there is nothing to read.

    `vectors` maps a modality (text, image, collaborative) to the user's own vectors, aligned with the rows.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    images: ImageSource | None = None
    vectors: Mapping[str, Features] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {"titles": len(self.titles), "texts": len(self.texts)}
        lengths |= {f"{modality} vectors": len(features) for modality, features in self.vectors.items()}
        for what, length in lengths.items():
            if length != len(self.item_ids):
                raise DataError(f"items: {len(self.item_ids)} ids but {length} {what}")
        if len(self.rows) != len(self.item_ids):
            raise DataError(f"items: item {name_some(repeated(self.item_ids))} is there more than once")

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Item id -> row."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    def take(self, rows: NDArray[np.integer[Any]]) -> "Items":
        """The items of the given rows, in the given order."""
        chosen = rows.tolist()
        return Items(
            tuple(self.item_ids[row] for row in chosen),
            tuple(self.titles[row] for row in chosen),
            tuple(self.texts[row] for row in chosen),
            self.images,
            {modality: features.take(rows) for modality, features in self.vectors.items()},
        )


def read_items(path: Path | str, columns: Columns | None = None) -> Items:
    """Reads JSONL, CSV, Parquet, RecBole `.item` and Amazon Reviews 2023 metadata; image addresses are not fetched.

    A text is the title and the text columns that are there, joined as sentences. A column of bytes in a Parquet file
    becomes the image source. DataError for a missing or doubled id; items without a title are counted in one warning.
    """
    path, columns = Path(path), columns or Columns()
    found, records = _read_records(path, columns)
    if not records:
        raise DataError(f"{path}: no items in it")
    item = columns.find("item", found, path)
    title, texts = columns.find_optional("title", found, path), columns.find_texts(found, path)
    ids = tuple(id_text(record.get(item), f"{where}: {item}") for where, record in records)
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: item {name_some(repeated(ids))} is there more than once; keep one of each")
    titles = tuple(field_text(record.get(title), "title", where) if title else "" for where, record in records)
    parts = ([field_text(record.get(name), name, where) for name in texts] for where, record in records)
    joined = tuple(join_sentences([name, *rest]) for name, rest in zip(titles, parts, strict=True))
    _warn_untitled(path, ids, titles)
    return Items(ids, titles, joined, _image_column(path, item, columns))


def join_sentences(parts: Sequence[str]) -> str:
    """'Toy Story. 1995. Comedy, Family. A boy': the parts that are not empty, each but the last closed by a stop."""
    filled = [part for part in parts if part]
    closed = [part if part[-1] in ".!?" else part + "." for part in filled[:-1]]
    return " ".join(closed + filled[-1:])


def field_text(value: object, name: str, where: str, depth: int = 0) -> str:
    """A cell as text on one line: lists are joined, `a|b` is a list too except in a title, None and NaN are ''; a
    moment is its day."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        if not is_unicode(value):
            raise DataError(f"{where}: {name} is {shown(value)}, which is no valid Unicode text; mend it")
        parts = [value] if name == "title" else value.split("|")
        return ", ".join(" ".join(part.split()) for part in parts if part.strip())
    if isinstance(value, list) and depth < DEEPEST:
        texts = [field_text(part, name, where, depth + 1) for part in value]
        return (" " if name in PROSE else ", ").join(text for text in texts if text)
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, date):
        return value.isoformat()[:10]  # a moment's day
    raise DataError(f"{where}: {name} is {type(value).__name__}; text, a number, a date or a list of them is needed")


def _read_records(path: Path, columns: Columns) -> tuple[tuple[str, ...], list[tuple[str, dict[str, Any]]]]:
    """All column names, and for every item where it stands and the cells of the columns that may be wanted."""
    wanted = {*columns.names("item"), *columns.names("title"), *columns.names("text")}
    if table_format(path) == "jsonl":
        seen: dict[str, None] = {}
        records = []
        for line, record in read_jsonl(path):
            seen.update(dict.fromkeys(record))
            cells = {name: record[name] for name in wanted if name in record}
            records.append((f"{path}, line {line}", cells))
        return tuple(seen), records
    found = column_names(path)
    table = read_columns(path, [name for name in found if name in wanted])
    return found, [(f"{path}, row {row}", cells) for row, cells in enumerate(table.to_pylist(), start=1)]


def _image_column(path: Path, item: str, columns: Columns) -> ImageSource | None:
    schema = pq.read_schema(path) if table_format(path) == "parquet" else None
    names = schema.names if schema is not None else []
    image = columns.find_optional("image", names, path)
    if image is not None:
        refuse_repeated(path, names, [image])
    if image is None or (columns.is_default("image") and schema and not is_image_type(schema.field(image).type)):
        return None
    return ParquetImages(path, item, image)


def _warn_untitled(path: Path, ids: Sequence[str], titles: Sequence[str]) -> None:
    untitled = [item_id for item_id, title in zip(ids, titles, strict=True) if not title]
    if untitled:
        message = f"{path}: {len(untitled)} of {len(ids)} items have no title: {name_some(untitled)}"
        warn(message, SpeederWarning, stacklevel=3)
