"""TensorRT plans: really built ahead of time for four chips; run on a stand-in that computes where it is told to."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from command import speeder
from fake_tensorrt import CHIP, FakeBuilder, FakeEngine, fake_runtime, small_parts

from speeder_engine import Engine
from speeder_engine.artifact import read_artifact
from speeder_engine.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    InvalidRequest,
    MissingDependency,
    SpeederWarning,
)
from speeder_engine.export import parity, tensorrt_package, to_tensorrt
from speeder_engine.export.parity import Parity, _compressed
from speeder_engine.export.plan_builder import PlanBuilder
from speeder_engine.export.plan_config import PLANS, PlanConfig
from speeder_engine.export.plan_session import PlanSession
from speeder_engine.export.tensorrt_engine import PlanFiles, TensorRTEngine
from speeder_engine.export.to_tensorrt import export_tensorrt

RUN = PlanConfig(
    dtype="float32",
    chips=(CHIP,),
    graphs=("score", "recommend", "extend", "compress"),
    batch=(2, 4),
    excluded=(8, 40),
    k=(10, 50),
)
needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("tensorrt") / "engine"
    small_parts().save(out)
    return out


@pytest.fixture(scope="module")
def thin_dir(tmp_path_factory):
    """For what is really built: one layer, so that four chips take seconds."""
    out = tmp_path_factory.mktemp("thin") / "engine"
    small_parts(num_layers=1).save(out)
    return out


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory):
    """For what doesn't depend on the graphs: they are traced in seconds."""
    out = tmp_path_factory.mktemp("plain") / "engine"
    small_parts(num_layers=1, followers=False).save(out)
    return out


@pytest.fixture(scope="module")
def exported(engine_dir, traces):
    """An export whose plans run on the stand-in."""
    out = engine_dir.parent / "exported"
    with pytest.MonkeyPatch.context() as patch, traces.used():
        patch.setattr(to_tensorrt, "PlanBuilder", FakeBuilder)
        patch.setattr(to_tensorrt, "load_tensorrt", lambda *_: None)
        export_tensorrt(engine_dir, out, RUN, None, 20)
    return out


@pytest.fixture
def engine(engine_dir):
    return Engine.load(engine_dir, device="cpu", dtype="float32")


@pytest.fixture
def plans(exported):
    return TensorRTEngine(PlanFiles.load(exported), fake_runtime(), CHIP)


@needs_rtx
def test_plans_are_built_for_four_chips_without_any(thin_dir, tmp_path):
    manifest = export_tensorrt(thin_dir, tmp_path / "plans", PlanConfig(graphs=("recommend", "extend")), None, 20)
    sizes = {name: entry["size"] for name, entry in manifest["files"].items() if name != "items.parquet"}
    chips = (80, 86, 89, 120)
    assert set(sizes) == {f"sm{chip}/{graph}.plan" for chip in chips for graph in ("recommend", "extend")}
    assert read_artifact(tmp_path / "plans", PLANS).manifest == manifest
    assert manifest["chips"] == list(chips)
    assert manifest["run"] == "built, not run"
    assert set(manifest["files"]) == {*sizes, "items.parquet"}
    for graph in manifest["graphs"].values():
        assert graph["parity"]["users"] == 20 and graph["parity"]["max_error"] < graph["parity"]["bound"] == 5e-3
    assert manifest["tools"]["tensorrt-rtx"] and manifest["tools"]["torch"]
    recommend = manifest["graphs"]["recommend"]
    assert recommend["inputs"]["history"] == {"dtype": "int64", "shape": ["batch", "history"]}
    assert recommend["profile"] == {
        "batch": [1, 8, 64], "history": [1, 12, 12], "excluded": [1, 64, 1024], "k": [1, 10, 100],
    }  # fmt: skip
    # one chip's plan is not another's
    plans = {(tmp_path / "plans" / f"sm{chip}" / "extend.plan").read_bytes()[:4096] for chip in chips}
    assert len(plans) == len(chips)


