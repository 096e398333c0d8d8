"""Another engine directory under a running engine: all of it or none of it, and nothing of the old one read."""

import asyncio
import threading
import time

import numpy as np
import pytest
from reference import make_tiny

from speeder_engine import (
    ArtifactError,
    ConfigError,
    DataError,
    Engine,
    EngineConfig,
    InvalidRequest,
    Item,
    Request,
    UnknownItem,
)
from speeder_engine.config import CalendarConfig


@pytest.fixture(scope="module")
def old():
    return make_tiny(window=12, step=4)


@pytest.fixture(scope="module")
def new():
    return make_tiny(window=9, step=3, num_items=90, seed=7)


@pytest.fixture
def directories(old, new, tmp_path):
    for name, tiny in (("old", old), ("new", new)):
        tiny.parts().save(tmp_path / name)
    return tmp_path


def loaded(path, **settings):
    return Engine.load(path, dtype="float32", **{"kv_budget": "4MiB", "debug": True} | settings)


def test_a_reload_serves_the_other_directory_and_forgets_what_it_computed(old, directories):
    engine, cold = loaded(directories / "old"), loaded(directories / "new", kv_budget="0")
    ids = old.ids(range(8))
    before = engine.recommend(ids, user_id="a")
    engine.session("b").append(*ids[:3])
    revision = engine.revision
    assert engine.reload(directories / "new") == engine.revision == cold.revision != revision
    assert engine.stats().num_sessions == engine.stats().rows_computed == 0
    assert engine.recommend(ids, user_id="a") == cold.recommend(ids) != before
    assert engine.session("b").recommend() == cold.recommend(ids[:3])
    with pytest.raises(UnknownItem):
        engine.recommend(["0100"])
    engine.reload(directories / "old")
    assert engine.recommend(ids, user_id="a") == before


@pytest.mark.parametrize("broken", ["absent", "truncated", "altered", "missing weights", "no path"])
def test_a_directory_that_does_not_load_changes_nothing(old, directories, broken):
    engine, ids = loaded(directories / "old"), old.ids(range(8))
    engine.upsert([Item("0003", title="renamed")])
    before = engine.recommend(ids, user_id="a")
    path = directories / "new"
    tokens = path / "item_tokens.safetensors"
    if broken == "absent":
        path = directories / "nowhere"
    elif broken == "truncated":
        tokens.write_bytes(tokens.read_bytes()[:-8])
    elif broken == "altered":
        content = bytearray(tokens.read_bytes())
        content[-1] ^= 1
        tokens.write_bytes(content)
    elif broken == "missing weights":
        (path / "weights.safetensors").unlink()
    error = ConfigError if broken == "no path" else ArtifactError
    with pytest.raises(error) as caught:
        engine.reload(None if broken == "no path" else path)
    assert "\n" not in str(caught.value)
    rows = engine.stats().rows_computed
    assert engine.recommend(ids, user_id="a") == before
    assert engine.stats().rows_computed == rows
    assert engine.catalogue.title("0003") == "renamed"


def test_what_was_set_at_run_time_ends_with_what_it_was_set_on(old, directories):
    engine = loaded(directories / "old")
    before = engine.recommend(["0001"])
    engine.upsert([Item("x", vectors={"text": np.ones(8)})])
    engine.remove([before.items[0]])
    engine.set_prior({"0050": 9.0})
    assert engine.recommend(["0001"]) != before
    engine.reload(directories / "old")
    assert engine.recommend(["0001"]) == before
    assert "x" not in engine.catalogue


def test_a_session_with_an_item_that_is_gone_can_be_warmed_and_asked(old, directories):
    engine = loaded(directories / "old")
    engine.upsert([Item("x", vectors={"text": np.ones(8)})])
    session = engine.session("ada").append("0001", "x", "0002")
    engine.reload(directories / "old")
    with pytest.raises(UnknownItem, match="unknown item 'x'"):
        session.warm()
    assert session.warm(on_unknown="skip") == 2
    assert session.recommend(on_unknown="skip").items == engine.recommend(["0001", "0002"]).items
    assert engine.warm("bob", ["0001", "x"], on_unknown="skip") == 1


