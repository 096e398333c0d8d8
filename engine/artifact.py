"""Directories that we write and load, as containers: written in one step, verified file by file on load.

It knows names, sizes and hashes, nothing about models. The manifest (an engine's `engine.json`) lists every file and is
written last; its `digest` covers everything else in it, so that no byte of the directory can change unnoticed.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speeder_engine.errors import ArtifactError, name_some
from speeder_engine.files import holds_nothing, replace_folder, sha256_file

RESERVED = frozenset({"format", "format_version", "files", "digest"})


@dataclass(frozen=True)
class Kind:
    """What sort of directory it is: the name in its manifest, and the words of messages."""

    format: str
    version: int
    manifest: str
    noun: str
    export: str
    verb: str = "export it"

    @property
    def again(self) -> str:
        return f"{self.verb} again: {self.export}"


ENGINE = Kind("speeder-engine", 1, "engine.json", "engine directory", "`speeder export engine CHECKPOINT OUT`")
FORMAT, FORMAT_VERSION, MANIFEST = ENGINE.format, ENGINE.version, ENGINE.manifest


@dataclass(frozen=True)
class Artifact:
    """A verified directory; `manifest` is engine.json, or what its kind calls it, as parsed."""

    path: Path
    manifest: dict[str, Any]
    kind: Kind = ENGINE

    @property
    def names(self) -> tuple[str, ...]:
        """The files beside the manifest, as relative paths with `/`, sorted."""
        return tuple(self.manifest["files"])

    @property
    def total_size(self) -> int:
        """Bytes in all files but the manifest."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        """Where `name` lies; ArtifactError if the manifest doesn't list it."""
        if name not in self.manifest["files"]:
            raise ArtifactError(f"{self.path}: holds no {name}, only {name_some(self.names)}; {self.kind.again}")
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


def write_artifact(out: Path, fill: Callable[[Path], dict[str, Any]], kind: Kind = ENGINE) -> Artifact:
    """Publishes what `fill` writes into the folder it is given, in one step; `fill` returns the manifest's own fields.
    Returns what `read_artifact` would find.

    An existing `out` is replaced if it is empty or a directory of this kind with nothing of anyone else's in it. Raises
    ArtifactError otherwise, or when it can't be written; then, or when `fill` raises, `out` is as it was.
    """
    _check_replaceable(out, kind)
    with replace_folder(out) as folder:
        fields = fill(folder)
        if taken := RESERVED.intersection(fields):
            raise ValueError(f"{kind.manifest} fields {sorted(taken)} are the container's own")
        manifest = seal(folder, fields, kind)
        # filling takes minutes: somebody may have put something there in the meantime
        _check_replaceable(out, kind)
    return Artifact(out, manifest, kind)