@needs_rtx
@pytest.mark.parametrize(
    ("dtype", "source"), [("bfloat16", "thin_dir"), ("float32", "engine_dir"), ("float8", "thin_dir")]
)
def test_plans_of_other_types(request, shared_traces, tmp_path, dtype, source):
    config = PlanConfig(dtype=dtype, chips=(89,), graphs=("recommend",))
    manifest = export_tensorrt(request.getfixturevalue(source), tmp_path / "plans", config, None, 20)
    assert manifest["files"]["sm89/recommend.plan"]["size"] > 10_000
    found = manifest["graphs"]["recommend"]["parity"]
    if dtype == "float32":
        assert found["max_error"] < 1e-5
    else:
        assert found == f"not run: ONNX Runtime runs no {dtype} on a CPU"
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


HISTORIES = [
    {"length": 5},
    {"length": 0},
    {"length": 31, "k": 7},
    {"length": 5, "candidates": slice(20, 40)},
    {"length": 5, "user_id": "ada"},
    {"length": 7, "user_id": "ada"},
    {"length": 7, "user_id": "ada", "candidates": slice(4, 9)},
    {"length": 20, "user_id": "ada"},
    {"length": 6, "user_id": "ada", "deny": slice(50, 60)},
    {"length": 0, "user_id": "bob"},
]


def test_answers_as_the_engine_does(plans, engine):
    ids = engine.catalogue.item_ids
    for case in HISTORIES:
        options = {name: list(ids[part]) if isinstance(part, slice) else part for name, part in case.items()}
        history = list(ids[: options.pop("length")])
        expected, found = engine.recommend(history, **options), plans.recommend(history, **options)
        assert found.items == expected.items, case
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)


def test_a_returning_user_costs_new_rows_alone(plans, engine):
    ids = list(engine.catalogue.item_ids)
    plans.recommend(ids[:6], user_id="ada")
    before = plans.rows_computed
    plans.recommend(ids[:7], user_id="ada")
    assert plans.rows_computed - before == 1
    assert plans.close_session("ada") and not plans.close_session("ada")


SAME_FIVE = [5] * 12
APPENDS = [*range(1, 13), 12, 12]
CORRECTED = [(0, 12), (1, 13), (0, 12), (0, 7), (0, 12), (0, 12)]


@pytest.mark.parametrize("parts", [[12] * 4, APPENDS, SAME_FIVE, [30, 30, 31, 31], [0, 0, 1, 1], CORRECTED])
def test_what_is_kept_never_outgrows_the_profile(plans, engine, parts):
    """Repeats and corrections recompute what was known: the window is the most that a plan's past may have."""
    ids = list(engine.catalogue.item_ids)
    for part in parts:
        start, end = part if isinstance(part, tuple) else (0, part)
        for named in ({}, {"candidates": ids[60:70]}):
            expected = engine.recommend(ids[start:end], **named)
            found = plans.recommend(ids[start:end], user_id="ada", **named)
            assert found.items == expected.items
            assert found.scores == pytest.approx(expected.scores, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "TensorRTEngine.load: expected the path of an export, got None"),
        ({"device": "0"}, "device: expected a whole number within 0..2147483647, got '0'"),
        ({"device": -1}, "device: expected a whole number"),
        ({"device": 2**63}, "device: expected a whole number"),
    ],
)
def test_what_an_engine_cannot_be_loaded_with(exported, settings, message):
    with pytest.raises(ConfigError, match=message):
        TensorRTEngine.load(**{"path": exported, **settings})


def test_an_engine_is_not_pickled_and_says_what_to_do(plans):
    with pytest.raises(TypeError, match=r"TensorRTEngine: can't be pickled or copied; call TensorRTEngine\.load in"):
        pickle.dumps(plans)


def test_large_batches_are_cut_to_the_profile(plans, engine):
    ids = list(engine.catalogue.item_ids)
    from speeder_engine import Request

    requests = [Request(ids[i : i + 3]) for i in range(11)]
    assert [ranking.items for ranking in plans.recommend_many(requests)] == [
        ranking.items for ranking in engine.recommend_many(requests)
    ]


