"""Parquet, CSV, JSONL and RecBole atomic files as columns or records. Knows no users, no items and no meaning."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from speeder_engine.errors import DataError
from speeder_engine.progress import progress_bar

Format = Literal["parquet", "csv", "atomic", "jsonl"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".inter": "atomic",
    ".item": "atomic",
}
BAR_FROM_BYTES = 32 << 20
LINES_A_TICK = 8192


def table_format(path: Path) -> Format:
    """By the file's name; `.gz` may follow `.csv` and `.jsonl`. A DataError where there is no such file or format."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; a table is one file, write its parts into one")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    zipped = path.suffix == ".gz"
    found = SUFFIXES.get(Path(path.stem).suffix if zipped else path.suffix)
    if found is None or (zipped and found not in ("csv", "jsonl")):
        raise DataError(f"{path}: not one of .parquet, .csv, .csv.gz, .jsonl, .jsonl.gz, .inter, .item")
    return found


def is_text(dtype: pa.DataType) -> bool:
    """Any of Arrow's types of strings."""
    return any(is_one(dtype) for is_one in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the libraries raise about a file's content, as a DataError of one line that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: can't be read: {reason}") from error


def column_names(path: Path) -> tuple[str, ...]:
    """The columns of the file, atomic ones without their `:type`; of a JSONL the keys of its first record."""
    kind = table_format(path)
    if kind != "parquet":
        _refuse_utf16(path)
    if kind == "jsonl":
        first = next((record for _, record in read_jsonl(path)), None)
        if first is None:
            raise DataError(f"{path}: there is nothing in it; write a JSON object a line")
        return tuple(first)
    with reading(path):
        if kind == "parquet":
            return tuple(pq.read_schema(path).names)
        names = tuple(_bare(name) for name in _header(path, kind))
    if kind == "csv" and len(names) == 1:
        separator = next((mark for mark in (";", "\t", "|") if mark in names[0]), None)
        if separator:
            raise DataError(f"{path}: its cells are separated by {separator!r}; separate them by commas")
    return names


def _refuse_utf16(path: Path) -> None:
    """What spreadsheets call Unicode: its cells would be read as nonsense, or as too few of them."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: is UTF-16 text; save it as UTF-8")


def refuse_repeated(path: Path, found: Sequence[str], names: Sequence[str]) -> None:
    """DataError where one of `names` heads several of the columns `found`: nobody knows which of them is meant."""
    for name in names:
        if found.count(name) > 1:
            raise DataError(f"{path}: has {found.count(name)} columns {name!r}; keep one")


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """The named columns of a Parquet, CSV or atomic file, in the file's order of rows.

    A CSV's cells stay text, so that no id is taken for a number; a Parquet file has types of its own.
    """
    kind = table_format(path)
    refuse_repeated(path, column_names(path), names)
    with reading(path):
        if kind == "parquet":
            with pq.ParquetFile(path) as file:
                return file.read(columns=list(names)).select(list(names))
        raw = {_bare(name): name for name in _header(path, kind)}
        convert = pacsv.ConvertOptions(
            column_types={raw[name]: pa.string() for name in names},
            include_columns=[raw[name] for name in names],
            strings_can_be_null=False,
        )
        return pacsv.read_csv(path, _block(), _parse(kind), convert).rename_columns(list(names))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line that is not blank."""
    with reading(path), _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: a JSON object is needed, not {type(record).__name__}")
            yield number, record


def _header(path: Path, kind: Format) -> Sequence[str]:
    with pacsv.open_csv(path, _block(), _parse(kind)) as reader:
        return cast(Sequence[str], reader.schema.names)


def _bare(name: str) -> str:
    return name.partition(":")[0]


def _block() -> pacsv.ReadOptions:
    return pacsv.ReadOptions(block_size=16 << 20)


def _parse(kind: Format) -> pacsv.ParseOptions:
    if kind == "atomic":
        return pacsv.ParseOptions(delimiter="\t", quote_char=False)
    return pacsv.ParseOptions(newlines_in_values=True)


@contextmanager
def _open(path: Path) -> Iterator[Iterator[bytes]]:
    """The lines of a file, unzipped, under a bar of its bytes on disk where it is large."""
    with path.open("rb") as file:
        lines = cast(BinaryIO, gzip.open(file)) if path.suffix == ".gz" else file  # noqa: SIM115
        yield _with_bar(lines, file, path) if path.stat().st_size >= BAR_FROM_BYTES else iter(lines)


def _with_bar(lines: BinaryIO, file: BinaryIO, path: Path) -> Iterator[bytes]:
    with progress_bar() as progress:
        task = progress.add_task(f"reading {path.name}", total=path.stat().st_size, note="bytes")
        for number, line in enumerate(lines):
            if number % LINES_A_TICK == 0:
                progress.update(task, completed=file.tell())
            yield line
        progress.update(task, completed=file.tell())
