"""Triton repositories: configs against Triton's own schema and against the graphs, answers against the engine."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeBuilder, FakeEngine, small_parts
from fake_triton import FakeTriton, Refused, Tensor, ids, load_step, named, read_config
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as schema

from speeder_engine import Engine
from speeder_engine.artifact import read_artifact
from speeder_engine.config import CalendarConfig
from speeder_engine.errors import ArtifactError, ConfigError, ExportError
from speeder_engine.export import OnnxConfig, triton_server
from speeder_engine.export.onnx_engine import OnnxFiles
from speeder_engine.export.parity import compare
from speeder_engine.export.served_engine import ServedEngine
from speeder_engine.export.served_graph import served_specs
from speeder_engine.export.static_graph import StaticModel
from speeder_engine.export.triton_config import SERVED, TRITON, TritonConfig, queueing, render
from speeder_engine.export.triton_server import export_triton
from speeder_engine.parts import EngineParts

CONFIG = TritonConfig(k=20, candidates=(20, 40), excluded=(16, 64), batch=(2, 4))
ONNX_TYPES = {
    onnx.TensorProto.INT64: schema.TYPE_INT64,
    onnx.TensorProto.FLOAT: schema.TYPE_FP32,
    onnx.TensorProto.FLOAT16: schema.TYPE_FP16,
}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "engine"
    small_parts().save(out)
    return out


@pytest.fixture(scope="module")
def repository(engine_dir, traces):
    out = engine_dir.parent / "repository"
    with traces.used():
        export_triton(engine_dir, out, CONFIG, 40)
    return out


@pytest.fixture(scope="module")
def engine(engine_dir):
    return Engine.load(engine_dir, device="cpu", dtype="float32")


@pytest.fixture
def server(repository):
    return FakeTriton(repository)


def dims(value):
    return [entry.dim_value or -1 for entry in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", SERVED)
def test_configs_say_what_the_graphs_are(repository, name):
    config = read_config(repository / name / "config.pbtxt")
    graph = onnx.load(repository / name / "1" / config.default_model_filename, load_external_data=False).graph
    states = config.sequence_batching.state
    declared = {each.name: (each.data_type, list(each.dims)) for each in config.input}
    declared |= {each.input_name: (each.data_type, list(each.dims)) for each in states}
    found = {each.name: (ONNX_TYPES[each.type.tensor_type.elem_type], dims(each)[1:]) for each in graph.input}
    assert declared == found
    # batches are stacked: everything begins with them, under one name
    assert {each.type.tensor_type.shape.dim[0].dim_param for each in (*graph.input, *graph.output)} == {"batch"}
    answers = {each.name: (ONNX_TYPES[each.type.tensor_type.elem_type], dims(each)[1:]) for each in graph.output}
    for each in config.output:
        assert answers[each.name] == (each.data_type, list(each.dims))
    for each in states:
        assert answers[each.output_name] == (each.data_type, list(each.dims))
        assert -1 not in each.dims
    assert {each.name for each in config.output} | {each.output_name for each in states} == set(answers)


@pytest.mark.parametrize("name", ["recommend", "score"])
def test_queues_are_bounded_and_reject(repository, name):
    # one request after the other is encoded: it waits for company once
    for model, wait_us in ((name, CONFIG.batch_wait_us), (f"{name}_encode", 0)):
        batching = read_config(repository / model / "config.pbtxt").dynamic_batching
        assert batching.max_queue_delay_microseconds == wait_us
        policy = batching.default_queue_policy
        assert policy.timeout_action == schema.ModelQueuePolicy.REJECT
        assert policy.max_queue_size == CONFIG.queue_size
        assert policy.default_timeout_microseconds == 1000 * CONFIG.queue_ms


@pytest.mark.parametrize("name", SERVED)
def test_a_request_waits_for_company_once(repository, name):
    """Along all steps of its ensemble."""
    configs = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
    steps = [configs[step.model_name] for step in configs[f"{name}_items"].ensemble_scheduling.step]
    waits = [
        config.dynamic_batching.max_queue_delay_microseconds
        + config.sequence_batching.oldest.max_queue_delay_microseconds
        for config in steps
    ]
    assert sum(waits) == CONFIG.batch_wait_us


@pytest.mark.parametrize("name", SERVED)
def test_ensembles_fit_together(repository, name):
    """Types and dimensions of every tensor on its way; what a step takes was made before; no step lacks an input."""
    configs = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
    ensemble = configs[f"{name}_items"]
    known = {each.name: (each.data_type, list(each.dims)) for each in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert model.max_batch_size >= ensemble.max_batch_size
        assert {each.name for each in model.input} == set(step.input_map)
        for each in model.input:
            data_type, shape = known[step.input_map[each.name]]
            assert data_type == each.data_type
            assert all(-1 in pair or pair[0] == pair[1] for pair in zip(shape, each.dims, strict=True))
        made = {each.name: (each.data_type, list(each.dims)) for each in model.output}
        known |= {value: made[key] for key, value in step.output_map.items()}
    for each in ensemble.output:
        assert known[each.name][0] == each.data_type


def test_the_step_imports_nothing_else(root):
    source = (root / "export" / "triton_ids.py").read_text()
    lines = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    modules = {line.split()[1].split(".")[0] for line in lines}
    assert modules == {"json", "pathlib", "typing", "numpy", "triton_python_backend_utils"}


def test_the_manifest_is_last_and_whole(repository, engine_dir):
    manifest = read_artifact(repository, TRITON).manifest
    assert manifest["engine_revision"] == json.loads((engine_dir / "engine.json").read_text())["revision"]
    assert set(manifest["models"]) == {path.parent.name for path in repository.glob("*/config.pbtxt")}
    assert manifest["tools"]["onnx"]
    assert manifest["run"] == "built, not run"
    for name in SERVED:
        parity = manifest["graphs"][name]["parity"]
        assert parity["users"] == 40 and parity["max_error"] < 1e-5 and parity["same_top"] == 1
    copy = repository / "score" / "1" / "model.onnx"
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="altered"):
        read_artifact(repository, TRITON)
    copy.write_bytes(content)


@pytest.mark.parametrize("length", [0, 1, 5, 12, 13, 31])
def test_recommend_answers_as_the_engine(server, engine, length):
    items = list(engine.catalogue.item_ids)
    history, deny = items[40 : 40 + length], items[3:5]
    answer = server.infer("recommend_items", history=ids(history), excluded=ids(deny))
    expected = engine.recommend(history, k=20, deny=deny)
    found, scores = named(answer["item_ids"], answer["item_scores"])
    assert found == list(expected.items)
    assert scores == pytest.approx(expected.scores, abs=1e-4)


def test_score_answers_as_the_engine(server, engine):
    items = list(engine.catalogue.item_ids)
    history, candidates = items[10:25], items[20:35]
    answer = server.infer("score_items", history=ids(history), candidates=ids(candidates))
    expected = engine.recommend(history, k=15, candidates=candidates)
    found, scores = named(answer["item_ids"], answer["item_scores"])
    assert found == list(expected.items)
    assert scores == pytest.approx(expected.scores, abs=1e-4)


def test_requests_share_a_batch_and_a_request_may_be_one(server, engine):
    items = list(engine.catalogue.item_ids)
    histories = [items[:3], items[5:12], items[20:21], items[30:60]]
    apart = server.infer_many("recommend_items", [{"history": ids(h), "excluded": ids([])} for h in histories])
    together = server.infer("recommend_items", history=ids(*histories), excluded=ids([], [], [], []))
    for place, history in enumerate(histories):
        expected = list(engine.recommend(history, k=20).items)
        assert named(apart[place]["item_ids"], apart[place]["item_scores"])[0] == expected
        row = slice(place, place + 1)
        assert named(together["item_ids"][row], together["item_scores"][row])[0] == expected


def test_sessions_answer_as_the_engine(server, engine):
    """Two users by turns and in one batch, their state as long as it is."""
    items = list(engine.catalogue.item_ids)
    steps = {"ada": [items[:5], items[5:6], items[6:9]], "bob☕": [[], items[70:72], items[72:73]]}
    for turn in range(3):
        requests = [
            {
                "sequence": user,
                "start": turn == 0,
                "history": ids(parts[turn]),
                "candidates": ids(items[100:110]),
                "excluded": ids(items[90:92]),
            }
            for user, parts in steps.items()
        ]
        answers = server.infer_many("session_items", requests)
        for (user, parts), answer in zip(steps.items(), answers, strict=True):
            history = [item_id for part in parts[: turn + 1] for item_id in part]
            expected = engine.recommend(history, k=20, deny=items[90:92])
            found, scores = named(answer["item_ids"], answer["item_scores"])
            assert found == list(expected.items), user
            assert scores == pytest.approx(expected.scores, abs=1e-4)
            ranked = engine.recommend(history, k=10, candidates=items[100:110])
            assert named(answer["candidate_ids"], answer["candidate_id_scores"])[0] == list(ranked.items)


def session(server, history, **controls):
    return server.infer("session_items", history=ids(history), candidates=ids([]), excluded=ids([]), **controls)


def test_a_session_is_right_up_to_the_windows_last_place(server, engine):
    """Item by item: a state has one size, and the padding of a request never pushes out what is real."""
    items = list(engine.catalogue.item_ids)
    for length in range(1, 13):
        answer = session(server, items[length - 1 : length], sequence="eve", start=length == 1)
        expected = engine.recommend(items[:length], k=20)
        found, scores = named(answer["item_ids"], answer["item_scores"])
        assert found == list(expected.items)
        assert scores == pytest.approx(expected.scores, abs=1e-4)


def test_a_session_is_refused_where_it_would_be_wrong(server, engine):
    items = list(engine.catalogue.item_ids)
    with pytest.raises(Refused, match="START flag"):
        session(server, items[:2], sequence="eve")
    session(server, items[:10], sequence="eve", start=True)
    with pytest.raises(Refused, match="nothing new in the history"):
        session(server, [], sequence="eve")
    with pytest.raises(Refused, match="14 items are more than the window of 12; start the sequence again"):
        session(server, items[10:14], sequence="eve")
    with pytest.raises(Refused, match="start a sequence with the last 11"):
        session(server, items[:15], sequence="eve", start=True)
    # as the engine cuts a history of 15
    answer = session(server, items[4:15], sequence="eve", start=True)
    expected = engine.recommend(items[:15], k=20, deny=items[:4])
    found = named(answer["item_ids"], answer["item_scores"])[0]
    assert [item_id for item_id in found if item_id not in items[:4]][:15] == list(expected.items)[:15]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"history": ids(["nope", "gone"])}, "history: unknown item 'nope', 'gone'"),
        ({"excluded": ids([f"x{i}" for i in range(9)])}, r"excluded: unknown item 'x0', .* \(and 4 more\)"),
        (
            {"history": ids([f"{i:07d}" for i in range(70)])},
            "excluded: 70 items, the history's too, are more than the 64 .* --excluded TYPICAL,70 or more",
        ),
    ],
)
def test_bad_requests_are_refused(server, inputs, message):
    with pytest.raises(Refused, match=message):
        server.infer("recommend_items", **{"history": ids([]), "excluded": ids([]), **inputs})


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([["0000001", "0000002"], []], "candidates: the list is empty; send one for every user"),
        ([["0000001"], ["0000004", "0000003", "0000004"]], "candidates: '0000004' more than once; name each once"),
    ],
)
def test_candidates_are_named_once_and_at_all(server, candidates, message):
    history = ids(["0000001"], ["0000002"])
    with pytest.raises(Refused, match=message):
        server.infer("score_items", history=history, candidates=ids(*candidates))


def test_one_bad_request_is_no_others(server, engine):
    items = list(engine.catalogue.item_ids)
    model = server.models["recommend_encode"]
    given = [
        {"history": Tensor("history", ids([name])), "excluded": Tensor("excluded", ids([]))} for name in ("?", items[0])
    ]
    bad, good = model.execute(given)
    assert bad.error.message.startswith("history: unknown item '?'")
    assert good.error is None


CALENDAR = CalendarConfig(first_second=0, bucket_seconds=100, num_buckets=5)
UNKNOWN, NAN, INF = 0, float("nan"), float("inf")


@pytest.fixture
def step(tmp_path):
    """The first step of a model that reads times, with a window of 4: a call gives its answer, or raises Refused."""
    folder = tmp_path / "score_encode"
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(triton_server.IDS_MODEL, folder / "1" / "model.py")
    (folder / "1" / "item_ids.json").write_text(json.dumps(["a", "b", "c"]))
    settings = {"role": "encode", "session": False, "window": 4, "window_step": 2, "calendar": CALENDAR.to_json()}
    settings["most"] = dict.fromkeys(("history", "candidates", "excluded"), 4)
    model = load_step(folder, {"parameters": {"settings": {"string_value": json.dumps(settings)}}})

    def encode(**inputs):
        [response] = model.execute([{name: Tensor(name, array) for name, array in inputs.items()}])
        if response.error is not None:
            raise Refused(response.error.message)
        return {tensor.name: tensor.array for tensor in response.tensors}

    return encode


@pytest.mark.parametrize(
    ("history", "times"),
    [
        (["a", "b"], [150, 250]),
        (["a", "b", ""], [150, 250, UNKNOWN]),
        (["a", "b", ""], [150, 250, NAN]),
        (["", "a", "b"], [UNKNOWN, 150, 250]),
        (["", "a", "", "b"], [INF, 150, 9e9, 250]),
        (["a", "b", "c"], [150, UNKNOWN, -250]),
        (["a", "b", "c"], [1e10, -1e10, 250.9]),
        (["a", "b", "c", "a", "b", "c"], [1, 101, 201, 301, 401, 501]),
        (["", "a", "b", "c", "a", "b", "c"], [UNKNOWN, 1, 101, 201, 301, 401, 501]),
        ([""], [NAN]),
        ([], []),
    ],
)
def test_times_stand_beside_their_items_wherever_padding_is(step, history, times):
    strings = np.array([[each.encode() for each in history]], dtype=object).reshape(1, len(history))
    answer = step(history=strings, times=np.array([times], np.float64))
    known = [(item, time) for item, time in zip(history, times, strict=True) if item]
    known = known[2:] if len(known) > 4 else known
    buckets = [int(CALENDAR.buckets([time])[0]) if time else 0 for _, time in known]
    assert answer["lengths"].tolist() == [[len(known)]]
    assert answer["history_rows"][0, : len(known)].tolist() == ["abc".index(item) for item, _ in known]
    assert answer["buckets"][0].tolist() == buckets + [0] * (4 - len(known))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"times": [[NAN, 250]]}, "times: they must be finite; send 0 where one is not known"),
        ({"times": [[150, INF]]}, "times: they must be finite"),
        ({"times": [[150, 1.7e12]]}, "times: 1700000000000 s is thousands of years away; divide milliseconds by 1000"),
        ({"times": [[-INF, 250]]}, "times: they must be finite"),
        ({"history": ids(["a"] * 6), "times": [[NAN, *[1] * 5]]}, "times: they must be finite"),  # before the window
        ({"times": [[150]]}, "times: 1x1 for a history of 1x2; send one for each place, padding too"),
        ({"times": [[150, 250, 0]]}, "times: 1x3 for a history of 1x2"),
        ({"times": [[]]}, "times: 1x0 for a history of 1x2"),
        ({"times": [[1, 2], [3, 4]]}, "times: 2 rows for 1 of the history; send one for every user"),
        ({"candidates": ids(["a"], ["b"])}, "candidates: 2 rows for 1 of the history"),
        ({"excluded": ids(["a"], [])}, "excluded: 2 rows for 1 of the history"),
        ({"history": np.array([[b"a", b"\xff"]], object)}, r"history: b'\\xff' is no UTF-8; send ids as they were"),
    ],
)
def test_what_does_not_fit_together_is_refused(step, inputs, message):
    given = {"history": ids(["a", "b"]), "times": [[150, 250]], **inputs}
    with pytest.raises(Refused, match=message):
        step(**given | {"times": np.array(given["times"], np.float64)})


def test_the_largest_settings_are_ones_that_triton_reads():
    most = 2**31 - 1
    names = ("queue_size", "queue_ms", "batch_wait_us", "max_sessions", "session_idle_s")
    config = TritonConfig(batch=(8, most), **dict.fromkeys(names, most))
    parsed = text_format.Parse(render({"max_batch_size": most, **queueing(config, most)}), schema.ModelConfig())
    assert parsed.max_batch_size == most
    assert parsed.dynamic_batching.default_queue_policy.default_timeout_microseconds == 1000 * most


def test_text_is_escaped():
    text = render({"name": 'a "b"\n☕', "dims": [1, -1], "flag": True, "step": [{"x": 1}, {"x": 2}]})
    assert text.splitlines()[0] == 'name: "a \\"b\\"\\n\\u2615"'
    assert "dims: [ 1, -1 ]" in text and "flag: true" in text and text.count("step {") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tensorflow"}, "backend: 'tensorflow' is not one of onnxruntime, tensorrt"),
        ({"dtype": "int3"}, "dtype: 'int3' is not one of"),
        ({"dtype": "bfloat16"}, "knows no bfloat16"),
        ({"dtype": "float8"}, "knows no float8"),
        ({"graphs": ("extend",)}, "choose of recommend, score, session"),
        ({"graphs": ()}, "graphs: none named; choose of recommend, score, session"),
        ({"graphs": ("recommend", "recommend")}, "graphs: one is named twice; name each once"),
        ({"batch": (8, 4)}, "batch: expected TYPICAL,MOST"),
        ({"k": 4000, "backend": "tensorrt"}, "k: TensorRT finds at most 3840"),
        ({"k": 0}, r"k: must be within 1\.\.2147483647, is 0"),
        ({"k": 2**31}, "k: must be within"),
        ({"queue_size": 0}, "queue_size: must be within"),
        ({"queue_size": 2**32}, "queue_size: must be within"),
        ({"queue_ms": 10**18}, "queue_ms: must be within"),
        ({"max_sessions": 2**31}, "max_sessions: must be within"),
        ({"session_idle_s": -1}, "session_idle_s: must be within"),
        ({"batch_wait_us": -1}, r"batch_wait_us: must be within 0\.\.2147483647, is -1"),
        (
            {"batch": (8, 2**31)},
            "batch: expected TYPICAL,MOST with 1 <= TYPICAL <= MOST <= 2147483647, got 8,2147483648",
        ),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        TritonConfig(**settings)


def test_a_repository_of_plans(engine_dir, shared_traces, tmp_path, monkeypatch):
    """Built by a stand-in: plans of tensorrt in the place of graphs, with the profile of the config."""
    for name in ("find_chip", "check_installed", "load_tensorrt"):
        monkeypatch.setattr(triton_server, name, lambda *_: SimpleNamespace())
    monkeypatch.setattr(triton_server, "PlanBuilder", FakeBuilder)
    monkeypatch.setattr("speeder_engine.export.tools.version", lambda _: "1.2.3")
    settings = replace(CONFIG, backend="tensorrt", graphs=("score",))
    export_triton(engine_dir, tmp_path / "out", settings, 20)
    config = read_config(tmp_path / "out" / "score" / "config.pbtxt")
    assert config.backend == "tensorrt" and config.default_model_filename == "model.plan"
    assert [path.name for path in (tmp_path / "out" / "score" / "1").iterdir()] == ["model.plan"]
    engine = FakeEngine((tmp_path / "out" / "score" / "1" / "model.plan").read_bytes())
    assert engine.profile["candidates"] == [[1, 1], [2, 20], [4, 40]]
    assert engine.profile["history"] == [[1, 1], [2, 12], [4, 12]]
    assert {each.name for each in config.input} == set(engine.inputs)
    assert read_artifact(tmp_path / "out", TRITON).manifest["tools"]["tensorrt"] == "1.2.3"


def test_graphs_that_answer_otherwise_are_not_published(tmp_path):
    """Weights that half precision doesn't hold: without a comparison such a repository was written."""
    parts = small_parts(num_layers=1, followers=False)
    parts.model.decoder.layers[0].gate_up.weight.data.mul_(1e7)
    parts.save(tmp_path / "engine")
    settings = TritonConfig(dtype="float16", graphs=("recommend",))
    with pytest.raises(ExportError, match=r"graph recommend: scores are off by .*, at most 5e-03 is allowed"):
        export_triton(tmp_path / "engine", tmp_path / "out", settings, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("stale", ["present_rows", "present.0.value"])
def test_a_state_that_is_wrong_is_found(repository, engine_dir, tmp_path, stale):
    """An output that hands on what came in: the second request of a sequence is off."""
    parts = EngineParts.load(engine_dir)
    [spec] = served_specs(parts, StaticModel(parts, OnnxConfig()), ("session",), CONFIG.k)
    folder = shutil.copytree(repository / "session" / "1", tmp_path / "session")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    past = {"present_rows": "past_rows", "present.0.value": "past_key_values.0.value"}[stale]
    for node in model.graph.node:
        node.output[:] = ["replaced" if name == stale else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Identity", [past], [stale]))
    onnx.save(model, folder / "model.onnx")
    config = OnnxConfig(graphs=("extend",))
    files = OnnxFiles(folder, config, parts.config, parts.catalogue.table(), parts.revision)
    with pytest.raises(ExportError, match="graph session: scores are off"):
        compare(parts, ServedEngine(files, {folder / "model.onnx": spec}), 20, {"extend": "session"})


def test_plans_need_a_gpu_and_the_package(engine_dir, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from speeder_engine.errors import SpeederError\n"
        "from speeder_engine.export.triton_server import export_triton, TritonConfig\n"
        "try: export_triton(Path(sys.argv[1]), Path(sys.argv[2]), TritonConfig(backend='tensorrt'))\n"
        "except SpeederError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(engine_dir), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "speeder-engine[tensorrt]" in done.stdout or "needs an NVIDIA GPU" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