@pytest.mark.parametrize("user_id", [None, "ada"])
@pytest.mark.parametrize("options", [{"allow": slice(20, 22)}, {"deny": slice(21, 90)}, {"k": 10**30}])
def test_candidates_have_no_limits_of_a_search(plans, engine, options, user_id):
    """What may not be answered and k are no input of what scores them: here of more items than plans take."""
    ids = list(engine.catalogue.item_ids)
    options = {name: ids[part] if isinstance(part, slice) else part for name, part in options.items()}
    for length in (5, 6):
        expected = engine.recommend(ids[:length], candidates=ids[20:23], **options)
        found = plans.recommend(ids[:length], candidates=ids[20:23], user_id=user_id, **options)
        assert found.items == expected.items
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_lists_of_new_items_are_cut_to_the_profile(plans, engine, count):
    rng = np.random.default_rng(0)
    widths = engine.parts.config.compressor.modalities
    features = {name: rng.standard_normal((count, width)).astype(np.float32) for name, width in widths.items()}
    expected = _compressed(engine.parts.config.compressor, engine.parts.compressor, features)
    np.testing.assert_allclose(plans.compress(features), expected, atol=1e-5)


def test_changes_at_run_time_reach_the_plan(plans, engine):
    ids = list(engine.catalogue.item_ids)
    first = plans.recommend(ids[:3]).items[0]
    for each in (plans, engine):
        each.set_available([first], False)
        each.set_prior({ids[77]: 50.0})
    assert plans.recommend(ids[:3]).items == engine.recommend(ids[:3]).items
    assert plans.recommend(ids[:3]).items[0] == ids[77]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 10**30}, "k: 120 are more than the 50 these plans take; export with --k 10,120"),
        ({"k": 51}, "k: 51 are more than the 50 these plans take; export with --k 10,51"),
        ({"candidates": slice(0, 101)}, "candidates: 101 are more than the 100"),
        ({"allow": slice(0, 5)}, "excluded: 117 are more than the 40"),
        ({"head": "title", "candidates": slice(0, 5)}, "trained without a title head"),
    ],
)
def test_what_no_profile_takes_is_refused(plans, engine, options, message):
    ids = list(engine.catalogue.item_ids)
    options = {name: ids[part] if isinstance(part, slice) else part for name, part in options.items()}
    with pytest.raises(InvalidRequest, match=message):
        plans.recommend(ids[:2], **options)


def test_a_session_checks_every_shape(exported):
    runtime = fake_runtime()
    engine = runtime.deserialize(*PlanFiles.load(exported).plan("score", CHIP))
    session = PlanSession("score", runtime, engine)
    good = {
        "history": np.zeros((1, 3), np.int64),
        "lengths": np.array([3]),
        "candidates": np.zeros((1, 2), np.int64),
        "available": np.ones(120, bool),
        "prior": np.zeros(120, np.float32),
    }
    arrays, [kept] = session.run(good, ["scores"], {"retrieve_scores": None})
    assert arrays["scores"].shape == (1, 2) and session.shape(kept) == (1, 2)
    for name, value in {
        "history": np.zeros((1, 13), np.int64),
        "lengths": np.zeros(5, np.int64),
        "candidates": np.zeros((1, 0), np.int64),
        "available": np.ones(119, bool),
        "prior": np.zeros((120, 1), np.float32),
    }.items():
        with pytest.raises(InvalidRequest, match=f"{name}: .* is beyond the profile"):
            session.run(good | {name: value}, ["scores"])
    session._context.execute_async_v3 = lambda _: False
    with pytest.raises(ExportError, match="plan score: failed while it ran: as it was told to"):
        session.run(good, ["scores"])


def test_an_altered_plan_is_not_loaded(exported, tmp_path, monkeypatch):
    files = PlanFiles.load(exported)
    path, sha256 = files.plan("score", CHIP)
    content = path.read_bytes()
    loaded = []
    runtime = fake_runtime()
    monkeypatch.setattr(
        runtime.runtime, "deserialize_cuda_engine", lambda plan: loaded.append(plan) or FakeEngine(plan)
    )
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=r"score\.plan: has the hash .*: altered"):
            PlanFiles.load(exported)
        # altered behind our back, after the directory was verified
        with pytest.raises(ArtifactError, match=r"score\.plan: is not the plan that the manifest lists"):
            runtime.deserialize(path, sha256)
        assert loaded == []
        (path.parent / "foreign.plan").write_bytes(content)
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"foreign\.plan' is not listed"):
            PlanFiles.load(exported)
    finally:
        path.write_bytes(content)
        (path.parent / "foreign.plan").unlink(missing_ok=True)
    monkeypatch.setattr(runtime.runtime, "deserialize_cuda_engine", lambda _: None)
    with pytest.raises(ArtifactError, match="TensorRT can't load it: as it was told to"):
        runtime.deserialize(path, sha256)


