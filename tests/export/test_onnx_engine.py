"""Exports under ONNX Runtime against the engine they were made from."""

import copy
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from speeder_engine import (
    ArtifactError,
    ConfigError,
    DataError,
    EngineClosed,
    InvalidRequest,
    MissingDependency,
    Request,
    SpeederError,
)
from speeder_engine.export import OnnxConfig, OnnxEngine
from speeder_engine.export.onnx_engine import OnnxFiles
from speeder_engine.export.onnx_session import check_provider, load_runtime
from speeder_engine.export.parity import ranking_error
from speeder_engine.export.user_cache import UserCache, UserState


@pytest.fixture(scope="module", params=["standard", "ort"])
def both(request):
    exported = request.getfixturevalue(request.param)
    return exported.engine(), OnnxEngine.load(exported.path)


def history(rng, length):
    return [f"{i:04d}" for i in rng.integers(0, 120, length)]


def options(engine, rng, length):
    """With times, where the model reads them."""
    timed = engine.parts.config.prompt.calendar is not None
    return {"times": rng.uniform(0, 5000, length).tolist()} if timed else {}


def assert_same(expected, found):
    assert found.items == expected.items and found.unknown == expected.unknown
    assert ranking_error(expected, found) < 1e-5


def test_batches_of_mixed_lengths(both):
    engine, onnx = both
    rng, requests = np.random.default_rng(0), []
    for number in range(120):
        length = int(rng.integers(0, 30))
        named = {"candidates": history(np.random.default_rng(number), 1)} if number % 3 == 0 else {}
        if number % 3 == 1:
            named = {"candidates": [f"{i:04d}" for i in rng.permutation(120)[: rng.integers(1, 25)]]}
            named["head"] = ("rank", "retrieve")[number % 2]
        requests.append(
            Request(history(rng, length), int(rng.integers(1, 130)), **named, **options(engine, rng, length))
        )
    for expected, found in zip(engine.recommend_many(requests), onnx.recommend_many(requests), strict=True):
        assert_same(expected, found)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 13, 40])
def test_one_request_of_any_length(both, length):
    engine, onnx = both
    items = history(np.random.default_rng(length), length)
    assert_same(engine.recommend(items), onnx.recommend(items))
    assert_same(engine.recommend(items, candidates=["0007"]), onnx.recommend(items, candidates=["0007"]))


def test_masks(both):
    engine, onnx = both
    items = history(np.random.default_rng(1), 20)  # longer than the window: all of it has been seen
    best = engine.recommend(items).items
    for more in (
        {"exclude_seen": False},
        {"deny": best[:3]},
        {"allow": best[:4]},
        {"allow": [*best[:4], *items], "deny": best[:1]},
        {"candidates": best[:5], "deny": best[:2]},
        {"candidates": best[:5], "allow": best[3:]},
        {"history_offset": 8},
    ):
        for user in (None, "masked"):
            given = {**more, "k": 120, "user_id": user}
            start = given.get("history_offset", 0)
            assert_same(engine.recommend(items[start:], **given), onnx.recommend(items[start:], **given))


def test_sessions_answer_as_one_pass(both):
    """Appends, corrections, deletions, repeats and slides."""
    engine, onnx = both
    rng = np.random.default_rng(3)
    histories = {user: [] for user in "abc"}
    times = {user: [] for user in "abc"}
    for _ in range(60):
        user = "abc"[rng.integers(3)]
        items = histories[user]
        if rng.random() < 0.25 and items:
            items[rng.integers(len(items))] = f"{rng.integers(120):04d}"
        elif rng.random() < 0.2 and items:
            where = rng.integers(len(items))
            del items[where], times[user][where]
        else:
            new = history(rng, rng.integers(0, 4))
            items += new
            times[user] += rng.uniform(0, 5000, len(new)).tolist()
        timed = {"times": times[user]} if options(engine, rng, 0) else {}
        for named in ({}, {"candidates": history(rng, 1)}, {"candidates": ["0001", "0002"], "head": "retrieve"}):
            expected = engine.recommend(items, 25, **timed, **named)
            assert_same(expected, onnx.recommend(items, 25, user_id=user, **timed, **named))


def test_what_a_session_saves(both):
    _, onnx = both
    ids, computed = [f"{i:04d}" for i in range(12)], []
    onnx.close_session("saver")
    for items in (ids[:8], ids[:9], ids[:9], [*ids[:4], ids[11]], ids[:3]):
        before = onnx.rows_computed
        onnx.recommend(items, user_id="saver")
        computed.append(onnx.rows_computed - before)
    # cold, one appended, the same again, a corrected past, a proper prefix: the last row at least is computed
    assert computed == [8, 1, 1, 1, 1]
    assert onnx.close_session("saver") and not onnx.close_session("saver")


