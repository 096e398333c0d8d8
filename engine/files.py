"""Writing files and folders so that a reader sees the old state or the new one, never half of either.

A writer works in a hidden sibling, `.name.xxxxxxxx.tmp`, which it keeps locked: what a killed run left behind is the
unlocked ones, and the next write of the same target removes them. Every failure to write is one ArtifactError.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from speeder_engine.errors import ArtifactError

AT_FDCWD = -100
RENAME_EXCHANGE = 2
LOOK_ELSEWHERE = "choose another place or change its permissions"
REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "raise the file size limit or choose another disk",
    errno.EACCES: LOOK_ELSEWHERE,
    errno.EPERM: LOOK_ELSEWHERE,
    errno.EROFS: LOOK_ELSEWHERE,
    errno.EEXIST: "a file stands where a parent folder must be",
    errno.ENOTDIR: "a file stands where a parent folder must be",
    errno.EBUSY: "it is a mount point: choose a folder inside it",
    errno.EXDEV: "it is a mount point or part of an image layer: choose a folder inside it, or remove it first",
}
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, then renames onto it. A link is followed; missing parents are made."""
    with replace_file(path) as beside, _explained(path):
        beside.write_bytes(content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields an empty sibling file to write; on success it is synced and takes `path`'s place, else it is removed.

    A link is followed; missing parents are made. Raises ArtifactError when `path` is no regular file or can't be
    written; other errors of the body pass.
    """
    with _explained(path):
        target = Path(os.path.realpath(path))
        _refuse_unless(stat.S_ISREG, target, "something else stands where a file must go")
        target.parent.mkdir(parents=True, exist_ok=True)
        # now already: writers that are killed again and again must not fill the disk
        _remove_stale(target)
    with _explained(path, STORAGE_ERRORS), _sibling(target, Path.touch) as beside:
        yield beside
        with _explained(path):
            sync_path(beside)
            beside.replace(target)
            sync_path(target.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented UTF-8 JSON; NaN and infinities, which are not JSON, raise ValueError."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; on success it is synced and takes `target`'s place, else it is removed.

    An existing `target` is exchanged for it in one step, so that the path names a complete folder at every moment.
    Where the file system can't exchange, two renames do it: a kill between them leaves the old folder as
    `.name.xxxxxxxx.old`. A link is followed. Raises ArtifactError when `target` is a file or can't be written.
    """
    with _explained(target):
        place = Path(os.path.realpath(target))
        refuse_unless_folder(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        # now already: writers that are killed again and again must not fill the disk
        _remove_stale(place, ("tmp",))
    with _explained(target, STORAGE_ERRORS), _sibling(place, Path.mkdir) as beside:
        yield beside
        with _explained(target):
            readable = beside.stat().st_mode & 0o444
            for path in sorted(beside.rglob("*")):
                # some writers keep their files to themselves, but another user may serve what one has trained
                path.chmod(path.stat().st_mode | readable)
                sync_path(path)
            sync_path(beside)
            _put(beside, place)
            sync_path(place.parent)
    _remove_stale(place)


def ensure_writable(folder: Path) -> None:
    """Makes the folder where there is none, and writes into it; ArtifactError where that fails."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"0")


def refuse_unless_folder(target: Path) -> None:
    """ArtifactError for something else in the place of a folder, which `replace_folder` would meet only after all that
    is to be written has been made."""
    with _explained(target):
        _refuse_unless(stat.S_ISDIR, target, "something else stands where a folder must go")


def holds_nothing(folder: Path) -> bool:
    """Whether it is absent or empty."""
    return not folder.is_dir() or not any(folder.iterdir())


def _refuse_unless(kind: Callable[[int], bool], target: Path, reason: str) -> None:
    with suppress(FileNotFoundError):
        if not kind(target.stat().st_mode):
            raise ArtifactError(f"{target}: {reason}; remove it or choose another name")


@contextmanager
def _explained(target: Path, codes: tuple[int, ...] | None = None) -> Iterator[None]:
    """Turns a system error (with `codes`: only these) into the one line that says what to do about it."""
    try:
        yield
    except Exception as error:
        code = _system_code(error)
        if code is None or (codes is not None and code not in codes):
            raise
        remedy = REMEDIES.get(code, "choose another place")
        raise ArtifactError(f"{target}: can't be written: {os.strerror(code)}; {remedy}") from error


def _system_code(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors tells a full disk in words only
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextmanager
def _sibling(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new locked sibling of `target`; whatever bears its name at the end (a failed write, the old folder) goes."""
    with _explained(target):
        beside, descriptor = _claim(target, make)
    try:
        yield beside
    finally:
        _remove(beside)
        os.close(descriptor)


def _claim(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
        make(beside)
        # until it is locked, another writer may take it for a leftover and remove it
        with suppress(FileNotFoundError):
            descriptor = os.open(beside, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if beside.exists():
                return beside, descriptor
            os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """False when a live writer holds it, or when the file system knows no locks: then nothing counts as stale."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _put(beside: Path, target: Path) -> None:
    while True:
        try:
            if not target.exists():
                beside.rename(target)
            elif not _exchange(beside, target):
                _rename_twice(beside, target)
            return
        except OSError as error:
            # another writer put its folder there, or moved it, in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or not beside.exists():
                raise


def _exchange(left: Path, right: Path) -> bool:
    """Swaps two paths in one step (Linux renameat2); False where the system or the file system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(right))


def _rename_twice(beside: Path, target: Path) -> None:
    aside = beside.with_suffix(".old")
    descriptor = os.open(target, os.O_RDONLY)
    try:
        _lock(descriptor, wait=True)
        target.rename(aside)
        try:
            beside.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        _remove(aside)
    finally:
        os.close(descriptor)


def _remove_stale(target: Path, kinds: tuple[str, ...] = ("tmp", "old")) -> None:
    pattern = f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}"
    for leftover in [path for kind in kinds for path in target.parent.glob(f"{pattern}.{kind}")]:
        with suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                if _lock(descriptor, wait=False):
                    _remove(leftover)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