def test_a_plan_is_one_chips_and_one_versions(exported, monkeypatch):
    files = PlanFiles.load(exported)
    with pytest.raises(ConfigError, match=r"this GPU is an SM 90, .* holds plans for 89; export it again"):
        files.plan("score", 90)
    monkeypatch.setattr("speeder_engine.export.tensorrt_engine.installed_version", lambda _: "9.9")
    with pytest.raises(ArtifactError, match=r"built with tensorrt-rtx .*, here is 9\.9; install that version"):
        files.check_tool()


def test_without_a_driver_it_says_so_and_lives(exported):
    code = (
        "import sys\nfrom speeder_engine.errors import ConfigError\n"
        "from speeder_engine.export.tensorrt_engine import TensorRTEngine\n"
        "try: TensorRTEngine.load(sys.argv[1])\n"
        "except ConfigError as error: print(error)\n"
        "print('tensorrt_rtx' in sys.modules)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    message, imported = done.stdout.splitlines()
    assert "TensorRTEngine needs an NVIDIA GPU and its driver: " in message
    assert imported == "False"


def test_a_missing_package_names_the_extra(engine_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_package, "find_spec", lambda _: None)
    for runtime, chips in (("rtx", (80,)), ("tensorrt", ())):
        with pytest.raises(MissingDependency, match=rf"speeder-engine\[{runtime}\]"):
            export_tensorrt(engine_dir, tmp_path / "out", PlanConfig(runtime=runtime, chips=chips))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runtime": "cuda"}, "runtime: 'cuda' is not one of rtx, tensorrt"),
        ({"dtype": "fp7"}, "dtype: 'fp7' is not one of"),
        ({"chips": (80, 90)}, r"chips: \[90\] can't be built for ahead; choose of 75, 80"),
        ({"chips": ()}, "chips: none named"),
        ({"runtime": "tensorrt"}, "chips: tensorrt builds for the GPU that is there"),
        ({"dtype": "float8"}, r"chips: \[80, 86\] multiply no float8"),
        ({"graphs": ("title",)}, r"graphs: \['title'\] are not known; choose of score"),
        ({"graphs": ()}, "graphs: none named; choose of score"),
        ({"graphs": ("score", "extend", "score")}, "graphs: one is named twice; name each once"),
        ({"chips": (80, 80)}, "chips: one is named twice; name each once"),
        ({"batch": (8,)}, "batch: expected TYPICAL,MOST with 1 <= TYPICAL <= MOST <= 2147483647, got 8"),
        ({"excluded": (64, 10**30)}, "excluded: expected TYPICAL,MOST"),
        ({"candidates": (0, 5)}, "candidates: expected TYPICAL,MOST"),
        ({"k": (10, 5000)}, "k: TensorRT finds at most 3840"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        PlanConfig(**settings)


def test_tensorrt_builds_for_the_gpu_that_is_there(engine_dir, shared_traces, tmp_path, monkeypatch):
    """With a stand-in for builder and GPU: folders are named after the chip, the timing cache is read and written."""

    class Builder(FakeBuilder):
        def build(self, graph, shapes, limits, chip):
            assert chip is None
            self.timing_cache += b"measured "
            return super().build(graph, shapes, limits, chip)

    for name, value in {
        "find_chip": lambda _: 90,
        "check_installed": lambda *_: None,
        "load_tensorrt": lambda *_: None,
    }.items():
        monkeypatch.setattr(to_tensorrt, name, value)
    monkeypatch.setattr(to_tensorrt, "PlanBuilder", Builder)
    monkeypatch.setattr("speeder_engine.export.tools.version", lambda _: "1.2.3")
    config = PlanConfig(runtime="tensorrt", chips=(), graphs=("compress",))
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        manifest = export_tensorrt(engine_dir, tmp_path / "out", config, cache, 20)
        assert set(manifest["files"]) == {"sm90/compress.plan", "items.parquet"}
    assert cache.read_bytes() == b"measured measured "
    monkeypatch.setattr(to_tensorrt, "write_atomic", lambda *_: (_ for _ in ()).throw(ArtifactError("cache: full")))
    with pytest.warns(SpeederWarning, match="^timing cache: cache: full; the plans are whole$"):
        export_tensorrt(engine_dir, tmp_path / "out", config, cache, 20)
    assert read_artifact(tmp_path / "out", PLANS).manifest["chips"] == [90]
    with pytest.raises(ConfigError, match="is no timing cache"):
        export_tensorrt(engine_dir, tmp_path / "out", config, tmp_path / "out")


@pytest.fixture
def stand_in(monkeypatch, shared_traces):
    """The builder's."""
    monkeypatch.setattr(to_tensorrt, "PlanBuilder", FakeBuilder)
    monkeypatch.setattr(to_tensorrt, "check_installed", lambda *_: None)
    monkeypatch.setattr(to_tensorrt, "load_tensorrt", lambda *_: None)


FEW = PlanConfig(graphs=("compress",), chips=(CHIP,))


def test_plans_of_graphs_that_are_off_are_not_built(stand_in, plain_dir, tmp_path, monkeypatch):
    wrong = {"compress": Parity(20, 1e-4, 2e-3, 2e-3, 1.0)}
    monkeypatch.setattr(parity, "run_parity", lambda *_, **__: wrong)
    monkeypatch.setattr(FakeBuilder, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(ExportError, match=r"graph compress: scores are off by 0\.002, at most 1e-04 is allowed"):
        export_tensorrt(plain_dir, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_plans_of_what_onnx_refuses_are_not_built(stand_in, plain_dir, tmp_path, monkeypatch):
    def refuse(path, full_check):
        assert path.name == "compress.onnx" and full_check
        raise ValueError("no good")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match=r"compress\.onnx: onnx\.checker refuses it: no good"):
        export_tensorrt(plain_dir, tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_plans_are_built_and_the_manifest_says_so(stand_in, plain_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    manifest = export_tensorrt(plain_dir, tmp_path / "out", FEW)
    wanted = "not run: provider 'cpu' needs the package onnxruntime: pip install 'speeder-engine[ort]'"
    assert manifest["graphs"]["compress"]["parity"] == wanted


class CacheConfig:
    """A builder's config on the GPU "here"; `has_cache`: whether it takes one at all."""

    def __init__(self, has_cache=True):
        self.has_cache, self.cache = has_cache, None

    def add_optimization_profile(self, profile):
        pass

    def create_timing_cache(self, content):
        return None if content == b"noise" else SimpleNamespace(serialize=lambda: (content or b"here:") + b" more")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        taken = self.has_cache and bytes(cache.serialize()).startswith(b"here:")
        self.cache = cache if taken else self.cache
        return taken

    def get_timing_cache(self):
        return self.cache


class BareBuilder(PlanBuilder):
    """Without a network."""

    def __init__(self, config, timing_cache):
        self.timing_cache, self.monitor = timing_cache, SimpleNamespace(interrupted=False)
        self.builder = SimpleNamespace(
            create_builder_config=lambda: config, build_serialized_network=lambda network, config: b"plan"
        )

    def _parse(self, graph):
        return None, None

    def _profile(self, network, shapes, limits):
        return None


@pytest.mark.parametrize(
    ("known", "has_cache", "kept", "warned"),
    [
        (None, True, None, False),
        (b"", True, b"here: more", False),
        (b"here: some", True, b"here: some more", False),
        (b"there: some", True, b"here: more", True),
        (b"noise", True, b"here: more", True),
        (b"there: some", False, b"there: some", True),
    ],
)
def test_a_timing_cache_of_another_gpu_is_replaced(known, has_cache, kept, warned):
    builder = BareBuilder(CacheConfig(has_cache), known)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert builder.build(Path("score.onnx"), {}, {}, None) == b"plan"
    assert [each.category for each in caught] == [SpeederWarning] * warned
    assert builder.timing_cache == kept


def test_a_profile_beyond_the_model_is_refused(engine_dir, tmp_path):
    with pytest.raises(ConfigError, match="history: the profile takes 60 rows, the model's window is 12"):
        export_tensorrt(engine_dir, tmp_path / "out", PlanConfig(history=(20, 60)))
    with pytest.raises(ConfigError, match="timing cache: tensorrt-rtx measures nothing"):
        export_tensorrt(engine_dir, tmp_path / "out", PlanConfig(), tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tensorrt", "{engine}", "{tmp}/out", "--chips", "80,x"], "chips: expected whole numbers between commas"),
        (["tensorrt", "{engine}", "{tmp}/out", "--chips", "90"], "chips: [90] can't be built for ahead"),
        (["tensorrt", "{engine}", "{tmp}/out", "--chips", "80,86,80"], "chips: one is named twice"),
        (["triton", "{engine}", "{tmp}/out", "--graphs", "score,score"], "graphs: one is named twice"),
        (["tensorrt", "{engine}", "{tmp}/out", "--dtype", "int2"], "dtype: 'int2' is not one of"),
        (["tensorrt", "{engine}", "{tmp}/out", "--history", "5,50"], "the model's window is 12"),
        (["tensorrt", "{tmp}", "{tmp}/out"], "no engine directory"),
        (["tensorrt", "{engine}", "{tmp}/used", "--graphs", "compress", "--chips", "80"], "used: is not a"),
        (["triton", "{engine}", "{tmp}/out", "--backend", "onnx"], "backend: 'onnx' is not one of"),
        (["triton", "{engine}", "{tmp}/out", "--batch", "9,3"], "batch: expected TYPICAL,MOST"),
        (["triton", "{engine}", "{tmp}/used"], "used: is not a"),
    ],
)
def test_every_failure_is_one_line_and_leaves_nothing(engine_dir, tmp_path, arguments, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    done = speeder("export", *(each.format(engine=engine_dir, tmp=tmp_path) for each in arguments))
    assert message in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("tensorrt", ["--graphs", "compress", "--chips", "80"]), ("triton", ["--graphs", "recommend"])],
)
def test_a_full_disk_leaves_nothing(plain_dir, shared_traces, tmp_path, full_disk, kind, options):
    arguments = ["export", kind, plain_dir, tmp_path / "out", *options, "--parity-users", 20]
    assert speeder(*arguments).returncode == 0
    shutil.rmtree(tmp_path / "out")
    with full_disk():
        done = speeder(*arguments)
    assert "File too large" in done.error and "choose another disk" in done.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(
    ("kind", "options", "sign"),
    [
        ("tensorrt", ["--graphs", "compress", "--chips", "80,86,89,120"], "sm86/compress.plan"),
        ("triton", ["--graphs", "recommend,score"], "recommend/1/model.onnx"),
    ],
)
def test_a_killed_export_leaves_nothing_that_loads(plain_dir, shared_traces, in_child, tmp_path, kind, options, sign):
    """kill -9 in the middle: nothing stands in OUT's place, and the next export cleans up behind it."""
    out = tmp_path / "out"
    arguments = ["export", kind, str(plain_dir), str(out), *options]

    def export():
        if kind == "tensorrt":  # whose library is not made to be copied with a process
            command = [sys.executable, "-c", "from speeder_engine.cli import main; main()"]
            os.execv(sys.executable, [*command, *arguments])
        speeder(*arguments)

    child, deadline = in_child(export), time.monotonic() + 240
    while not list(tmp_path.glob(f".out.*.tmp/{sign}")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists()
    [left] = tmp_path.iterdir()
    assert not (left / "export.json").exists()
    with pytest.raises(ArtifactError, match=r"has no export\.json"):
        read_artifact(left, PLANS)
    few = [*options[:1], options[1].split(",")[0], *options[2:], "--parity-users", "20"]
    done = speeder("export", kind, plain_dir, out, *few)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((out / "export.json").read_text())["format"] == f"speeder-{kind}"


@needs_rtx
def test_the_command_tells_what_it_built(thin_dir, shared_traces, tmp_path):
    out = tmp_path / "plans"
    options = ["--graphs", "compress", "--chips", "86,120", "--parity-users", "20"]
    done = speeder("export", "tensorrt", thin_dir, out, *options, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["plans"]) == {"sm86/compress.plan", "sm120/compress.plan"}
    assert answer["parity"]["compress"]["users"] == 20
    assert Path(out / "sm86" / "compress.plan").is_file()
