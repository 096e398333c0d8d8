"""Who took what, and when: one table read from any supported file. Knows no catalogue."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speeder_engine.checks import LATEST_SECOND
from speeder_engine.data.columns import Columns
from speeder_engine.data.ids import IdColumn, id_text
from speeder_engine.data.tables import column_names, is_text, read_columns, read_jsonl, table_format
from speeder_engine.errors import DataError

AMAZON_ITEM = "parent_asin"


@dataclass(frozen=True, eq=False)
class Interactions:
    """Rows in the order of the file; `times` are whole Unix seconds, None where the file has no time."""

    users: IdColumn
    items: IdColumn
    times: NDArray[np.int64] | None

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items)} | ({len(self.times)} if self.times is not None else set())
        if len(lengths) != 1:
            raise DataError(f"interactions: columns of unequal lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.users)

    @property
    def user_ids(self) -> NDArray[np.str_]:
        return self.users.ids

    @property
    def item_ids(self) -> NDArray[np.str_]:
        return self.items.ids


def read_interactions(path: Path | str, columns: Columns | None = None) -> Interactions:
    """Reads Parquet, CSV, JSONL (both also .gz), RecBole `.inter` and the two Amazon Reviews 2023 formats.

    Ids stay strings with their leading zeros, whole numbers become their decimals; ratings are ignored: every
    interaction counts. DataError for a missing column, an empty id, a missing or unreadable time, a file of no rows.
    """
    path, columns = Path(path), columns or Columns()
    found = column_names(path)
    user, item = columns.find("user", found, path), columns.find("item", found, path)
    time = columns.find_optional("time", found, path)
    unit = columns.time_unit or ("ms" if item == AMAZON_ITEM else "s")
    if table_format(path) == "jsonl":
        table = _from_jsonl(path, user, item, time or columns.names("time")[0], timed=time is not None)
    else:
        table = read_columns(path, [user, item, *([time] if time else [])])
    if table.num_rows == 0:
        raise DataError(f"{path}: no interactions in it")
    users = IdColumn.from_arrow(table.column(0), f"{path}: column {user!r}")
    items = IdColumn.from_arrow(table.column(1), f"{path}: column {item!r}")
    return Interactions(users, items, _seconds(table.column(2), unit, f"{path}, column {time!r}") if time else None)


def _from_jsonl(path: Path, user: str, item: str, time: str, timed: bool) -> pa.Table:
    """`timed`: the first record has a time, so every one must; else none may."""
    users, items, times = list[str](), list[str](), list[float]()
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        users.append(id_text(record.get(user), f"{where}: {user}"))
        items.append(id_text(record.get(item), f"{where}: {item}"))
        if not timed and time in record:
            raise DataError(f"{where}: has {time}, the first record has none; give every line a time, or none")
        if timed:
            times.append(_number(record.get(time), f"{where}: {time}"))
    arrays = [pa.array(users, pa.large_string()), pa.array(items, pa.large_string())]
    if timed:
        arrays.append(pa.array(times, pa.float64()))
    return pa.table(arrays, names=[user, item, time][: len(arrays)])


def _number(value: object, where: str) -> float:
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    raise DataError(f"{where} is {value!r}; a number is needed (Unix time)")


def _seconds(column: pa.ChunkedArray, unit: Literal["s", "ms"], where: str) -> NDArray[np.int64]:
    """Whole Unix seconds, rounded down, from plain numbers in `unit` or from Arrow timestamps and dates."""
    if column.null_count:
        raise DataError(f"{where}, row {_first(column.is_null()) + 1}: no time; drop the row or give it one")
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if is_text(column.type):
        column = _parsed(column.cast(pa.string()), where)
    dtype = column.type
    if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype):
        values, unit = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()).to_numpy(), "ms"
    elif pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        values = column.to_numpy()
    else:
        raise DataError(f"{where}: {dtype} is no time; numbers (Unix time) or timestamps are needed")
    if not np.isfinite(values).all():
        raise DataError(f"{where}, row {int((~np.isfinite(values)).argmax()) + 1}: the time is not finite")
    seconds = values // (1000 if unit == "ms" else 1)
    # as Python's: the smallest int64 has no absolute value
    first, last = int(seconds.min()), int(seconds.max())
    if max(last, -first) > LATEST_SECOND:
        worst = f"{last} s is past the year 5000" if last > -first else f"{first} s is before the year -1000"
        raise DataError(f"{where}: {worst}; for milliseconds: --column time_unit=ms, in Python Columns(time_unit='ms')")
    return np.asarray(seconds, dtype=np.int64)


def _parsed(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Text as float64."""
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        bad = next(row for row, text in enumerate(column) if not _is_number(text))
        raise DataError(f"{where}, row {bad + 1}: {column[bad].as_py()!r} is no number; Unix time is needed") from None


def _is_number(text: pa.StringScalar) -> bool:
    try:
        text.cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _first(mask: Any) -> int:
    return int(np.asarray(mask).argmax())