@pytest.mark.parametrize("flavour", ["standard", "ort"])
def test_what_is_kept_of_a_user_is_the_history_alone(request, flavour):
    """However often it is asked for or corrected; `ort` keeps buffers of a whole window."""
    exported = request.getfixturevalue(flavour)
    onnx, ids = OnnxEngine.load(exported.path), [f"{i:04d}" for i in range(12)]
    whole = exported.manifest["limits"]["instruction_len"] + 12
    for items in (ids, ids, ids, ids[:5], ids[:5], [*ids[:3], ids[9], ids[4]], [], []):
        onnx.recommend(items, user_id="one")
        positions = max(1, len(items)) if flavour == "standard" else whole
        assert onnx._users.num_bytes == positions * onnx._users.position_bytes


def test_priors_and_availability_change_without_an_export(standard):
    with standard.engine() as engine, OnnxEngine.load(standard.path) as onnx:
        items = ["0003", "0004"]
        for each in (engine, onnx):
            each.set_available(["0050", "0051"], False)
            each.set_prior({"0060": 40.0})
        for more in ({"user_id": "a"}, {"candidates": ["0050", "0060", "0061"]}, {}):
            assert_same(engine.recommend(items, 120, **more), onnx.recommend(items, 120, **more))
        assert onnx.recommend(items).items == engine.recommend(items).items


def test_compress_makes_the_engines_tokens(compress):
    onnx = OnnxEngine.load(compress.path)
    rng = np.random.default_rng(0)
    features = {"text": rng.standard_normal((7, 8)), "image": rng.standard_normal((7, 5))}
    features["image"][2:4] = np.nan
    features["text"][3] = np.nan
    from speeder_engine import Item

    items = []
    for i in range(7):
        vectors = {name: values[i] for name, values in features.items() if np.isfinite(values[i]).all()}
        items.append(Item(str(i), vectors=vectors))
    engine = compress.engine()
    engine.upsert([item for item in items if item.has_features])
    tokens = onnx.compress(features)
    made = [i for i, item in enumerate(items) if item.has_features]
    expected = engine.item_vectors([str(i) for i in made])
    np.testing.assert_allclose(tokens[made], expected, atol=1e-6)
    assert np.isfinite(tokens).all() and tokens.shape == (7, 48)
    with pytest.raises(InvalidRequest, match="no graph 'recommend'; export it with --graphs recommend"):
        onnx.recommend([])


def test_an_item_without_any_modality_has_the_exports_token(compress):
    """Whether it is all NaN or said of one modality alone."""
    onnx = OnnxEngine.load(compress.path)
    nothing = np.full((2, 8), np.nan)
    for features in ({"text": nothing}, {"text": nothing.tolist()}, {"image": nothing[:, :5], "text": nothing}):
        tokens = onnx.compress(features)
        assert np.isfinite(tokens).all() and (tokens[0] == tokens[1]).all()
    assert onnx.compress({"text": np.zeros((0, 8))}).shape == (0, 48)
    large = {"text": np.linspace(-1e17, 1e17, 8)[None]}
    small = {name: values / 1e17 for name, values in large.items()}
    np.testing.assert_allclose(onnx.compress(large), onnx.compress(small), atol=1e-4)
    assert (onnx.compress({"text": [[1] * 8]}) == onnx.compress({"text": np.ones((1, 8), np.float16)})).all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, r"expected arrays by modality \(text, image\), got None"),
        ([1.0], r"expected arrays by modality \(text, image\), got \[1\.0\]"),
        ({}, r"got features of \[\]; give some of text, image"),
        ({"sound": np.zeros((1, 8))}, r"got features of \['sound'\]; give some of text, image"),
        ({7: np.zeros((1, 8)), "text": np.zeros((1, 8))}, r"got features of \[7, 'text'\]"),
        ({"text": np.zeros((2, 3))}, r"text has the shape \(2, 3\), expected \[n, 8\]"),
        ({"text": np.zeros(8)}, r"text has the shape \(8,\)"),
        ({"text": 3}, r"text has the shape \(\)"),
        ({"text": []}, r"text has the shape \(0,\)"),
        ({"text": np.zeros((2, 8)), "image": np.zeros((3, 5))}, "image has 3 rows, text 2; give one for each item"),
        ({"text": "words"}, r"text holds something but numbers; give an array \[n, 8\]"),
        ({"text": [["1"] * 8]}, "text holds something but numbers"),
        ({"text": None}, "text holds something but numbers"),
        ({"text": [[1], [1, 2]]}, "text holds something but numbers"),
        ({"text": np.full((1, 8), None)}, "text holds something but numbers"),
        ({"text": [[10**400] * 8]}, "text holds something but numbers"),
        ({"text": np.zeros((1, 8), bool)}, "text holds something but numbers"),
        ({"text": np.zeros((1, 8), complex)}, "text holds something but numbers"),
        ({"text": torch.zeros(1, 8, requires_grad=True)}, "text holds something but numbers"),
        ({"text": [[0.0] * 8, [np.nan, *[1.0] * 7]]}, "text, row 1: NaN, infinity or beyond 1e\\+17; make it smaller"),
        ({"text": np.full((1, 8), np.inf)}, "text, row 0: NaN, infinity or beyond"),
        ({"text": np.full((1, 8), 1e300)}, "text, row 0: NaN, infinity or beyond"),
        ({"text": [[3e38, -3e38, *[0.0] * 6]]}, "text, row 0: NaN, infinity or beyond"),
        ({"text": np.full((1, 8), -(2**63))}, "text, row 0: NaN, infinity or beyond"),
    ],
)
def test_what_is_no_features_is_refused(compress, features, message):
    with pytest.raises(DataError, match=f"compress: {message}") as caught:
        OnnxEngine.load(compress.path).compress(features)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [120, 121, 2**31, 2**62, 2**63, 10**30])
