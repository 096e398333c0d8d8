"""`speeder export onnx`: what it writes, what it refuses, what remains of one that was killed."""

import json
import os
import shutil
import signal
import sys

import onnx
import pytest
import torch
from command import speeder
from reference import make_tiny

from speeder_engine import ArtifactError, ConfigError, ExportError, MissingDependency, Ranking
from speeder_engine.export import OnnxConfig, OnnxEngine, export_onnx, onnx_file, parity, to_onnx
from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.parity import Parity, measure, ranking_error
from speeder_engine.parts import EngineParts

FEW = OnnxConfig(graphs=("compress",))


def test_the_manifest_says_what_was_exported(standard, ort):
    for exported, flavour in ((standard, "standard"), (ort, "ort")):
        manifest = exported.manifest
        assert manifest["engine_revision"] == EngineParts.load(exported.engine_dir).revision
        assert manifest["export"] == {
            "flavour": flavour,
            "dtype": "float32",
            "graphs": ["score", "recommend", "extend", "compress"],
            "opset": 18,
        }
        assert {"torch", "onnx", "onnxscript", "python", "speeder-engine"} <= set(manifest["tools"])
        assert manifest["limits"]["window"] == 12 and manifest["limits"]["num_items"] == 120
        assert set(manifest["files"]) >= {"weights.bin", "items.parquet", "score.onnx"}
        for graph in manifest["graphs"].values():
            assert graph["parity"]["users"] == 40
            assert graph["parity"]["max_error"] < 1e-5
    assert manifest["limits"]["past_begins_at"] == manifest["limits"]["instruction_len"] == 19
    assert "tensorrt" in standard.manifest["providers"] and "tensorrt" not in ort.manifest["providers"]


def test_graphs_have_the_names_that_others_know(standard):
    for name, graph in standard.manifest["graphs"].items():
        model = onnx.load(standard.path / f"{name}.onnx", load_external_data=False).graph
        constants = {each.name for each in model.initializer}
        described = {each["name"]: each for each in graph["inputs"]}
        assert [each.name for each in model.input] == list(described)
        assert {each for each in described if described[each]["has_default"]} == constants & set(described)
        assert [each.name for each in model.output] == [each["name"] for each in graph["outputs"]]
    extend = {each["name"]: each["shape"] for each in standard.manifest["graphs"]["extend"]["inputs"]}
    assert extend["past_key_values.1.key"] == ["batch", 2, "past", 8]
    assert extend["rows"] == ["batch", "rows"]
    outputs = {each["name"] for each in standard.manifest["graphs"]["extend"]["outputs"]}
    assert {"present.0.key", "present.1.value", "top_rows", "scores"} <= outputs


def test_flavours_have_their_operators_and_no_paths_of_this_machine(standard, ort, root):
    for exported, own in ((standard, set()), (ort, {"GroupQueryAttention"})):
        for path in exported.path.glob("*.onnx"):
            model = onnx.load(path, load_external_data=False)
            foreign = {node.op_type for node in model.graph.node if node.domain}
            assert foreign == (own if path.stem != "compress" else set())
            assert str(root).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_graphs_share_their_weights(standard):
    weights = (standard.path / "weights.bin").stat().st_size
    held = sum(value.numel() * 4 for value in standard.tiny.parts().model.state_dict().values())
    # padding to pages is most of what a small model takes
    assert weights < 2 * held + 4096 * 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flavour": "triton"}, "flavour: 'triton' is not one of standard, ort"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
        ({"graphs": ("score", "train")}, r"graphs: \['train'\] are not known"),
        ({"graphs": ()}, "graphs: none named"),
        ({"graphs": ("score", "score")}, "graphs: one is named twice; name each once"),
        ({"opset": 23}, "opset: 23 is not one of 18, 20 for standard float32"),
        ({"dtype": "bfloat16", "opset": 18}, "opset: 18 is not one of 23, 24 for standard bfloat16"),
        ({"flavour": "ort", "opset": 11}, "opset: 11 is not one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OnnxConfig(**settings)


@pytest.mark.parametrize(("dtype", "source"), [("float16", "compress"), ("bfloat16", "ort")])
def test_half_precision(request, tmp_path, dtype, source):
    """bfloat16 is written and checked; ONNX Runtime's CPU can't run it."""
    out, engine_dir = tmp_path / "half", request.getfixturevalue(source).engine_dir
    manifest = export_onnx(engine_dir, out, OnnxConfig(dtype=dtype, graphs=("recommend",)), 40)
    parity = manifest["graphs"]["recommend"]["parity"]
    operators = {node.op_type for node in onnx.load(out / "recommend.onnx", load_external_data=False).graph.node}
    assert {"Attention", "RMSNormalization"} <= operators
    if dtype == "bfloat16":
        assert parity == "not run: ONNX Runtime runs no bfloat16 on a CPU"
        with pytest.raises(ConfigError, match="no bfloat16 on the CPU"):
            OnnxEngine.load(out)
    else:
        assert parity["max_error"] < 5e-3 and parity["bound"] == 5e-3
        assert len(OnnxEngine.load(out).recommend(["0001"], k=3)) == 3


@pytest.mark.parametrize("mixing", ["mean", "concat"])
def test_every_mixing_is_compared(tmp_path, mixing):
    make_tiny(num_layers=1, mixing=mixing).parts().save(tmp_path / "engine")
    manifest = export_onnx(tmp_path / "engine", tmp_path / "onnx", FEW, 40)
    assert manifest["graphs"]["compress"]["parity"]["max_error"] < 1e-5


def test_a_package_that_is_missing_is_named_with_its_extra(compress, tmp_path, monkeypatch):
    for package, extra in (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "ort")):
        with monkeypatch.context() as patch, pytest.raises(MissingDependency, match=rf"speeder-engine\[{extra}\]"):
            patch.setitem(sys.modules, package, None)
            export_onnx(compress.engine_dir, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_translate_is_one_line(tmp_path):
    class Strange(torch.nn.Module):
        def forward(self, values):
            return torch.linalg.eigvals(values).real

    spec = GraphSpec("strange", Strange(), {"values": torch.eye(3)}, {}, {"found": (3,)})
    with (
        WeightsFile(tmp_path) as weights,
        pytest.raises(ExportError, match="graph strange: can't be written") as caught,
    ):
        write_graph(spec, 18, weights)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "strange.onnx").exists()