def seal(folder: Path, fields: Mapping[str, Any], kind: Kind, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the manifest of a filled folder: `fields`, size and hash of every file, and the digest; returns it as
    it will be read.

    `known`: entries of files that were hashed before and are not read again.
    """
    names = _names(folder, kind.noun)
    if kind.manifest in names:
        raise ValueError(f"{kind.manifest} is written by the container")
    files = {name: entry for name, entry in (known or {}).items() if name in names}
    for name, found in _hashes(folder, [name for name in names if name not in files]).items():
        files[name] = {"size": (folder / name).stat().st_size, "sha256": found}
    files = {name: files[name] for name in names}
    manifest = {"format": kind.format, "format_version": kind.version, **fields, "files": files}
    content = _render({**manifest, "digest": _digest(manifest)})
    (folder / kind.manifest).write_bytes(content)
    return json.loads(content)  # type: ignore[no-any-return]


def read_artifact(path: Path, kind: Kind = ENGINE) -> Artifact:
    """Verifies the directory: every listed file there, of its size and hash, and nothing else; else ArtifactError."""
    try:
        manifest, content = _read_manifest(path, kind)
        check_seal(path, manifest, content, kind)
    except OSError as error:
        where = error.filename or path
        raise ArtifactError(f"{where}: can't be read: {error.strerror}; make it readable or export it again") from error
    return Artifact(path, manifest, kind)


def check_seal(path: Path, manifest: dict[str, Any], content: bytes, kind: Kind) -> None:
    """ArtifactError unless the manifest, read from `content`, and every file are as `seal` left them."""
    source = path / kind.manifest
    if not _is_intact(manifest, content):
        raise ArtifactError(f"{source}: was altered after it was written, its digest doesn't fit; {kind.again}")
    if not _lists_files(manifest.get("files")):
        raise ArtifactError(f"{source}: lists its files in a way this version can't read; {kind.again}")
    _check_files(path, manifest["files"], kind)


def _read_manifest(path: Path, kind: Kind) -> tuple[dict[str, Any], bytes]:
    source = path / kind.manifest
    if not path.is_dir():
        raise ArtifactError(f"no {kind.noun}: {path} is not a folder; export one with {kind.export}")
    if not os.path.lexists(source):
        raise ArtifactError(f"no {kind.noun}: {path} has no {kind.manifest}; export one with {kind.export}")
    if not stat.S_ISREG(source.lstat().st_mode):
        raise ArtifactError(f"{source}: is not a regular file; {kind.again}")
    content = source.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: is not JSON, truncated or damaged; {kind.again}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind.format:
        raise ArtifactError(
            f"{source}: is not of format {kind.format!r}; choose {with_article(kind.noun)}, as {kind.export} writes it"
        )
    _check_version(source, manifest.get("format_version"), kind)
    return manifest, content


def _check_version(source: Path, version: object, kind: Kind) -> None:
    if type(version) is int and version == kind.version:
        return
    newer = type(version) is int and version > kind.version
    remedy = "upgrade speeder-engine" if newer else kind.again
    raise ArtifactError(f"{source}: has format version {version!r}, this speeder-engine reads {kind.version}; {remedy}")


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


def _check_files(path: Path, files: dict[str, dict[str, Any]], kind: Kind) -> None:
    for name in files:
        if not _is_inside(name, kind):
            raise ArtifactError(f"{path / kind.manifest}: lists {name!r}, which leads out of the folder; {kind.again}")
    present = set(_names(path, kind.noun))
    if foreign := sorted(present - set(files) - {kind.manifest}):
        raise ArtifactError(
            f"{path}: {name_some(foreign)} is not listed in {kind.manifest}; move it out of the {kind.noun}"
        )
    for name, entry in files.items():
        if name not in present:
            raise ArtifactError(f"{path / name}: is missing; {kind.again}")
        size = (path / name).stat().st_size
        if size != entry["size"]:
            reason = f"has {size} bytes, {kind.manifest} says {entry['size']}"
            raise ArtifactError(f"{path / name}: {reason}: truncated or altered; {kind.again}")
    for name, found in _hashes(path, files).items():
        if found != files[name]["sha256"]:
            reason = f"has the hash {found[:12]}…, {kind.manifest} says {files[name]['sha256'][:12]}…"
            raise ArtifactError(f"{path / name}: {reason}: altered; {kind.again}")


def _check_replaceable(out: Path, kind: Kind) -> None:
    try:
        if holds_nothing(out):
            return
        listed = _listed(out, kind)
        foreign = sorted(set(_names(out, kind.noun)) - listed) if listed else []
    except OSError as error:
        raise ArtifactError(f"{out}: can't be read: {error.strerror}; choose another folder") from error
    if not listed:
        raise ArtifactError(f"{out}: is not {with_article(kind.noun)}; choose another folder or remove it")
    if foreign:
        reason = f"also holds {name_some(foreign)}, which is not part of the {kind.noun}"
        raise ArtifactError(f"{out}: {reason}; move it out or choose another folder")


def _listed(folder: Path, kind: Kind) -> set[str]:
    """The files that a directory of this kind, even a damaged one of another version, calls its own; or none."""
    try:
        manifest = json.loads((folder / kind.manifest).read_bytes())
        return {kind.manifest, *manifest["files"]} if manifest["format"] == kind.format else set()
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return set()


def _is_inside(name: str, kind: Kind) -> bool:
    return not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name and name != kind.manifest


def _names(folder: Path, noun: str) -> list[str]:
    """Every file below `folder`, sorted; links and devices are refused: what they lead to is not what was hashed."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
                raise ArtifactError(f"{path}: is {kind}; the {noun} holds plain files: put a copy there")
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


def with_article(noun: str) -> str:
    """An ONNX export, a Triton repository."""
    return f"{'an' if noun[0] in 'aeioAEIO' else 'a'} {noun}"
