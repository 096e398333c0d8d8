"""Ready-made vectors of the user's own, aligned with the catalogue. Knows no encoder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from warnings import warn
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from speeder_engine.checks import repeated
from speeder_engine.data.columns import Columns
from speeder_engine.data.ids import id_text
from speeder_engine.data.tables import column_names, read_columns, reading
from speeder_engine.encoders.features import Features
from speeder_engine.errors import DataError, SpeederWarning, name_some

LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def read_vectors(path: Path | str, item_ids: Sequence[str], columns: Columns | None = None) -> Features:
    """Vectors [n, d] for `item_ids`, from Parquet (item, vector) or `.npz` (`item_ids` [k], `vectors` [k, d]).

    Items the file does not have, or has with null, are not present. Ids that are not in `item_ids` are counted in one
    warning. DataError for vectors of unequal lengths, NaN or infinity, a doubled id, or a file that fits no item.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".parquet"):
        raise DataError(f"{path}: vectors are read from .parquet or .npz")
    ids, vectors = _from_npz(path) if path.suffix == ".npz" else _from_parquet(path, columns or Columns())
    _check(path, ids, vectors)
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    unknown = [item_id for item_id in ids if item_id not in row_of]
    if len(unknown) == len(ids):
        raise DataError(f"{path}: none of its {len(ids)} ids is in the catalogue, e.g. {name_some(unknown, 3)}")
    if unknown:
        message = f"{len(unknown)} of {len(ids)} vectors belong to no item and are left out"
        warn(f"{path}: {message}: {name_some(unknown)}", SpeederWarning, stacklevel=2)
    known = np.array([item_id in row_of for item_id in ids])
    rows = [row_of[item_id] for item_id in ids if item_id in row_of]
    values, present = np.zeros((len(item_ids), vectors.shape[1]), np.float32), np.zeros(len(item_ids), np.bool_)
    values[rows], present[rows] = vectors[known], True
    return Features(values, present)


def _from_npz(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: is a single array; save item_ids and vectors together with numpy.savez")
        with loaded as arrays:
            if not {"item_ids", "vectors"} <= set(arrays):
                raise DataError(f"{path}: arrays item_ids and vectors are needed; it has {name_some(arrays)}")
            ids, vectors = arrays["item_ids"], arrays["vectors"]
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: can't be read as .npz without pickle: {error}") from error
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or ids.shape != (len(vectors),):
        raise DataError(f"{path}: item_ids [k] and vectors [k, d] are needed, not {ids.shape} and {vectors.shape}")
    with np.errstate(over="ignore"):  # infinity, which is refused with its item's name
        return _texts(ids.tolist(), path), vectors.astype(np.float32)


def _from_parquet(path: Path, columns: Columns) -> tuple[list[str], NDArray[np.float32]]:
    found = column_names(path)
    item, vector = columns.find("item", found, path), columns.find("vector", found, path)
    table = read_columns(path, [item, vector])
    lists = table.column(vector)
    if not any(is_list(lists.type) for is_list in LISTS):
        raise DataError(f"{path}: column {vector!r} holds {lists.type}; lists of numbers are needed")
    with reading(path):
        rows = lists.cast(pa.large_list(pa.float32())).combine_chunks()
    ids, given = _texts(table.column(item).to_pylist(), path), rows.is_valid().to_numpy(zero_copy_only=False)
    ids, rows = [item_id for item_id, here in zip(ids, given, strict=True) if here], rows.drop_null()
    lengths = np.diff(rows.offsets.to_numpy())
    if len(lengths) and (lengths != lengths[0]).any():
        odd = int((lengths != lengths[0]).argmax())
        raise DataError(f"{path}: the vector of item {ids[odd]!r} has length {lengths[odd]}, the first {lengths[0]}")
    return ids, rows.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1 if ids else 0)


def _texts(values: Iterable[Any], path: Path) -> list[str]:
    return [id_text(value, f"{path}, row {row}: the item id") for row, value in enumerate(values, start=1)]


def _check(path: Path, ids: list[str], vectors: NDArray[np.float32]) -> None:
    if vectors.size == 0:
        raise DataError(f"{path}: no vectors in it")
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int((~finite).argmax())
        raise DataError(f"{path}: the vector of item {ids[row]!r} has NaN or infinity; leave the item out instead")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: more than one vector for item {name_some(repeated(ids))}; keep one of each")
