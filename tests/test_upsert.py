"""Changes of the catalogue under a running engine: applied between steps, never half, never read stale."""

import asyncio
import io
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from reference import make_tiny, reference_scores

from speeder_engine import (
    ArtifactError,
    CatalogueFull,
    DataError,
    Engine,
    EngineConfig,
    InvalidRequest,
    Item,
    Request,
    UnknownItem,
)
from speeder_engine.encoders.features import Features


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=12, step=4)


@pytest.fixture(scope="module")
def unchanged(tiny):
    """An engine with encoders, for upserts that must change nothing, and what it answers."""
    engine, _ = with_encoders(tiny)
    return engine, engine.recommend(["0001"], k=120)


def made(tiny, **settings):
    settings = {"dtype": "float32", "kv_budget": "4MiB", "debug": True} | settings
    return Engine(tiny.parts(), EngineConfig(**settings))


def vectors(rng):
    return {"text": rng.normal(size=8), "image": rng.normal(size=5)}


def token_of(tiny, **features):
    """The compressor's own answer."""
    values = {name: torch.zeros(1, width) for name, width in (("text", 8), ("image", 5))}
    for name, value in features.items():
        values[name] = torch.tensor(np.asarray(value, np.float32))[None]
    present = torch.tensor([[name in features for name in ("text", "image")]])
    with torch.no_grad():
        return tiny.model.compressor(values, present)[0]


