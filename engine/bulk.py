"""Recommendations for a whole Parquet file of histories, in batches: memory stays small however many users there are.

Input columns: `history` (list of item ids, oldest first), optionally `user_id`. Output: `user_id` where the input has
one, `items` and `scores`, row by row.
"""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from speeder_engine.engine import Engine
from speeder_engine.errors import DataError
from speeder_engine.progress import track
from speeder_engine.request import OnUnknown, Request

BATCH_USERS = 1024


def recommend_file(engine: Engine, source: Path, target: Path, k: int, on_unknown: OnUnknown = "error") -> int:
    """Writes `target` beside itself and renames it when whole; returns the number of users.

    Raises DataError where the file or a column is not as it should be, UnknownItem as `recommend` does.
    """
    file = _open(source)
    with_users = "user_id" in file.schema_arrow.names
    fields = [("user_id", pa.string())] if with_users else []
    schema = pa.schema([*fields, ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        with pq.ParquetWriter(beside, schema) as writer:
            for batch in track(_batches(file), "recommendations", total=-(-file.metadata.num_rows // BATCH_USERS)):
                writer.write_table(_answer(engine, batch, schema, k, on_unknown, source))
        beside.replace(target)
    except OSError as error:
        raise DataError(f"{target}: can't be written: {error.strerror}; choose another --output") from None
    finally:
        beside.unlink(missing_ok=True)
    return int(file.metadata.num_rows)


def _open(source: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(source)
    except FileNotFoundError:
        raise DataError(f"{source}: no such file; give a Parquet file with a column `history`") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    names = file.schema_arrow.names
    if "history" not in names:
        raise DataError(f"{source}: has no column `history`, only {', '.join(names)}; it holds lists of item ids")
    kind = file.schema_arrow.field("history").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"{source}: column `history` is {kind}, expected lists of item ids (strings), oldest first")
    return file


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    columns = [name for name in ("user_id", "history") if name in file.schema_arrow.names]
    return file.iter_batches(batch_size=BATCH_USERS, columns=columns)  # type: ignore[no-any-return]


def _answer(
    engine: Engine, batch: pa.RecordBatch, schema: pa.Schema, k: int, on_unknown: OnUnknown, source: Path
) -> pa.Table:
    histories = batch.column("history").to_pylist()
    if None in histories:
        raise DataError(f"{source}: a history is null; write an empty list for a user without interactions")
    rankings = engine.recommend_many([Request(history, k, on_unknown=on_unknown) for history in histories])
    columns = {"items": [ranking.items for ranking in rankings], "scores": [ranking.scores for ranking in rankings]}
    if "user_id" in schema.names:
        columns = {"user_id": batch.column("user_id").cast(pa.string()).to_pylist(), **columns}
    return pa.table(columns, schema=schema)
