import errno
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from speeder_engine import files
from speeder_engine.errors import ArtifactError

FILES = 4
# writes one complete state after another: FILES files that all hold the same number
WRITER = f"""
import sys
from itertools import count
from pathlib import Path
from speeder_engine import files
target, start, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if way == "renames":
    files._exchange = lambda left, right: False
for number in count(start):
    if way == "file":
        files.write_atomic(target, b"%d " % number * 20000)
    else:
        with files.replace_folder(target) as folder:
            for name in range({FILES}):
                (folder / str(name)).write_text(str(number))
    print(number, flush=True)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(target: Path) -> int:
    """The number all files of a state agree on; fails on a mixture or a part."""
    if target.is_file():
        numbers = target.read_text().split()
        assert len(numbers) == 20000
    else:
        assert names(target) == [str(name) for name in range(FILES)]
        numbers = [(target / str(name)).read_text() for name in range(FILES)]
    assert len(set(numbers)) == 1
    return int(numbers[0])


def kill_a_writer(target: Path, start: int, way: str, after: float) -> int:
    """Runs a writer from `start` on, kills it `after` its first write; returns the last number it reported."""
    command = [sys.executable, "-c", WRITER, str(target), str(start), way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as writer:
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        time.sleep(after)
        writer.send_signal(signal.SIGKILL)
        return int([str(first), *writer.stdout.read().split()][-1])


@pytest.mark.parametrize(("way", "trials"), [("exchange", 20), ("file", 6)])
def test_killed_writers_leave_the_old_state_or_the_new_one(tmp_path, way, trials):
    target, reported = tmp_path / "engine", 0
    for trial in range(trials):
        reported = kill_a_writer(target, reported + 1, way, after=0.003 * trial)
        # a kill may fall between the exchange and the report
        assert state(target) in (reported, reported + 1)
    files.write_json(target, {}) if way == "file" else write_folder(target, "0")
    assert names(tmp_path) == ["engine"]


def test_killed_writers_without_exchange_leave_one_complete_state(tmp_path):
    reported = 0
    for trial in range(6):
        reported = kill_a_writer(tmp_path / "engine", reported + 1, "renames", after=0.003 * trial)
        kept = [tmp_path / "engine", *tmp_path.glob(".engine.*.old")]
        assert state(next(folder for folder in kept if folder.exists())) in (reported, reported + 1)


def test_a_reader_finds_a_folder_at_every_moment(tmp_path):
    target = tmp_path / "engine"
    write_folder(target, "0")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), "1", "exchange"], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        looks = [target.is_dir() for _ in range(50_000)]
        writer.kill()
    assert all(looks)


def write_folder(target: Path, text: str) -> None:
    with files.replace_folder(target) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(text)


@pytest.fixture(params=["exchange", "renames"])
def swap(request, monkeypatch):
    if request.param == "renames":
        monkeypatch.setattr(files, "_exchange", lambda left, right: False)


def test_replaces_a_folder_whole(tmp_path, swap):
    target = tmp_path / "a" / "b" / "engine"
    write_folder(target, "old")
    (target / "left over").touch()
    write_folder(target, "new")
    assert [path.name for path in target.rglob("*")] == ["inside", "file"]
    assert (target / "inside" / "file").read_text() == "new"
    assert names(target.parent) == ["engine"]


def test_the_exchange_is_real_here(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "from a").touch()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system can't exchange")
    assert names(tmp_path / "b") == ["from a"]


def test_a_failing_body_changes_nothing(tmp_path, swap):
    target = tmp_path / "engine"
    write_folder(target, "old")
    with pytest.raises(KeyError), files.replace_folder(target) as folder:
        (folder / "half").touch()
        raise KeyError("model")
    assert (target / "inside" / "file").read_text() == "old"
    assert names(tmp_path) == ["engine"]


def test_a_failing_second_rename_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "engine"
    write_folder(target, "old")
    rename = Path.rename

    def refuse_new(self, to):
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(ArtifactError, match=re.escape(str(target))):
        write_folder(target, "new")
    assert (target / "inside" / "file").read_text() == "old"
    assert names(tmp_path) == ["engine"]


def test_stale_leftovers_go_and_live_or_foreign_ones_stay(tmp_path):
    stale = [tmp_path / ".engine.00000001.tmp", tmp_path / ".engine.00000002.old"]
    live = tmp_path / ".engine.00000003.tmp"
    foreign = [tmp_path / ".other.00000004.tmp", tmp_path / ".engine.notes.tmp", tmp_path / ".engine.json.00000005.tmp"]
    for folder in (*stale, live, *foreign):
        folder.mkdir()
        (folder / "file").touch()
    descriptor = os.open(live, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_folder(tmp_path / "engine", "new")
    os.close(descriptor)
    assert names(tmp_path) == sorted(path.name for path in (tmp_path / "engine", live, *foreign))
    write_folder(tmp_path / "engine", "newer")
    assert not live.exists()


def test_writers_at_the_same_time_all_finish(tmp_path, swap):
    target = tmp_path / "engine"
    failures = []

    def write(text: str) -> None:
        try:
            for _ in range(15):
                write_folder(target, text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (target / "inside" / "file").read_text() in list("abcd")
    assert names(tmp_path) == ["engine"]


def test_links_are_followed(tmp_path):
    write_folder(tmp_path / "disk" / "engine", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "engine")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "engine" / "inside" / "file").read_text() == "new"


def test_json_round_trip(tmp_path):
    target = tmp_path / "new" / "config.json"
    files.write_json(target, {"title": "Amélie", "n": [1, 2.5, None]})
    files.write_json(target, {"title": "Zoë"})
    assert target.read_text(encoding="utf-8") == '{\n  "title": "Zoë"\n}\n'
    assert names(target.parent) == ["config.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(target, {"loss": float("nan")})
    assert json.loads(target.read_text()) == {"title": "Zoë"}


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "abc") == expected


def test_a_thing_of_the_other_kind_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="something else stands where a folder must go"):
        write_folder(tmp_path / "file", "new")
    with pytest.raises(ArtifactError, match="something else stands where a file must go"):
        files.write_atomic(tmp_path / "folder", b"")
    with pytest.raises(ArtifactError, match="a file stands where a parent folder must be"):
        write_folder(tmp_path / "file" / "engine", "new")
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file", "folder"]


def test_what_is_neither_file_nor_folder_is_never_replaced(tmp_path):
    """A pipe stands for a device: root could lose one by a test that finds something."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match="something else stands"):
        files.write_atomic(pipe, b"")
    with pytest.raises(ArtifactError, match="something else stands"):
        write_folder(pipe, "new")
    assert pipe.is_fifo()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_while_filling(tmp_path, code):
    target = tmp_path / "engine"
    write_folder(target, "old")
    line = re.escape(f"{target}: can't be written: {os.strerror(code)}; ")
    with pytest.raises(ArtifactError, match=line) as caught, files.replace_folder(target):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert (target / "inside" / "file").read_text() == "old"