@pytest.mark.parametrize("given", [("text",), ("image",), ("text", "image")])
def test_a_new_item_is_compressed_and_ranked_as_if_it_had_always_been_there(tiny, given):
    engine, rng = made(tiny), np.random.default_rng(0)
    features = {name: value for name, value in vectors(rng).items() if name in given}
    assert engine.upsert([Item("new", title="New", vectors=features, prior=0.25)]) == 1
    token = token_of(tiny, **features)
    torch.testing.assert_close(torch.from_numpy(engine.item_vectors(["new"])[0]), token, atol=1e-6, rtol=1e-5)
    assert (engine.catalogue.title("new"), len(engine.catalogue), "new" in engine.catalogue) == ("New", 121, True)

    grown = make_tiny(window=12, step=4)
    grown.tokens = torch.cat([tiny.tokens, token[None]])
    grown.prior = torch.cat([tiny.prior, torch.tensor([0.25])])
    rows = [3, 120, 5]
    retrieve, ranked = reference_scores(grown, rows, candidates=[120, 7, 8])
    ids = ["0003", "new", "0005"]
    answers = dict(engine.recommend(ids, k=121, exclude_seen=False, user_id="a"))
    found = torch.tensor([answers[item_id] for item_id in (*tiny.item_ids, "new")])
    torch.testing.assert_close(found, retrieve, atol=2e-5, rtol=1e-5)
    answers = dict(engine.recommend(ids, candidates=["new", "0007", "0008"], user_id="a"))
    found = torch.tensor([answers[item_id] for item_id in ("new", "0007", "0008")])
    torch.testing.assert_close(found, ranked, atol=2e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_what_is_upserted_beside_it(tiny):
    rng = np.random.default_rng(1)
    items = [Item(f"x{i}", vectors=vectors(rng)) for i in range(37)]
    together, apart = made(tiny), made(tiny)
    assert together.upsert(items) == 37
    assert sum(apart.upsert([item]) for item in items) == 37
    ids = [item.item_id for item in items]
    assert np.array_equal(together.item_vectors(ids), apart.item_vectors(ids))


def test_a_changed_item_is_recomputed_from_where_it_stands(tiny):
    engine, cold, rng = made(tiny), made(tiny, kv_budget="0"), np.random.default_rng(2)
    ids = tiny.ids(range(10))
    engine.recommend(ids, user_id="a")
    item = Item("0004", vectors=vectors(rng))
    for each in (engine, cold):
        assert each.upsert([item]) == 0
    before = engine.stats().rows_computed
    assert engine.recommend(ids, user_id="a") == cold.recommend(ids)
    assert engine.stats().rows_computed - before == 6
    engine.upsert([item])  # the same token again: nothing is stale
    before = engine.stats().rows_computed
    assert engine.recommend(ids, user_id="a") == cold.recommend(ids)
    assert engine.stats().rows_computed == before


def test_titles_availability_and_priors_change_without_touching_a_session(tiny):
    engine, ids = made(tiny), tiny.ids(range(6))
    best = engine.recommend(ids, user_id="a").items[0]
    before = engine.stats().rows_computed
    engine.set_available([best], False)
    assert best not in engine.recommend(ids, k=120, user_id="a")
    assert engine.recommend(ids, candidates=[best], user_id="b").items == ()
    engine.upsert([Item(best, title="Renamed")])
    assert best not in engine.recommend(ids, k=120, user_id="a").items
    engine.upsert([Item(best, available=np.bool_(True))])
    assert engine.recommend(ids, user_id="a").items[0] == best
    assert engine.catalogue.title(best) == "Renamed"
    full = dict(engine.recommend(ids, k=120, user_id="a"))
    engine.set_prior({best: 100.0, "0100": -3.0})
    raised = dict(engine.recommend(ids, k=120, user_id="a"))
    beta = float(engine.model.retrieve.beta)
    assert raised[best] - full[best] == pytest.approx(beta * (100.0 - float(tiny.prior[int(best)])), rel=1e-3)
    assert raised["0100"] - full["0100"] == pytest.approx(beta * (-3.0 - float(tiny.prior[100])), rel=1e-3, abs=1e-4)
    # one history of user b was ranked; user a's was computed once
    assert engine.stats().rows_computed - before == 6 + 1


def test_a_removed_item_is_never_recommended_and_still_read_in_histories(tiny):
    engine, ids = made(tiny), tiny.ids(range(6))
    before = engine.recommend(ids, k=120, user_id="a")
    engine.remove([before.items[0], "0003"])
    after = engine.recommend(ids, k=120, user_id="a")
    assert after.items == before.items[1:]
    assert after.scores == before.scores[1:]
    assert "0003" not in engine.catalogue
    assert engine.recommend(ids, candidates=["0003", "0050"]).items == ("0050",)
    with pytest.raises(UnknownItem, match="remove: unknown item 'nope'"):
        engine.remove(["0050", "nope"])
    assert "0050" in engine.catalogue


class Lengths:
    """A text or image encoder whose vectors tell what it was given."""

    name = fingerprint = "lengths"

    def __init__(self, modality, dim):
        self.modality, self.dim, self.calls = modality, dim, 0

    def encode(self, inputs, names=None):
        self.calls += 1
        values = np.zeros((len(inputs), self.dim), np.float32)
        present = np.array([content not in ("unknown", b"broken") for content in inputs])
        for row, content in enumerate(inputs):
            values[row] = len(content) * np.arange(1, self.dim + 1) % 7
        return Features.of_present(values[present], present)


def with_encoders(tiny, **settings):
    parts = tiny.parts()
    parts.encoders.update(text=Lengths("text", 8), image=Lengths("image", 5))
    return Engine(parts, EngineConfig(dtype="float32", **settings)), parts.encoders


def test_raw_text_and_images_run_through_the_encoders(tiny, tmp_path):
    engine, encoders = with_encoders(tiny)
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    (tmp_path / "x.png").write_bytes(picture.getvalue())
    rng = np.random.default_rng(3)
    collected = rng.normal(size=8)
    items = [
        Item("a", text="some words"),
        Item("b", text="words", image=picture.getvalue()),
        Item("c", image=tmp_path / "x.png"),
        Item("d", vectors={"text": collected}, image=str(tmp_path / "x.png")),
    ]
    assert engine.upsert(items) == 4
    assert (encoders["text"].calls, encoders["image"].calls) == (1, 1)

    def text(length):
        return length * np.arange(1, 9) % 7

    image = len(picture.getvalue()) * np.arange(1, 6) % 7
    expected = [
        token_of(tiny, text=text(10)),
        token_of(tiny, text=text(5), image=image),
        token_of(tiny, image=image),
        token_of(tiny, text=collected, image=image),
    ]
    found = torch.from_numpy(engine.item_vectors(["a", "b", "c", "d"]))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda: Item(7, text="x"), "ids are strings that are not empty, got 7"),
        (lambda: Item("", text="x"), "ids are strings that are not empty"),
        (lambda: Item("\ud800", text="x"), "item_id is no valid Unicode text"),
        (lambda: Item("x", title="\ud800", text="x"), "title is no valid Unicode text"),
        (lambda: Item("x", text="\ud800"), "text is no valid Unicode text"),
        (lambda: Item("x", vectors={"text": torch.ones(8, requires_grad=True)}), "something but numbers"),
        (lambda: Item("x", text="words", prior=1e300), "prior of item 'x': expected a number within 1e[+]30 of 0"),
        (lambda: Item("0001", prior=10**400), "prior of item '0001'"),
        (lambda: Item("x", text=b"bytes"), "text is no string"),
        (lambda: Item("x", title=3), "title is no string"),
        (lambda: Item("x", image=3.5), "image must be bytes or a path, got float"),
        (lambda: Item("x", available=1), "available must be true or false"),
        (lambda: Item("x", vectors=[1.0]), "vectors maps modalities"),
        (lambda: Item("x", vectors={"sound": [1.0]}), "unknown modality 'sound'"),
        (lambda: Item("x", vectors={"text": ["a"]}), "something but numbers"),
        (lambda: Item("x", vectors={"text": [[1.0] * 8]}), "one row of finite numbers"),
        (lambda: Item("x", vectors={"text": [float("nan")] * 8}), "one row of finite numbers"),
        (lambda: Item("x", vectors={"text": [1e39] * 8}), "one row of finite numbers"),
        (lambda: Item("x", text="y", vectors={"text": [1.0] * 8}), "has text and a text vector"),
        (lambda: Item("x", vectors={"text": [1.0] * 7}), "'x': the text vector has 7 numbers, this model takes 8"),
        (lambda: Item("x", vectors={"collaborative": [1.0]}), "this model knows no collaborative modality"),
        (lambda: Item("x", text="unknown"), "'x': nothing to make a token of"),
        (lambda: Item("x", text="words", image=b"broken"), "'x': the image can't be decoded"),
        (lambda: Item("x", image="/nowhere.jpg"), "'x': image /nowhere.jpg: No such file"),
        (lambda: Item("x", image="a\0b"), "no path of a file; give a readable file"),
        (lambda: Item("x", image="\ud800"), "no path of a file; give a readable file"),
        (lambda: Item("x", vectors={"text": [10**400] * 8}), "something but numbers"),
        (lambda: Item("x", vectors={"text": np.full(8, 1j)}), "something but numbers"),
        (lambda: Item("x"), "'x' is new; give it a text"),
        (lambda: Item("x", text="words", prior=float("nan")), "prior of item 'x'"),
        (lambda: Item("0001", prior="high"), "prior of item '0001'"),
    ],
)
def test_a_bad_item_is_refused_in_one_line_and_nothing_is_changed(unchanged, item, message):
    engine, before = unchanged
    with pytest.raises(DataError, match=message) as caught:
        engine.upsert([Item("good", text="good words"), Item("0002", text="other"), item()])
    assert "\n" not in str(caught.value)
    assert "good" not in engine.catalogue
    assert engine.recommend(["0001"], k=120) == before


