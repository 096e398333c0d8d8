"""The engine directory as a container: written in one step, verified file by file on load.

It knows names, sizes and hashes, nothing about models. `engine.json` lists every file and is written last; its
`digest` covers everything else in it, so that no byte of the directory can change unnoticed.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speeder_engine.errors import ArtifactError, name_some
from speeder_engine.files import replace_folder, sha256_file

FORMAT = "speeder-engine"
FORMAT_VERSION = 1
MANIFEST = "engine.json"
RESERVED = frozenset({"format", "format_version", "files", "digest"})
EXPORT = "`speeder export engine CHECKPOINT OUT`"
AGAIN = f"export it again: {EXPORT}"


@dataclass(frozen=True)
class Artifact:
    """A verified engine directory; `manifest` is engine.json as parsed."""

    path: Path
    manifest: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The files beside engine.json, as relative paths with `/`, sorted."""
        return tuple(self.manifest["files"])

    @property
    def total_size(self) -> int:
        """Bytes in all files but engine.json."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        """Where `name` lies; ArtifactError if the manifest doesn't list it."""
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.path}: holds no {name}, only {name_some(self.names)}; {AGAIN}")
        return self.path / name

    def folder(self, prefix: str) -> Path | None:
        """The folder of the files below `prefix`, verified once more, since it may be read long after the directory
        was; None if there are none. ArtifactError if they were replaced meanwhile."""
        files = {name: entry for name, entry in self.manifest["files"].items() if name.startswith(f"{prefix}/")}
        for name, entry in files.items():
            path = self.path / name
            if not path.is_file() or path.stat().st_size != entry["size"] or sha256_file(path) != entry["sha256"]:
                raise ArtifactError(f"{path}: was changed since the engine was loaded; reload the engine")
        return self.path / prefix if files else None


def write_artifact(out: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Publishes what `fill` writes into the folder it is given, in one step; `fill` returns the manifest's own fields.

    An existing `out` is replaced if it is empty or an engine directory with nothing of anyone else's in it. Raises
    ArtifactError otherwise, or when it can't be written; then, or when `fill` raises, `out` is as it was.
    """
    _check_replaceable(out)
    with replace_folder(out) as folder:
        fields = fill(folder)
        if taken := RESERVED.intersection(fields):
            raise ValueError(f"{MANIFEST} fields {sorted(taken)} are the container's own")
        names = _names(folder)
        if MANIFEST in names:
            raise ValueError(f"{MANIFEST} is written by the container")
        hashes = _hashes(folder, names)
        files = {name: {"size": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names}
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **fields, "files": files}
        (folder / MANIFEST).write_bytes(_render({**manifest, "digest": _digest(manifest)}))
        # filling takes minutes: somebody may have put something there in the meantime
        _check_replaceable(out)


def read_artifact(path: Path) -> Artifact:
    """Verifies the directory: every listed file there, of its size and hash, and nothing else; else ArtifactError."""
    try:
        manifest = _read_manifest(path)
        _check_files(path, manifest["files"])
    except OSError as error:
        where = error.filename or path
        raise ArtifactError(f"{where}: can't be read: {error.strerror}; make it readable or export it again") from error
    return Artifact(path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    source = path / MANIFEST
    if not path.is_dir():
        raise ArtifactError(f"no engine directory: {path} is not a folder; export one with {EXPORT}")
    if not os.path.lexists(source):
        raise ArtifactError(f"no engine directory: {path} has no {MANIFEST}; export one with {EXPORT}")
    if not stat.S_ISREG(source.lstat().st_mode):
        raise ArtifactError(f"{source}: is not a regular file; {AGAIN}")
    content = source.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: is not JSON, truncated or damaged; {AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{source}: is not of format {FORMAT!r}; choose an engine directory, as {EXPORT} writes it")
    _check_version(source, manifest.get("format_version"))
    if not _is_intact(manifest, content):
        raise ArtifactError(f"{source}: was altered after the export, its digest doesn't fit; {AGAIN}")
    if not _lists_files(manifest.get("files")):
        raise ArtifactError(f"{source}: lists its files in a way this version can't read; {AGAIN}")
    return manifest


def _check_version(source: Path, version: object) -> None:
    if type(version) is int and version == FORMAT_VERSION:
        return
    newer = type(version) is int and version > FORMAT_VERSION
    remedy = "upgrade speeder-engine" if newer else AGAIN
    raise ArtifactError(
        f"{source}: has format version {version!r}, this speeder-engine reads {FORMAT_VERSION}; {remedy}"
    )


def _is_intact(manifest: dict[str, Any], content: bytes) -> bool:
    """Byte for byte as it was written: the digest covers the values, the comparison spacing and repeated keys."""
    try:
        fields = {key: value for key, value in manifest.items() if key != "digest"}
        return manifest.get("digest") == _digest(fields) and content == _render(manifest)
    except (ValueError, RecursionError):
        return False


def _lists_files(files: object) -> bool:
    if not isinstance(files, dict):
        return False
    return all(
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        for entry in files.values()
    )


def _check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name in files:
        if not _is_inside(name):
            raise ArtifactError(f"{path / MANIFEST}: lists {name!r}, which leads out of the folder; {AGAIN}")
    present = set(_names(path))
    if foreign := sorted(present - set(files) - {MANIFEST}):
        raise ArtifactError(
            f"{path}: {name_some(foreign)} is not listed in {MANIFEST}; move it out of the engine directory"
        )
    for name, entry in files.items():
        if name not in present:
            raise ArtifactError(f"{path / name}: is missing; {AGAIN}")
        size = (path / name).stat().st_size
        if size != entry["size"]:
            reason = f"has {size} bytes, {MANIFEST} says {entry['size']}"
            raise ArtifactError(f"{path / name}: {reason}: truncated or altered; {AGAIN}")
    for name, found in _hashes(path, files).items():
        if found != files[name]["sha256"]:
            reason = f"has the hash {found[:12]}…, {MANIFEST} says {files[name]['sha256'][:12]}…"
            raise ArtifactError(f"{path / name}: {reason}: altered; {AGAIN}")


def _check_replaceable(out: Path) -> None:
    try:
        if not out.is_dir() or not any(out.iterdir()):
            return
        listed = _listed(out)
        foreign = sorted(set(_names(out)) - listed) if listed else []
    except OSError as error:
        raise ArtifactError(f"{out}: can't be read: {error.strerror}; choose another folder") from error
    if not listed:
        raise ArtifactError(f"{out}: is not an engine directory; choose another folder or remove it")
    if foreign:
        reason = f"also holds {name_some(foreign)}, which is not part of the engine"
        raise ArtifactError(f"{out}: {reason}; move it out or choose another folder")


def _listed(folder: Path) -> set[str]:
    """The files that an engine directory of any version, even a damaged one, calls its own; empty if it is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return {MANIFEST, *manifest["files"]} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return set()


def _is_inside(name: str) -> bool:
    return not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name and name != MANIFEST


def _names(folder: Path) -> list[str]:
    """Every file below `folder`, sorted; links and devices are refused: what they lead to is not what was hashed."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
                raise ArtifactError(f"{path}: is {kind}; an engine directory holds plain files: put a copy there")
            if stat.S_ISREG(mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """In threads, since hashing gives up the interpreter lock and an engine has gigabytes."""
    listed = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(listed, pool.map(lambda name: sha256_file(folder / name), listed), strict=True))


def _render(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