@pytest.mark.parametrize("more", [{}, {"user_id": "a"}, {"candidates": ["0001", "0002"]}])
def test_k_may_be_any_whole_number(both, k, more):
    engine, onnx = both
    assert_same(engine.recommend(["0003"], k, **more), onnx.recommend(["0003"], k, **more))


@pytest.mark.parametrize("save", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_pickled_and_says_what_to_do(compress, save):
    message = "OnnxEngine: can't be pickled or copied; call OnnxEngine.load in every process"
    with pytest.raises(TypeError, match=message):
        save(OnnxEngine.load(compress.path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "OnnxEngine.load: expected the path of an export, got None"),
        ({"path": 7}, "OnnxEngine.load: expected the path of an export, got 7"),
        ({"provider": []}, r"provider: \[\] is not one of cpu, cuda, tensorrt"),
        ({"provider": None}, "provider: None is not one of"),
        ({"threads": "2"}, "threads: expected a whole number within 0..1024, got '2'"),
        ({"threads": -1}, "threads: expected a whole number within 0..1024, got -1"),
        ({"threads": 10**30}, "threads: expected a whole number"),
        ({"threads": 1.0}, "threads: expected a whole number"),
        ({"threads": True}, "threads: expected a whole number"),
        ({"threads": None}, "threads: expected a whole number"),
        ({"kv_budget": None}, "kv_budget: None is no size"),
    ],
)
def test_what_an_engine_cannot_be_loaded_with(compress, settings, message):
    with pytest.raises(ConfigError, match=message):
        OnnxEngine.load(**{"path": compress.path, **settings})


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 0},
        {"history": ["nope"]},
        {"history": "0001"},
        {"candidates": []},
        {"candidates": ["0001", "0001"]},
        {"head": "rank"},
        {"history_offset": 30},
        {"user_id": 7},
        {"head": "title", "candidates": ["0001"]},
    ],
)
def test_bad_requests_are_refused_as_by_the_engine(standard, bad):
    onnx, engine = OnnxEngine.load(standard.path), standard.engine()
    before = onnx.rows_computed
    given = {"history": ["0001"], **bad}
    with pytest.raises(InvalidRequest) as theirs:
        engine.recommend(**given)
    with pytest.raises(type(theirs.value)) as ours:
        onnx.recommend(**given)
    assert str(ours.value) == str(theirs.value)
    assert onnx.rows_computed == before


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.recommend_many("0001"),
        lambda engine: engine.recommend_many(Request([])),
        lambda engine: engine.recommend_many([["0001"]]),
        lambda engine: engine.set_available("0001", False),
        lambda engine: engine.set_available(["0001"], "no"),
        lambda engine: engine.set_available(["0001", "nope"], False),
        lambda engine: engine.set_prior(["0001"]),
        lambda engine: engine.set_prior({"0001": 1.0, "nope": 1.0}),
        lambda engine: engine.set_prior({"0001": 1.0, "0002": float("nan")}),
        lambda engine: engine.close_session(7),
    ],
)
def test_bad_calls_are_refused_as_by_the_engine(standard, call):
    onnx, engine = OnnxEngine.load(standard.path), standard.engine()
    before = onnx.recommend(["0003"])
    with pytest.raises(SpeederError) as theirs:
        call(engine)
    with pytest.raises(type(theirs.value)) as ours:
        call(onnx)
    assert str(ours.value) == str(theirs.value)
    assert onnx.recommend(["0003"]) == before