def test_an_engine_without_encoders_says_what_to_pass(tiny):
    with pytest.raises(
        DataError, match=r"'x': this engine holds no text encoder; pass vectors=\{'text': \[...\]\} of 8"
    ):
        made(tiny).upsert([Item("x", text="words")])


def test_wrong_kinds_are_refused(tiny):
    engine = made(tiny)
    for wrong in (Item("x"), ["x"], 3, "x", {"x": 1}):
        with pytest.raises(InvalidRequest, match="upsert: expected"):
            engine.upsert(wrong)
    with pytest.raises(InvalidRequest, match="set_prior: expected a mapping"):
        engine.set_prior(["0001"])
    for prior in (None, 1e300, 10**400, float("inf"), "high", np.ones(99)):
        with pytest.raises(DataError, match="prior of item '0002'") as caught:
            engine.set_prior({"0001": 5.0, "0002": prior})
        assert "\n" not in str(caught.value)
        assert engine.catalogue.prior[1] == tiny.prior[1]
    for flag in ("no", None, 1):
        with pytest.raises(InvalidRequest, match="available: expected true or false"):
            engine.set_available(["0001"], flag)
    with pytest.raises(InvalidRequest, match="remove: expected a list"):
        engine.remove("0001")
    assert engine.upsert([]) == 0


def test_a_full_catalogue_refuses_and_keeps_what_it_has(tiny, monkeypatch):
    engine, rng = made(tiny, catalogue_capacity=122), np.random.default_rng(4)
    engine.upsert([Item("x", vectors=vectors(rng))])
    with pytest.raises(CatalogueFull, match=r"2 new items don't fit, 121 of 122 rows.*larger catalogue_capacity"):
        engine.upsert([Item("y", vectors=vectors(rng)), Item("z", vectors=vectors(rng))])
    with monkeypatch.context() as patched, pytest.raises(CatalogueFull):  # before anything is encoded
        patched.setattr(engine._now().embedder, "tokens", None)
        engine.upsert([Item("y", vectors=vectors(rng)), Item("z", vectors=vectors(rng))])
    assert engine.upsert([Item("y", vectors=vectors(rng))]) == 1
    assert len(engine.recommend([], k=500)) == 122