def test_other_errors_of_the_body_pass(tmp_path):
    with pytest.raises(FileNotFoundError), files.replace_folder(tmp_path / "engine"):
        (tmp_path / "no such input").read_bytes()


def test_a_mount_point_is_named_as_such(tmp_path, monkeypatch):
    def busy(left, right):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(files, "_exchange", busy)
    (tmp_path / "engine").mkdir()
    with pytest.raises(ArtifactError, match="mount point: choose a folder inside it"):
        write_folder(tmp_path / "engine", "new")
    assert names(tmp_path) == ["engine"]


@pytest.mark.parametrize("writer", ["safetensors", "bytes"])
def test_a_write_that_the_system_cuts_short(tmp_path, writer):
    """A file size limit stands for the full disk: the system itself fails the write half way."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import numpy
from safetensors.numpy import save_file
from speeder_engine.errors import ArtifactError
from speeder_engine.files import replace_folder, write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, {resource.RLIM_INFINITY}))
target = Path(sys.argv[1])
try:
    if {writer == "bytes"}:
        write_atomic(target, bytes(20_000))
    else:
        with replace_folder(target) as folder:
            save_file({{"weight": numpy.zeros(5_000)}}, folder / "weights.safetensors")
except ArtifactError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, cwd="/")
    assert run.stdout == (
        f"{tmp_path / 'out'}: can't be written: File too large; raise the file size limit or choose another disk\n"
    ), run.stderr
    assert names(tmp_path) == []


def test_a_parent_without_rights(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o500)
    script = """
import os, sys
from pathlib import Path
from speeder_engine.errors import ArtifactError
from speeder_engine.files import replace_folder, write_atomic
if os.geteuid() == 0:
    os.seteuid(65534)
for write in (lambda: write_atomic(Path(sys.argv[1]), b""), lambda: replace_folder(Path(sys.argv[1])).__enter__()):
    try:
        write()
    except ArtifactError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script, str(parent / "out")], capture_output=True, text=True, cwd="/")
    line = f"{parent / 'out'}: can't be written: Permission denied; choose another place or change its permissions\n"
    assert run.stdout == 2 * line, run.stderr


def test_files_are_as_readable_as_their_folder(tmp_path):
    with files.replace_folder(tmp_path / "folder") as beside:
        (beside / "private").write_text("x")
        (beside / "private").chmod(0o600)
    folder, file = (tmp_path / "folder").stat().st_mode, (tmp_path / "folder" / "private").stat().st_mode
    assert file & 0o444 == folder & 0o444