def test_who_is_pinned_stays_pinned(old, directories):
    engine, ids = loaded(directories / "old"), old.ids(range(8))
    for user in ("ada", "bob", "carl", "dan", "eve"):
        engine.warm(user, ids, pin=user != "eve")
    for directory in ("new", "old"):  # who hasn't asked between two reloads is not forgotten
        engine.reload(directories / directory)
        assert engine.stats().num_pinned == 0
        if directory == "new":
            assert engine.pin_session("carl", False)
            assert not engine.pin_session("carl", False)
            engine.close_session("dan")
        for user in ("ada", "carl", "dan", "eve"):
            engine.recommend(ids[:4], user_id=user)
        assert engine.stats().num_pinned == 1
        engine.recommend(ids[:5], user_id="ada")
    engine.warm("bob", ids)
    assert engine.stats().num_pinned == 2
    assert engine.pin_session("ada", False) and engine.stats().num_pinned == 1
    engine.check_integrity()


def test_what_is_reloaded_beside_a_warm_up_is_warm(directories, monkeypatch):
    engine = loaded(directories / "old", graphs="on", row_buckets=(16,), freeze_gc=False)
    begun, reloaded = threading.Event(), threading.Event()
    warm_up = engine._now().warm_up

    def slow():
        begun.set()
        reloaded.wait(1)
        warm_up()

    monkeypatch.setattr(engine._now(), "warm_up", slow)
    warming = threading.Thread(target=engine.warm_up)
    warming.start()
    assert begun.wait(30)
    engine.reload(directories / "new")
    reloaded.set()
    warming.join()
    assert engine.stats().graphs_captured == 1


def test_items_encoded_for_the_old_model_are_not_put_into_the_new_one(directories, monkeypatch):
    engine = loaded(directories / "old")
    tokens = engine._now().embedder.tokens

    def slow(items):
        made = tokens(items)
        engine.reload(directories / "new")
        return made

    monkeypatch.setattr(engine._now().embedder, "tokens", slow)
    with pytest.raises(DataError, match="reloaded while the items were encoded; upsert them again"):
        engine.upsert([Item("x", vectors={"text": np.ones(8)})])
    assert "x" not in engine.catalogue
    assert engine.upsert([Item("x", vectors={"text": np.ones(8)})]) == 1


def test_requests_that_wait_are_answered_by_what_serves_when_their_turn_comes(old, directories):
    engine, cold = loaded(directories / "old"), loaded(directories / "new", kv_budget="0")
    ids = old.ids(range(8))

    async def ask():
        lock = engine._now().lock
        with lock:
            tasks = [asyncio.ensure_future(engine.submit(Request(ids[:n], user_id=f"u{n}"))) for n in range(4)]
            gone = asyncio.ensure_future(engine.submit(Request(["0100"])))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(engine.reload, directories / "new")
        return await asyncio.gather(*tasks, gone, return_exceptions=True)

    *answers, gone = asyncio.run(ask())
    assert answers == [cold.recommend(ids[:n]) for n in range(4)]
    assert isinstance(gone, UnknownItem)
    engine.close()