def test_two_engines_side_by_side_know_nothing_of_each_other(tiny):
    left, right, rng = made(tiny), made(tiny), np.random.default_rng(5)
    ids = tiny.ids(range(5))
    before = right.recommend(ids, user_id="a")
    left.upsert([Item("0002", vectors=vectors(rng)), Item("only left", vectors=vectors(rng))])
    left.remove(["0110"])
    left.set_prior({"0050": 5.0})
    assert left.recommend(ids, user_id="a") != before
    assert right.recommend(ids, user_id="a") == before
    assert "only left" not in right.catalogue
    left.close()
    assert right.recommend(ids, user_id="a") == before


def test_a_hundred_thousand_upserts_beside_requests_and_no_wrong_answer(tiny):
    """Each call replaces the same hundred items by one of eight sets of vectors: an answer that mixes two sets, or
    reads a session's keys of another set, is none of the eight answers of a cold engine."""
    rng, num_sets = np.random.default_rng(6), 8
    sets = [[Item(f"{i:04d}", vectors=vectors(rng)) for i in range(100)] for _ in range(num_sets)]
    histories = [tiny.ids(rng.integers(0, 100, n)) for n in (3, 9, 12, 20)]
    candidates = tiny.ids(range(0, 100, 9))
    requests = [Request(h, 100, user_id=f"u{i}") for i, h in enumerate(histories)]
    requests += [Request(h, user_id=f"u{i}", candidates=candidates) for i, h in enumerate(histories)]
    cold = made(tiny, kv_budget="0")
    allowed = [set() for _ in requests]
    for each in sets:
        cold.upsert(each)
        for right, ranking in zip(allowed, cold.recommend_many(requests), strict=True):
            right.add(ranking)
    assert all(len(right) == num_sets for right in allowed)

    engine = made(tiny, debug=False)
    engine.upsert(sets[0])
    wrong, done = [], threading.Event()
    counts = [0] * len(requests)

    def ask(first):
        at = first
        while not done.is_set() or at < first + 2 * len(requests):
            which = at % len(requests)
            if engine.recommend_many([requests[which]])[0] not in allowed[which]:
                wrong.append(which)
            counts[which] += 1
            at += 1

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 4)]
    for thread in threads:
        thread.start()
    for call in range(1000):
        engine.upsert(sets[call % num_sets])
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(counts) > 10
    assert engine.catalogue.versions[:100].min() >= 900
    engine.check_integrity()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_changed_at_run_time_can_be_saved(tiny, tmp_path, dtype):
    tiny.parts().save(tmp_path / "old")
    first = Engine.load(tmp_path / "old", dtype=dtype)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3, 8)).tolist()
    first.upsert([Item(name, title="A new one", vectors={"text": v}) for name, v in zip("xyz", vectors, strict=True)])
    first.upsert([Item("0003", vectors={"text": vectors[0]})])
    first.set_prior({"0001": 3.0, "x": 2.0})
    first.remove(["y"])
    revision = first.save(tmp_path / "new")
    second = Engine.load(tmp_path / "new", dtype=dtype)
    assert second.revision == revision != first.revision
    for history in ([], ["0001", "x", "0003"], ["y", "z"]):
        assert second.recommend(history, k=130) == first.recommend(history, k=130)
        assert second.recommend(history, candidates=["z", "0003"]) == first.recommend(history, candidates=["z", "0003"])
    assert second.catalogue.title("z") == "A new one"
    # what has not changed is not rounded to what this engine computes in
    kept = Engine.load(tmp_path / "new", dtype="float32").item_vectors(["0001"])
    np.testing.assert_array_equal(kept, Engine.load(tmp_path / "old", dtype="float32").item_vectors(["0001"]))


def test_an_engine_is_saved_onto_its_own_directory_again_and_again(tiny, tmp_path):
    tiny.parts().save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", dtype="bfloat16")
    for prior in (1.0, 2.0, 3.0):
        engine.set_prior({"0001": prior})
        engine.upsert([Item(f"new {prior}", vectors={"text": [prior] * 8})])
        assert engine.save(tmp_path / "engine") == engine.revision
    again = Engine.load(tmp_path / "engine", dtype="bfloat16")
    assert again.revision == engine.revision
    assert again.recommend(["0002", "new 2.0"], k=130) == engine.recommend(["0002", "new 2.0"], k=130)