def test_unknown_items_can_be_skipped(standard):
    with standard.engine() as engine, OnnxEngine.load(standard.path) as onnx:
        given = {"history": ["0001", "nope"], "on_unknown": "skip"}
        assert_same(engine.recommend(**given), onnx.recommend(**given))


def test_threads_get_their_own_answers(ort):
    onnx = OnnxEngine.load(ort.path)
    histories = [history(np.random.default_rng(i), 8) for i in range(18)]
    expected, wrong = [onnx.recommend(items).items for items in histories], []

    def ask(first):
        wrong.extend(
            i for i in range(first, 18, 3) if onnx.recommend(histories[i], user_id=str(i % 4)).items != expected[i]
        )

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_engine_says_so(compress):
    with OnnxEngine.load(compress.path) as onnx:
        pass
    for call in (
        lambda: onnx.recommend([]),
        lambda: onnx.recommend_many([]),
        lambda: onnx.set_available(["0001"], False),
        lambda: onnx.set_prior({"0001": 1.0}),
        lambda: onnx.close_session("u"),
        lambda: onnx.compress({"text": np.zeros((1, 8))}),
        onnx.__enter__,
    ):
        with pytest.raises(EngineClosed):
            call()
    onnx.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_an_export_may_go_or_be_replaced_while_an_engine_runs(ort, tmp_path, replaced):
    """New users begin with the instruction of the export that was loaded."""
    path = shutil.copytree(ort.path, tmp_path / "export")
    onnx, items = OnnxEngine.load(path), ["0003", "0004"]
    expected = onnx.recommend(items, user_id="early")
    if replaced:
        tensors = load_file(path / "instruction.safetensors")
        save_file({name: value + 1 for name, value in tensors.items()}, path / "instruction.safetensors")
    else:
        shutil.rmtree(path)
    assert onnx.recommend(items, user_id="late") == expected


@pytest.mark.parametrize("meddle", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no tensors")])
def test_an_instruction_that_cannot_be_read(ort, tmp_path, meddle):
    """Verified, and gone or altered before it was read."""
    files = OnnxFiles.load(shutil.copytree(ort.path, tmp_path / "export"))
    meddle(files.path / "instruction.safetensors")
    with pytest.raises(ArtifactError, match=r"instruction\.safetensors: can't be read: .*; export it again") as caught:
        OnnxEngine(files)
    assert "\n" not in str(caught.value)


def test_users_are_forgotten_by_bytes_and_by_content():
    cache = UserCache(budget=100, position_bytes=4)
    for number in range(4):
        cache.put(str(number), UserState(np.full((3, 3), number, np.int32), (), room=10))
    assert len(cache) == 2 and cache.num_bytes == 80
    keys = np.array([[3, 3, 3], [3, 3, 3], [3, 4, 3]], np.int32)  # the third item's token has changed since
    assert cache.take("3").common_len(keys) == 2
    assert cache.take("3").common_len(keys) == 0


def test_a_provider_that_is_not_there_is_an_error_that_names_the_extra(compress, monkeypatch):
    with pytest.raises(MissingDependency, match=r"speeder-engine\[ort-gpu\]"):
        OnnxEngine.load(compress.path, provider="cuda")
    with pytest.raises(ConfigError, match="provider: 'tpu' is not one of cpu, cuda, tensorrt"):
        OnnxEngine.load(compress.path, provider="tpu")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"speeder-engine\[ort\]"):
        load_runtime("cpu")


def test_a_silent_fall_back_is_an_error():
    check_provider(["CUDAExecutionProvider", "CPUExecutionProvider"], "cuda")
    with pytest.raises(ConfigError, match="'cuda' was asked for, but the graph runs on CPUExecutionProvider"):
        check_provider(["CPUExecutionProvider"], "cuda")


def test_what_a_flavour_cannot_run_on_is_refused(compress):
    files = OnnxFiles.load(compress.path)
    for config, provider, message in (
        (OnnxConfig("ort"), "tensorrt", "knows no GroupQueryAttention"),
        (OnnxConfig("standard", "bfloat16"), "cpu", "no bfloat16 on the CPU"),
    ):
        changed = OnnxFiles(files.path, config, files.model, files.table, files.revision)
        with pytest.raises(ConfigError, match=message):
            OnnxEngine(changed, provider)


def test_only_an_export_is_loaded(compress, tmp_path):
    with pytest.raises(ArtifactError, match=r"no ONNX export: .* has no export\.json"):
        OnnxEngine.load(compress.engine_dir)
    with pytest.raises(ArtifactError, match="no ONNX export"):
        OnnxEngine.load(tmp_path / "nothing")