def test_reloads_beside_requests_mix_nothing(old, directories):
    """Every answer is the old directory's or the new one's, whatever was cached when."""
    histories = [old.ids(np.random.default_rng(i).integers(0, 90, 7)) for i in range(6)]
    allowed = [set() for _ in histories]
    for name in ("old", "new"):
        cold = loaded(directories / name, kv_budget="0")
        for right, history in zip(allowed, histories, strict=True):
            right.add(cold.recommend(history))
    engine, wrong, done = loaded(directories / "old"), [], threading.Event()

    def ask(first):
        at = first
        while not done.is_set():
            which = at % len(histories)
            if engine.recommend(histories[which], user_id=f"u{which}") not in allowed[which]:
                wrong.append(which)
            at += 1

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(8):
        engine.reload(directories / ("new" if turn % 2 == 0 else "old"))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_settings_are_taken_by_load(directories):
    engine = Engine.load(directories / "old", dtype="float32", kv_budget=0, max_waiting=3, catalogue_capacity=500)
    assert (engine.config.max_waiting, engine.catalogue.capacity) == (3, 500)
    with pytest.raises(ConfigError, match=r"unknown keys \['max_wait'\]"):
        Engine.load(directories / "old", max_wait=3)
    with pytest.raises(ConfigError, match="catalogue_capacity: 7 is less than the 120 items"):
        Engine.load(directories / "old", catalogue_capacity=7)
    with pytest.raises(ConfigError, match="host_budget: 'much' is no size"):
        Engine(engine.parts, EngineConfig(host_budget="much"))


def test_a_pin_is_set_before_anybody_else_gets_in(old, directories, monkeypatch):
    """What would evict the session that is being warmed, or reload the engine, waits until it is pinned."""
    engine, ids = Engine.load(directories / "old", max_sessions=1), ["0001", "0002"]
    manager, pinned = engine._now().cache.manager, []
    others = [
        threading.Thread(target=lambda: engine.recommend(["0003"], user_id="bob")),
        threading.Thread(target=lambda: engine.reload(directories / "old")),
    ]

    class Watched:
        def __getattr__(self, name):
            return getattr(manager, name)

        def pin(self, user, *given):
            for other in others:
                other.start()
            time.sleep(0.2)
            pinned.append(manager.pin(user, *given))
            return pinned[-1]

    monkeypatch.setattr(engine._now().cache, "manager", Watched())
    assert engine.warm("ada", ids, pin=True) == 2
    for other in others:
        other.join()
    assert pinned == [True]
    engine.recommend(ids, user_id="ada")
    assert engine.stats().num_pinned == 1


def test_a_session_with_times_goes_on_with_a_model_that_reads_none(tmp_path):
    for name, calendar in (("timed", CalendarConfig(0, 100, 9)), ("plain", None)):
        make_tiny(window=12, step=4, calendar=calendar).parts().save(tmp_path / name)
    engine = loaded(tmp_path / "timed")
    ada, bob = (engine.session(user).append("0001", "0002", times=[100, 300]) for user in ("ada", "bob"))
    before = ada.recommend()
    engine.reload(tmp_path / "plain")
    with pytest.raises(InvalidRequest, match="append: times: this model was trained without; leave them out"):
        engine.session("carl").append("0001", times=[100])
    assert ada.recommend() == engine.recommend(["0001", "0002"]) != before
    bob.append("0003", times=[500])
    assert bob.warm() == 3 and bob.times == (100, 300, 500)
    ada.append("0003")
    assert ada.recommend() == bob.recommend() and ada.times == ()
    engine.reload(tmp_path / "timed")
    assert bob.recommend() == engine.recommend(["0001", "0002", "0003"], times=[100, 300, 500]) != ada.recommend()


@pytest.mark.parametrize("let_go", [lambda e: e.pin_session("ada", False), lambda e: e.close_session("ada")])
def test_who_is_let_go_while_an_engine_is_reloaded_stays_let_go(old, directories, monkeypatch, let_go):
    engine, ids, now = loaded(directories / "old"), old.ids(range(8)), Engine._now
    engine.warm("ada", ids, pin=True)
    reload = threading.Thread(target=lambda: engine.reload(directories / "old"))

    def with_a_reload_behind(self):
        serving = now(self)
        if threading.current_thread() is threading.main_thread() and not reload.ident:
            reload.start()
            reload.join(0.5)  # for ever, where it waits for this call
        return serving

    monkeypatch.setattr(Engine, "_now", with_a_reload_behind)
    assert let_go(engine)
    reload.join()
    engine.recommend(ids, user_id="ada")
    assert engine.stats().num_pinned == 0
