"""Graphs that must not reach a runtime: their paths, their operators, and files that were meddled with."""

import os
import shutil

import onnx
import pytest

from speeder_engine import ArtifactError, ExportError
from speeder_engine.export import OnnxEngine
from speeder_engine.export.onnx_check import check_graph


@pytest.fixture
def copy(compress, tmp_path):
    return shutil.copytree(compress.path, tmp_path / "copy")


def change(path, edit):
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())


def point_to(location, **more):
    def edit(model):
        moved = [each for each in model.graph.initializer if each.external_data]
        assert moved, "the graph keeps its weights elsewhere"
        entries = {entry.key: entry.value for entry in moved[-1].external_data} | {"location": location} | more
        del moved[-1].external_data[:]
        for key, value in entries.items():
            moved[-1].external_data.add(key=key, value=str(value))

    return edit


def test_a_whole_graph_passes(copy):
    check_graph(copy / "compress.onnx", "standard")


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../weights.bin", "..", "", "a/../weights.bin", "sub/weights.bin", "..\\weights.bin"]
)
def test_weights_elsewhere_are_refused(copy, location):
    change(copy / "compress.onnx", point_to(location))
    with pytest.raises(ArtifactError, match="not in a file beside the graph") as caught:
        check_graph(copy / "compress.onnx", "standard")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_linked_weights_are_refused(copy, tmp_path, link):
    shutil.move(copy / "weights.bin", tmp_path / "secret")
    link(tmp_path / "secret", copy / "weights.bin")
    with pytest.raises(ArtifactError, match="is a link or no plain file"):
        check_graph(copy / "compress.onnx", "standard")
    with pytest.raises(ArtifactError, match="link"):
        OnnxEngine.load(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (point_to("nothing.bin"), "which is missing"),
        (point_to("weights.bin", offset=10**9), "lie outside of weights.bin"),
        (point_to("weights.bin", offset=-4), "lie outside of weights.bin"),
        (point_to("weights.bin", length="many"), "lie outside of weights.bin"),
    ],
)
def test_weights_that_are_not_there(copy, edit, message):
    change(copy / "compress.onnx", edit)
    with pytest.raises(ArtifactError, match=message):
        check_graph(copy / "compress.onnx", "standard")


def rename(op_type, domain=""):
    def edit(model):
        model.graph.node[0].op_type, model.graph.node[0].domain = op_type, domain

    return edit


def inside_a_branch(model):
    branch = onnx.helper.make_graph([onnx.helper.make_node("Frobnicate", [], ["x"])], "then", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("edit", "operator"),
    [
        (rename("Frobnicate"), "Frobnicate"),
        (rename("Attention"), "Attention"),  # of opset 23, the graph says 18
        (rename("GroupQueryAttention", "com.microsoft"), "com.microsoft::GroupQueryAttention"),
        (inside_a_branch, "Frobnicate"),
    ],
)
def test_unknown_operators_are_named(copy, edit, operator):
    change(copy / "compress.onnx", edit)
    with pytest.raises(ExportError, match=f"operator '{operator}' is unknown to standard graphs of opset 18"):
        check_graph(copy / "compress.onnx", "standard")


def test_no_onnx_at_all(copy):
    (copy / "compress.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="is no ONNX file"):
        check_graph(copy / "compress.onnx", "standard")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["compress.onnx", "weights.bin", "items.parquet", "export.json"])
@pytest.mark.parametrize("meddle", [truncate, alter, os.remove])
def test_a_file_that_was_meddled_with_is_found_before_anything_runs(copy, name, meddle):
    meddle(copy / name)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
        OnnxEngine.load(copy)
    assert "\n" not in str(caught.value)


def test_a_foreign_file_is_found(copy):
    (copy / "model.onnx.data").touch()
    with pytest.raises(ArtifactError, match=r"'model\.onnx\.data' is not listed"):
        OnnxEngine.load(copy)