def test_a_full_disk_leaves_nothing(compress, shared_traces, tmp_path, full_disk):
    refused = pytest.raises(ArtifactError, match="can't be written: File too large; raise the file size limit")
    with full_disk(), refused:
        export_onnx(compress.engine_dir, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced(compress, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not an ONNX export; choose another folder"):
        export_onnx(compress.engine_dir, tmp_path, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    copy = shutil.copytree(compress.path, tmp_path / "copy")
    (copy / "notes.txt").touch()
    with pytest.raises(ArtifactError, match=r"also holds 'notes\.txt', which is not part of the ONNX export"):
        export_onnx(compress.engine_dir, copy, FEW)
    with pytest.raises(ArtifactError, match="is not an ONNX export"):
        export_onnx(compress.engine_dir, compress.engine_dir, FEW)


def test_answers_that_differ_are_not_published(compress, shared_traces, tmp_path, monkeypatch):
    wrong = {"compress": Parity(40, 1e-4, 2e-3, 2e-3, 1.0)}
    monkeypatch.setattr(parity, "run_parity", lambda *_, **__: wrong)
    with pytest.raises(ExportError, match=r"graph compress: scores are off by 0\.002, at most 1e-04 is allowed"):
        export_onnx(compress.engine_dir, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_what_counts_as_an_error():
    expected = Ranking(("a", "b", "c"), (3.0, 2.0, 1.0))
    assert ranking_error(expected, expected) == 0
    assert ranking_error(expected, Ranking(("b", "a", "c"), (3.0, 2.0, 1.0))) == 1  # two items changed places
    assert ranking_error(expected, Ranking(("a", "b", "d"), (3.0, 2.0, 1.0))) == 0  # as good as the last one
    assert ranking_error(expected, Ranking(("d", "a", "b"), (3.0, 3.0, 2.0))) > 0.3
    assert ranking_error(expected, Ranking(("a", "b"), (3.0, 2.0))) == float("inf")
    for strange in (float("nan"), float("inf")):
        found = measure([(expected, Ranking(("a", "b", "c"), (strange, 2.0, 1.0)))], 1e-4)
        with pytest.raises(ExportError):
            found.check("score")
    assert measure([], 1e-4).same_top == 1.0
    off = measure([(expected, Ranking(("a", "b", "c"), (3.0, 2.0, 1.03)))], 5e-3)
    assert off.max_absolute_error == pytest.approx(0.03) and off.max_error == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("module", "function", "existed"), [(onnx_file, "_plain", False), (to_onnx, "_manifest", True)]
)
def test_a_killed_export_leaves_what_was_there(
    compress, shared_traces, in_child, tmp_path, monkeypatch, module, function, existed
):
    """Killed with its weights half written, and with everything but the manifest."""
    out = tmp_path / "out"
    if existed:
        shutil.copytree(compress.path, out)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        child = in_child(lambda: export_onnx(compress.engine_dir, out, FEW, 40))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [leftover] = [path for path in tmp_path.iterdir() if path != out]
    with pytest.raises(ArtifactError, match=r"has no export\.json"):
        OnnxEngine.load(leftover)
    if existed:
        OnnxEngine.load(out)
    assert out.exists() == existed


def test_the_command(compress, shared_traces, tmp_path):
    out = tmp_path / "onnx"
    done = speeder("export", "onnx", compress.engine_dir, out, "--graphs", "compress", "--parity-users", 20, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "export.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "{tmp}/out"], "no engine directory"),
        (["{engine}", "{tmp}/out", "--flavour", "plan"], "flavour: 'plan' is not one of standard, ort"),
        (["{engine}", "{tmp}/out", "--opset", "9"], "opset: 9 is not one of 18, 20"),
        (["{engine}", "{engine}"], "is not an ONNX export"),
    ],
)
def test_every_failure_is_one_line(compress, tmp_path, arguments, message):
    done = speeder("export", "onnx", *(each.format(engine=compress.engine_dir, tmp=tmp_path) for each in arguments))
    assert message in done.error
    assert list(tmp_path.iterdir()) == []
