import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder_engine.data.images import open_images
from speeder_engine.errors import DataError

FILES = {"01.jpg": b"1", "2.PNG": b"2", "a.b.webp": b"3", "4.txt": b"4"}
EXPECTED = {"01": b"1", "2": b"2", "a.b": b"3", "4": None, "1": None, "../01": None}


@pytest.fixture(params=["folder", "zip", "nested zip", "parquet"])
def images(request, tmp_path):
    if request.param == "folder":
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        return tmp_path
    if request.param == "parquet":
        there = {item_id: content for item_id, content in EXPECTED.items() if content}
        pq.write_table(pa.table({"item_id": [*there], "image": [*there.values()]}), tmp_path / "images.parquet")
        return tmp_path / "images.parquet"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"some/where/{name}" if "nested" in request.param else name, content)
            archive.writestr(f"__MACOSX/._{name}", b"fork")
    return tmp_path / "x.zip"


def test_reads_by_id(images):
    source = open_images(images)
    assert {item_id: source.read(item_id) for item_id in EXPECTED} == EXPECTED
    assert {item_id: item_id in source for item_id in EXPECTED} == {k: v is not None for k, v in EXPECTED.items()}


def test_two_images_for_one_item(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"two images for item '1': 1\.jpg and 1\.png"):
        open_images(tmp_path).read("1")


def test_opens_nothing_before_it_is_asked_and_names_a_broken_zip(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    source = open_images(tmp_path / "x.zip")
    with pytest.raises(DataError, match=r"x\.zip: can't be read as a zip"):
        source.read("1")


def test_a_damaged_member_is_named(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"precious content")
    path.write_bytes(path.read_bytes().replace(b"precious", b"precioux"))
    with pytest.raises(DataError, match=r"1\.jpg can't be unpacked"):
        open_images(path).read("1")


def test_a_damaged_stream_is_named(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", bytes(range(256)) * 9)
    content = bytearray(path.read_bytes())
    start = content.index(b"1.jpg") + 5
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1\.jpg can't be unpacked: Error -3 while decompressing"):
        open_images(path).read("1")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "1.jpg").mkdir()
    with pytest.raises(DataError, match=r"1\.jpg: can't be read: Is a directory"):
        open_images(tmp_path).read("1")


def test_what_holds_no_images(tmp_path):
    with pytest.raises(DataError, match=r"a folder, a \.zip or a \.parquet"):
        open_images(tmp_path / "absent.zip")
    (tmp_path / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"images\.parquet: can't be read"):
        open_images(tmp_path / "images.parquet")
