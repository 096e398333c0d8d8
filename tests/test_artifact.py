import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speeder_engine.artifact import FORMAT_VERSION, MANIFEST, Artifact, read_artifact, write_artifact
from speeder_engine.errors import ArtifactError

CONTENT = {
    "items.parquet": b"PAR1 rows PAR1",
    "encoders/text.json": b'{"kind": "tfidf"}',
    "weights.safetensors": b"\0\1\2",
}
FIELDS = {"window": 50, "heads": ["rank", "retrieve"], "instruction": "Le prochain film d'Amélie ?"}


def fill(folder: Path) -> dict:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return FIELDS


@pytest.fixture
def engine(tmp_path) -> Path:
    write_artifact(tmp_path / "engine", fill)
    return tmp_path / "engine"


def forge(engine: Path, **fields) -> None:
    """Changes the manifest and signs it anew, as somebody who knows the format would; None removes a field."""
    manifest = json.loads((engine / MANIFEST).read_text()) | fields
    manifest = {key: value for key, value in manifest.items() if key != "digest" and value is not None}
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (engine / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def refusal(engine: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reads_what_was_written(engine):
    artifact = read_artifact(engine)
    assert {key: artifact.manifest[key] for key in FIELDS} == FIELDS
    assert artifact.manifest["format_version"] == FORMAT_VERSION
    assert artifact.names == ("encoders/text.json", "items.parquet", "weights.safetensors")
    assert {name: artifact.file(name).read_bytes() for name in artifact.names} == CONTENT
    assert artifact.total_size == sum(len(content) for content in CONTENT.values())
    with pytest.raises(ArtifactError, match=r"holds no tokenizer\.json, only 'encoders/text\.json', "):
        artifact.file("tokenizer.json")


def test_the_manifest_says_sizes_and_hashes(engine):
    listed = json.loads((engine / MANIFEST).read_text())["files"]
    for name, content in CONTENT.items():
        assert listed[name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_same_content_is_the_same_bytes(engine, tmp_path):
    write_artifact(tmp_path / "again", fill)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (engine / MANIFEST).read_bytes()


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_every_flipped_byte_is_found(engine, name):
    path = engine / name
    content = path.read_bytes()
    for position in range(len(content)):
        for flip in (0x01, 0x20, 0x29):  # among them upper and lower case, blank and tab
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            with pytest.raises(ArtifactError, match=re.escape(str(path))):
                read_artifact(engine)


@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_every_truncation_is_found(engine, name):
    path = engine / name
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match=re.escape(str(path))):
            read_artifact(engine)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([*CONTENT, MANIFEST]), st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_other_content_is_found(engine, name, content):
    path = engine / name
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        if content != original:
            assert str(path) in refusal(engine)
    finally:
        path.write_bytes(original)


def lengthen(engine: Path) -> None:
    with (engine / "items.parquet").open("ab") as file:
        file.write(b"!")


def swap_for_link(engine: Path) -> None:
    (engine / "items.parquet").rename(engine.parent / "elsewhere")
    (engine / "items.parquet").symlink_to(engine.parent / "elsewhere")


def swap_folder_for_link(engine: Path) -> None:
    (engine / "encoders").rename(engine.parent / "elsewhere")
    (engine / "encoders").symlink_to(engine.parent / "elsewhere")


def swap_for_pipe(engine: Path) -> None:
    (engine / "items.parquet").unlink()
    os.mkfifo(engine / "items.parquet")


def swap_for_folder(engine: Path) -> None:
    (engine / "items.parquet").unlink()
    (engine / "items.parquet").mkdir()


def link_the_manifest(engine: Path) -> None:
    (engine / MANIFEST).rename(engine.parent / "elsewhere")
    (engine / MANIFEST).symlink_to(engine.parent / "elsewhere")


def add_a_field(engine: Path) -> None:
    (engine / MANIFEST).write_text(
        (engine / MANIFEST).read_text().replace('"window": 50', '"window": 50, "window": 50')
    )


def listing(name: str, **changes) -> dict:
    return {"files": {name: {"size": 3, "sha256": "0" * 64, **changes}}}


REFUSED = {
    "missing file": (lambda engine: (engine / "items.parquet").unlink(), "items.parquet: is missing; export it again"),
    "longer file": (lengthen, "items.parquet: has 15 bytes, engine.json says 14: truncated or altered"),
    "altered file": (
        lambda engine: (engine / "weights.safetensors").write_bytes(b"\0\1\3"),
        "says ae4b3280e56e…: altered",
    ),
    "link": (swap_for_link, "items.parquet: is a link; the engine directory holds plain files"),
    "linked folder": (swap_folder_for_link, "encoders: is a link; the engine directory holds plain files"),
    "linked manifest": (link_the_manifest, "engine.json: is not a regular file"),
    "pipe": (swap_for_pipe, "items.parquet: is not a regular file"),
    "folder for a file": (swap_for_folder, "items.parquet: is missing"),
    "foreign file": (
        lambda engine: (engine / ".DS_Store").touch(),
        "'.DS_Store' is not listed in engine.json; move it",
    ),
    "foreign below": (lambda engine: (engine / "encoders" / "x").touch(), "'encoders/x' is not listed in engine.json"),
    "no manifest": (
        lambda engine: (engine / MANIFEST).unlink(),
        "engine has no engine.json; export one with `speeder ",
    ),
    "not JSON": (lambda engine: (engine / MANIFEST).write_text("{"), "engine.json: is not JSON, truncated or damaged"),
    "not UTF-8": (lambda engine: (engine / MANIFEST).write_bytes(b'{"a": "\xff"}'), "engine.json: is not JSON"),
    "too deep": (lambda engine: (engine / MANIFEST).write_text("[" * 100_000), "engine.json: is not JSON"),
    "a list": (lambda engine: (engine / MANIFEST).write_text("[]"), "engine.json: is not of format 'speeder-engine'"),
    "NaN": (lambda engine: forge(engine, loss=float("nan")), "engine.json: was altered after it was written"),
    "repeated field": (add_a_field, "engine.json: was altered after it was written"),
    "other format": (lambda engine: forge(engine, format="onnx"), "engine.json: is not of format 'speeder-engine'"),
    "newer": (
        lambda engine: forge(engine, format_version=2),
        "has format version 2, this speeder-engine reads 1; upgrade",
    ),
    "older": (
        lambda engine: forge(engine, format_version=0),
        "has format version 0, this speeder-engine reads 1; export",
    ),
    "true version": (lambda engine: forge(engine, format_version=True), "has format version True"),
    "no version": (lambda engine: forge(engine, format_version=None), "has format version None"),
    "no files": (lambda engine: forge(engine, files=None), "engine.json: lists its files in a way"),
    "files a list": (lambda engine: forge(engine, files=[]), "engine.json: lists its files in a way"),
    "no size": (lambda engine: forge(engine, **listing("a", size=None)), "engine.json: lists its files in a way"),
    "short hash": (lambda engine: forge(engine, **listing("a", sha256="0")), "engine.json: lists its files in a way"),
    "absolute": (lambda engine: forge(engine, **listing("/etc/passwd")), "lists '/etc/passwd', which leads out"),
    "upwards": (lambda engine: forge(engine, **listing("../x")), "engine.json: lists '../x', which leads out"),
    "up inside": (lambda engine: forge(engine, **listing("encoders/../x")), "lists 'encoders/../x', which leads out"),
    "itself": (lambda engine: forge(engine, **listing("engine.json")), "lists 'engine.json', which leads out"),
    "zero byte": (lambda engine: forge(engine, **listing("a\0")), "which leads out"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_refused_with_the_name_and_the_reason(engine, damage):
    change, expected = REFUSED[damage]
    change(engine)
    message = refusal(engine)
    assert str(engine) in message
    assert expected in message


def test_a_forged_listing_of_the_true_files_still_loads(engine):
    """So that the refusals above are for what they say, not for the forgery."""
    forge(engine, window=10)
    assert read_artifact(engine).manifest["window"] == 10


def test_no_directory_at_all(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "nothing").startswith(
        f"no engine directory: {tmp_path / 'nothing'} is not a folder; export"
    )
    assert refusal(tmp_path / "file").startswith("no engine directory: ")


def test_hard_links_and_a_link_to_the_directory_are_fine(engine, tmp_path):
    (tmp_path / "copy").hardlink_to(engine / "items.parquet")
    (tmp_path / "link").symlink_to(engine)
    assert isinstance(read_artifact(tmp_path / "link"), Artifact)


def test_an_unreadable_file_is_one_error(engine, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("speeder_engine.artifact.sha256_file", refuse)
    assert refusal(engine).startswith(f"{engine / 'encoders/text.json'}: can't be read: Permission denied; ")


def test_an_export_replaces_an_engine_or_an_empty_folder(engine, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (engine, tmp_path / "empty"):
        write_artifact(out, lambda folder: {"window": 7})
        assert read_artifact(out).manifest["window"] == 7
        assert read_artifact(out).names == ()


def test_a_damaged_engine_can_be_exported_again(engine):
    (engine / "items.parquet").unlink()
    write_artifact(engine, fill)
    read_artifact(engine)


def mine(folder: Path) -> None:
    (folder / "thesis.tex").write_text("years of work")


def someones_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": "steam engine", "files": {}}')


@pytest.mark.parametrize("put", [mine, someones_manifest, lambda folder: (folder / MANIFEST).write_text("[")])
def test_an_export_never_replaces_another_folder(tmp_path, put):
    out = tmp_path / "home"
    out.mkdir()
    put(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ArtifactError, match="is not an engine directory; choose another folder or remove it"):
        write_artifact(out, fill)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_keeps_what_others_put_into_an_engine(engine):
    mine(engine)
    with pytest.raises(ArtifactError, match=r"also holds 'thesis\.tex', which is not part of the engine"):
        write_artifact(engine, fill)
    assert (engine / "thesis.tex").read_text() == "years of work"


def test_what_appears_while_filling_is_kept(tmp_path):
    def slowly(folder):
        (tmp_path / "out").mkdir()
        mine(tmp_path / "out")
        return fill(folder)

    with pytest.raises(ArtifactError, match="is not an engine directory"):
        write_artifact(tmp_path / "out", slowly)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_a_failing_export_leaves_the_old_engine(engine, tmp_path):
    def fail(folder):
        fill(folder)
        raise RuntimeError("out of memory")

    for out in (engine, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="out of memory"):
            write_artifact(out, fail)
    read_artifact(engine)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_links_are_not_exported(tmp_path):
    def link(folder):
        (folder / "weights.safetensors").symlink_to("/dev/null")
        return {}

    with pytest.raises(ArtifactError, match=r"weights\.safetensors: is a link"):
        write_artifact(tmp_path / "out", link)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["format", "format_version", "files", "digest"])
def test_the_containers_own_fields_are_its_own(tmp_path, field):
    with pytest.raises(ValueError, match=field):
        write_artifact(tmp_path / "out", lambda folder: {field: 1})


def test_the_manifest_is_not_the_fillers(tmp_path):
    with pytest.raises(ValueError, match="written by the container"):
        write_artifact(tmp_path / "out", lambda folder: {"n": (folder / MANIFEST).write_text("{}")})
