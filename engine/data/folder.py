"""What lies in a dataset folder, found by its names. Opens nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speeder_engine.config import MODALITIES
from speeder_engine.errors import DataError

TABLES = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
PICTURES = tuple(f"{name}{suffix}" for name in ("posters", "images", "covers") for suffix in ("", ".zip", ".parquet"))
VECTORS = (".parquet", ".npz")
REVIEWS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


@dataclass(frozen=True)
class DatasetFolder:
    """The files one dataset is read from; `vectors` by modality."""

    interactions: Path
    items: Path
    images: Path | None
    vectors: Mapping[str, Path]


def find_files(
    folder: Path, interactions: Path | None = None, items: Path | None = None, images: Path | None = None
) -> DatasetFolder:
    """Looks for one file of each kind; a path that is given is taken as it is. DataError where none or several fit.

    interactions.{parquet,csv,jsonl}, *.inter or, beside meta_X.jsonl, the reviews X.{jsonl,csv} · items.{parquet,
    csv,jsonl}, *.item or meta_*.jsonl · {posters,images,covers}{.zip,.parquet,/} · vectors/{text,image,
    collaborative}.{parquet,npz}; tables may end in .gz.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a dataset is a folder with interactions and items")
    meta = sorted([*folder.glob("meta_*.jsonl"), *folder.glob("meta_*.jsonl.gz")])
    reviews = [f"{path.name.partition('.')[0].removeprefix('meta_')}{suffix}" for path in meta for suffix in REVIEWS]
    tables = [f"interactions{suffix}" for suffix in TABLES] + reviews
    catalogues = [f"items{suffix}" for suffix in TABLES] + [path.name for path in meta]
    return DatasetFolder(
        interactions or _needed(folder, "interactions", tables, "*.inter"),
        items or _needed(folder, "items", catalogues, "*.item"),
        images or _one(folder, "images", PICTURES),
        _find_vectors(folder / "vectors"),
    )


def _needed(folder: Path, what: str, names: Sequence[str], pattern: str) -> Path:
    atomic = sorted(path.name for path in folder.glob(pattern))
    found = _one(folder, what, [*names, *atomic])
    if found is None:
        amazon = "X.{jsonl,csv} beside meta_X.jsonl" if what == "interactions" else "meta_*.jsonl"
        raise DataError(
            f"{folder}: no {what}; looked for {what}{{{','.join(TABLES)}}}, {pattern} and {amazon}:"
            f" name a file so, or in Python pass {what}=PATH"
        )
    return found


def _one(folder: Path, what: str, names: Sequence[str]) -> Path | None:
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) > 1:
        both = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: several files could be the {what}: {both}; keep one, or in Python pass {what}=PATH")
    return found[0] if found else None


def _find_vectors(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix not in VECTORS and path.stem in MODALITIES:
            raise DataError(f"{path}: vectors are read from {' or '.join(VECTORS)}; write it as one, or take it away")
        if path.suffix not in VECTORS:
            continue
        if path.stem not in MODALITIES:
            raise DataError(f"{path}: {path.stem!r} is no modality; the modalities are {', '.join(MODALITIES)}")
        if path.stem in found:
            raise DataError(f"{folder}: both {found[path.stem].name} and {path.name} are there; keep one")
        found[path.stem] = path
    return found