def test_an_engine_saved_onto_its_own_directory_finds_it_from_anywhere(tiny, tmp_path, monkeypatch):
    tiny.parts().save(tmp_path / "engine")
    monkeypatch.chdir(tmp_path)
    engine = Engine.load("engine", dtype="float32")
    engine.set_prior({"0001": 1.0})
    engine.save("engine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert engine.save(tmp_path / "copy") == engine.revision


def test_saving_keeps_no_step_waiting(tiny, tmp_path):
    engine = made(tiny)
    engine.upsert([Item("x", vectors={"text": [0.5] * 8})])
    saving = threading.Thread(target=engine.save, args=[tmp_path / "engine"])
    with engine._now().lock:  # as a step holds it
        saving.start()
        saving.join(60)
        assert not saving.is_alive()
    assert "x" in Engine.load(tmp_path / "engine", dtype="float32").catalogue


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda e: e.set_prior({"0001": 50.0}), lambda e: e.set_prior({"0001": 1.0, "nope": 1.0})),
        (lambda e: e.set_available(["0001"], False), lambda e: e.set_available(["nope"], False)),
        (lambda e: e.remove(["0001"]), lambda e: e.remove(["nope"])),
        (
            lambda e: e.upsert([Item("0001", vectors={"text": [0.5] * 8})]),
            lambda e: e.upsert([Item("nope", title="without a token")]),
        ),
    ],
    ids=["set_prior", "set_available", "remove", "upsert"],
)
def test_a_change_is_looked_up_and_checked_beside_a_step(tiny, change, refused):
    engine = made(tiny)
    before = engine.recommend(["0003"], k=120)
    ready, caught = threading.Event(), []
    apply = engine.catalogue.apply

    def refuse():
        try:
            refused(engine)
        except (UnknownItem, DataError) as error:
            caught.append(error)

    with engine._now().lock:  # as a step holds it
        refusing = threading.Thread(target=refuse)
        refusing.start()
        refusing.join(60)
        assert caught and not refusing.is_alive()
        engine.catalogue.apply = lambda prepared: (ready.set(), apply(prepared))
        changing = threading.Thread(target=change, args=[engine])
        changing.start()
        assert not ready.wait(0.2)  # nothing is written while a step computes
    changing.join(60)
    assert ready.is_set() and engine.recommend(["0003"], k=120) != before


def test_a_directory_that_was_replaced_is_not_saved_from(tiny, tmp_path):
    tiny.parts().save(tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", dtype="float32")
    make_tiny(window=12, step=4, seed=1).parts().save(tmp_path / "engine")
    with pytest.raises(ArtifactError, match=r"this engine was loaded from .*; put that one back to save"):
        engine.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # an engine without a directory has its parts in memory
    built = made(tiny)
    built.upsert([Item("x", vectors={"text": [0.5] * 8})])
    built.save(tmp_path / "out")
    assert "x" in Engine.load(tmp_path / "out").catalogue


@pytest.mark.parametrize("settings", [{}, {"graphs": "on", "row_buckets": (16,)}, {"cpu_path": "torch", "kv": "int8"}])
def test_an_engine_made_in_inference_mode_serves_and_changes_outside_of_it(tiny, tmp_path, settings):
    """A start that is decorated so leaves tensors that torch lets nobody else write to."""
    tiny.parts().save(tmp_path / "engine")
    rng = np.random.default_rng(0)
    grown = [Item(f"grown{n}", vectors=vectors(rng)) for n in range(60)]
    settings = {"dtype": "float32", "kv_budget": "20KiB", "host_budget": "1MiB", "freeze_gc": False} | settings

    def answers(start):
        with start():
            engine = Engine.load(tmp_path / "engine", **settings)
            engine.warm_up()
            engine.upsert(grown)
        engine.upsert([Item("0003", vectors=grown[0].vectors), Item("behind", vectors=grown[1].vectors)])
        engine.remove(["0005"])
        engine.set_prior({"0007": 0.5})
        with start():
            engine.reload(tmp_path / "engine")
        engine.upsert(grown[:1])
        histories = [
            [f"{item:04d}" for item in rng.integers(0, 100, 9)] for rng in map(np.random.default_rng, range(9))
        ]
        found = [engine.recommend(items[:length], user_id=items[0]) for length in (6, 9) for items in histories]
        found.append(asyncio.run(engine.submit(Request(histories[0], user_id="later"))))
        assert engine.stats().blocks_restored > 0
        engine.close()
        return found

    assert answers(torch.inference_mode) == answers(nullcontext)
