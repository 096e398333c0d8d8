"""Recommendations for a whole Parquet file of histories, in batches: memory stays small however many users there are.

Input columns: `history` (list of item ids, oldest first), optionally `user_id` and `times` (list of Unix seconds, one
for each item; null where they are not known). Output: `user_id` where the input has one, `items`, `scores` and
`unknown` (ids of the history that were skipped), row by row.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from speeder_engine.checks import given_path
from speeder_engine.engine import Engine
from speeder_engine.errors import DataError, InvalidRequest, SpeederWarning, UnknownItem
from speeder_engine.files import replace_file
from speeder_engine.progress import track
from speeder_engine.request import OnUnknown, Request

BATCH_USERS = 1024
COLUMNS = ("user_id", "history", "times")
SUFFIXES = (".parquet", ".pq", "")  # of the output, lest anybody takes it for another format


def recommend_file(
    engine: Engine, source: str | Path, target: str | Path, k: int, on_unknown: OnUnknown = "error"
) -> int:
    """Writes `target` beside itself and renames it when whole; returns the number of users.

    Raises DataError where the file or a column is not as it should be, InvalidRequest (with the row, where it is one's)
    and UnknownItem as `recommend` does, ArtifactError where `target` can't be written.
    """
    source, target = given_path(source, "input", "a Parquet file"), given_path(target, "output", "a Parquet file")
    Request((), k, on_unknown=on_unknown)  # what is wrong for all is no row's fault
    file = _open(source)
    _check_target(target, source)
    with_users = "user_id" in file.schema_arrow.names
    fields = [("user_id", pa.string())] if with_users else []
    schema = pa.schema([*fields, ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
    schema = schema.append(pa.field("unknown", pa.list_(pa.string())))
    done = skipped = 0
    with replace_file(target) as beside, pq.ParquetWriter(beside, schema) as writer:
        total = -(-file.metadata.num_rows // BATCH_USERS)
        for batch in track(_batches(file, source), "recommendations", total=total):
            answers = _answer(engine, batch, schema, k, on_unknown, source, done)
            done += batch.num_rows
            skipped += len(answers["unknown"].combine_chunks().flatten())
            writer.write_table(answers)
    if engine.parts.config.prompt.calendar is not None and "times" not in file.schema_arrow.names:
        message = f"{source}: has no column `times`, which this model reads; all times counted as not known"
        warnings.warn(message, SpeederWarning, stacklevel=2)
    if skipped:
        message = f"{source}: {skipped:,} item ids are not in the catalogue and were skipped; see the column `unknown`"
        warnings.warn(message, SpeederWarning, stacklevel=2)
    return int(file.metadata.num_rows)


def _check_target(target: Path, source: Path) -> None:
    same = os.path.realpath(target) == os.path.realpath(source)
    why = "is a folder" if target.is_dir() else "is the input itself" if same else None
    if why is None and target.suffix not in SUFFIXES:
        why = f"what is written is Parquet, not {target.suffix}"
    try:
        str(target).encode()
    except UnicodeEncodeError:
        why = "its name is no UTF-8"
    if why:
        raise DataError(f"{str(target)!r}: {why}; choose another --output")


def _open(source: Path) -> pq.ParquetFile:
    if source.is_dir():
        raise DataError(f"{source}: is a folder; give one Parquet file")
    try:
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file; give a Parquet file with a column `history`") from None
    except (OSError, pa.ArrowException, UnicodeEncodeError) as error:
        raise _unreadable(source, error) from None
    names = file.schema_arrow.names
    if "history" not in names:
        raise DataError(f"{source}: has no column `history`, only {', '.join(names)}; it holds lists of item ids")
    for name in COLUMNS:
        if names.count(name) > 1:
            raise DataError(f"{source}: has {names.count(name)} columns `{name}`; keep one")
    kind = file.schema_arrow.field("history").type
    if _listed(kind) is None:
        raise DataError(f"{source}: column `history` is {kind}, expected lists of item ids (strings), oldest first")
    return file


def _listed(kind: pa.DataType) -> pa.DataType | None:
    """What lists of this type hold; None for what is no list."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _batches(file: pq.ParquetFile, source: Path) -> Iterator[pa.RecordBatch]:
    columns = [name for name in COLUMNS if name in file.schema_arrow.names]
    try:
        yield from file.iter_batches(batch_size=BATCH_USERS, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None


def _unreadable(source: Path, error: Exception) -> DataError:
    return DataError(f"{source}: not a readable Parquet file ({' '.join(str(error).split())}); write it again")


def _answer(
    engine: Engine,
    batch: pa.RecordBatch,
    schema: pa.Schema,
    k: int,
    on_unknown: OnUnknown,
    source: Path,
    done: int,
) -> pa.Table:
    """`done`: rows of the file before this batch."""
    histories, requests = _histories(batch.column("history")).to_pylist(), []
    for row, (history, times) in enumerate(zip(histories, _times(batch), strict=True), start=done + 1):
        if history is None:
            raise DataError(f"{source}, row {row}: a history is null; write an empty list for no interactions")
        try:
            requests.append(Request(history, k, times=times, on_unknown=on_unknown))
        except InvalidRequest as error:
            raise InvalidRequest(f"{source}, row {row}: {error}") from None
    try:
        rankings = engine.recommend_many(requests)
    except UnknownItem as error:
        raise UnknownItem(error.ids, f"{source}, column `history`", error.remedy) from None
    except InvalidRequest as error:
        raise InvalidRequest(f"{source}: {error}") from None
    columns = {name: [getattr(ranking, name) for ranking in rankings] for name in ("items", "scores", "unknown")}
    if "user_id" in schema.names:
        columns = {"user_id": _user_ids(batch, source), **columns}
    return pa.table(columns, schema=schema)


def _histories(column: pa.Array) -> pa.Array:
    """Whole numbers are ids by their decimals, as in training."""
    kind = _listed(column.type)
    return column.cast(pa.list_(pa.string())) if kind is not None and pa.types.is_integer(kind) else column


def _times(batch: pa.RecordBatch) -> list[list[float] | None]:
    """Unix seconds; Arrow's timestamps become those."""
    if "times" not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column("times")
    kind = _listed(column.type)
    if kind is not None and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        column = column.cast(pa.list_(pa.timestamp("s")), safe=False).cast(pa.list_(pa.int64()))
    return column.to_pylist()  # type: ignore[no-any-return]


def _user_ids(batch: pa.RecordBatch, source: Path) -> list[str | None]:
    try:
        return batch.column("user_id").cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    except pa.ArrowException as error:
        raise DataError(f"{source}: column `user_id` holds no ids ({error}); it should be strings or numbers") from None
