"""Where item images lie, as bytes by item id. Decodes nothing; opens nothing before the first look-up."""

import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from speeder_engine.data.columns import Columns
from speeder_engine.data.ids import id_text
from speeder_engine.data.tables import reading
from speeder_engine.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImageSource(Protocol):
    """An item's image file as bytes, not yet decoded; None where it has none."""

    def read(self, item_id: str) -> bytes | None: ...

    def __contains__(self, item_id: object) -> bool: ...


def open_images(path: Path, columns: Columns | None = None) -> ImageSource:
    """The source for a folder, a `.zip` or a `.parquet` with the columns item and image."""
    if path.is_dir():
        return FolderImages(path)
    if path.suffix == ".zip" and path.is_file():
        return ZipImages(path)
    if path.suffix == ".parquet" and path.is_file():
        with reading(path):
            columns, names = columns or Columns(), pq.read_schema(path).names
        return ParquetImages(path, columns.find("item", names, path), columns.find("image", names, path))
    raise DataError(f"{path}: images are read from a folder, a .zip or a .parquet file")


class FolderImages:
    """`<item id>.jpg`, `.jpeg`, `.png` or `.webp` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _names(self) -> dict[str, str]:
        return _by_stem(sorted(os.listdir(self.folder)), self.folder)  # noqa: PTH208

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._names

    def read(self, item_id: str) -> bytes | None:
        name = self._names.get(item_id)
        try:
            return None if name is None else (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / str(name)}: can't be read: {error.strerror}") from error


class ZipImages:
    """`<item id>.jpg` and the like anywhere inside a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path}: can't be read as a zip: {error}") from error

    @cached_property
    def _names(self) -> dict[str, str]:
        return _by_stem(self._archive.namelist(), self.path)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._names

    def read(self, item_id: str) -> bytes | None:
        name = self._names.get(item_id)
        try:
            return None if name is None else self._archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise DataError(f"{self.path}: {name} can't be unpacked: {error}") from error


class ParquetImages:
    """A column of bytes, or of structs with a field `bytes`, beside a column of item ids.

    One row group is held at a time: reading in the order of the file reads each once.
    """

    def __init__(self, path: Path, item: str, image: str) -> None:
        dtype = pq.read_schema(path).field(image).type
        if not is_image_type(dtype):
            raise DataError(f"{path}: column {image!r} holds {dtype}; a column of bytes is needed")
        self.path, self.item, self.image = path, item, image
        self._held: tuple[int, Any] = (-1, None)

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path)

    @cached_property
    def _ends(self) -> list[int]:
        groups = range(self._file.num_row_groups)
        return list(accumulate(self._file.metadata.row_group(group).num_rows for group in groups))

    @cached_property
    def _rows(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        blank: set[str] = set()
        for group in range(self._file.num_row_groups):
            ids, images = self._read_group(group)
            for value, image in zip(ids.to_pylist(), images, strict=True):
                row = len(rows)
                item_id = id_text(value, f"{self.path}, row {row + 1}: {self.item}")
                if item_id in rows:
                    raise DataError(f"{self.path}, row {row + 1}: a second image for item {item_id!r}")
                rows[item_id] = row
                if not image.is_valid:
                    blank.add(item_id)
        return {item_id: row for item_id, row in rows.items() if item_id not in blank}

    def _read_group(self, group: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Its item ids and its images as bytes."""
        with reading(self.path):
            table = self._file.read_row_group(group, columns=[self.item, self.image])
        images = table.column(self.image)
        return table.column(self.item), pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def read(self, item_id: str) -> bytes | None:
        row = self._rows.get(item_id)
        if row is None:
            return None
        group = bisect_right(self._ends, row)
        if self._held[0] != group:
            self._held = (group, self._read_group(group)[1])
        content: bytes = self._held[1][row - (self._ends[group - 1] if group else 0)].as_py()
        return content


def is_image_type(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype):
        return dtype.get_field_index("bytes") >= 0 and is_image_type(dtype.field("bytes").type)
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype))


def _by_stem(names: Iterable[str], where: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        file = PurePosixPath(name)
        if file.suffix.lower() not in SUFFIXES:
            continue
        if file.stem in found:
            raise DataError(f"{where}: two images for item {file.stem!r}: {found[file.stem]} and {name}")
        found[file.stem] = name
    return found
