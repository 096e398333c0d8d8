"""Sessions: histories that an engine holds, warmed, pinned, closed; and what each of it costs in rows."""

import threading

import numpy as np
import pytest
from reference import make_tiny

from speeder_engine import (
    CacheExhausted,
    Engine,
    EngineClosed,
    EngineConfig,
    InvalidRequest,
    Request,
    UnknownItem,
    memory,
)
from speeder_engine.config import ConfigError


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=12, step=4)


def made(tiny, **settings):
    return Engine(tiny.parts(), EngineConfig(**{"dtype": "float32", "kv_budget": "4MiB", "debug": True} | settings))


@pytest.fixture
def engine(tiny):
    return made(tiny)


@pytest.fixture
def cold(tiny):
    return made(tiny, kv_budget="0")


def rows_of(engine, call):
    before = engine.stats().rows_computed
    call()
    return engine.stats().rows_computed - before


def test_a_session_holds_its_history(tiny, engine, cold):
    ids = tiny.ids(range(30, 40))
    session = engine.session("ada").append(*ids[:4])
    assert session.recommend(k=5) == cold.recommend(ids[:4], k=5)
    assert rows_of(engine, lambda: session.append(*ids[4:6]).recommend()) == 2
    assert rows_of(engine, lambda: session.recommend(candidates=ids[7:], k=3)) == 3
    assert session.recommend(candidates=ids[7:]) == cold.recommend(ids[:6], candidates=ids[7:])
    assert (session.history, len(session), session.user_id) == (tuple(ids[:6]), 6, "ada")
    assert engine.session("ada").history == session.history
    assert engine.session("bob").history == ()
    session.replace([*ids[:3], ids[9]])
    assert rows_of(engine, session.recommend) == 1
    assert session.recommend() == cold.recommend([*ids[:3], ids[9]])


def test_a_closed_session_starts_anew(tiny, engine):
    session = engine.session("ada").append("0001", "0002")
    session.recommend()
    assert engine.stats().num_sessions == 1
    assert session.close()
    assert not session.close()
    assert engine.stats().num_sessions == 0
    assert engine.session("ada").history == session.history == ()
    # a session that somebody holds goes on with the new history, not with the forgotten one
    session.append("0003")
    assert engine.session("ada").history == session.history == ("0003",)
    assert session.recommend() == engine.recommend(["0003"])
    session.close()
    assert (session.history, session.times, len(session)) == ((), (), 0)
    assert not engine._histories  # of who is only looked at nothing is kept
    engine.session("bob").append("0001")
    assert engine.close_session("bob")
    engine.close()
    with pytest.raises(EngineClosed):
        session.history  # noqa: B018


def test_bad_appends_add_nothing(engine):
    session = engine.session("ada").append("0001")
    for call, error, message in (
        (lambda: session.append("0002", "nope"), UnknownItem, "append: unknown item 'nope'"),
        (lambda: session.append(7), InvalidRequest, "item ids are strings, got 7"),
        (lambda: session.append(["0002"]), InvalidRequest, "item ids are strings"),
        (lambda: session.append("0002", times=[1.0, 2.0]), InvalidRequest, "append: times: 2 for 1 interactions"),
        (lambda: session.append("0002", times=[1.0]), InvalidRequest, "append: times: this model was trained without"),
        (lambda: session.replace(["nope"]), UnknownItem, "replace: unknown item 'nope'"),
        (lambda: session.replace("0002"), InvalidRequest, "got the string '0002'"),
        (lambda: session.replace(["0002"], times=[]), InvalidRequest, "replace: times: 0 for 1 interactions"),
        (lambda: engine.session(7), InvalidRequest, "user_id: expected a string"),
        (lambda: engine.session(None), InvalidRequest, "user_id: expected a string"),
        (lambda: engine.session("x" * 513), InvalidRequest, "user_id: 513 characters, at most 512; sessions are kept"),
        (lambda: session.append("\ud800"), InvalidRequest, r"append: item id '\\ud800' is no valid Unicode text"),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert session.history == ("0001",)


def test_appends_from_several_threads_are_all_there(engine):
    session = engine.session("ada")

    def append(i):
        for _ in range(50):
            session.append(f"{i:04d}")

    threads = [threading.Thread(target=append, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(session.history) == sorted(f"{i:04d}" for i in range(4) for _ in range(50))


def test_a_warmed_user_costs_no_row_when_the_request_comes(tiny, engine, cold):
    ids = tiny.ids(range(9))
    assert engine.warm("ada", ids) == 9
    assert engine.warm("ada", ids) == 0
    assert rows_of(engine, lambda: engine.recommend(ids, user_id="ada")) == 0
    assert engine.recommend(ids, user_id="ada") == cold.recommend(ids)
    assert engine.session("bob").append(*ids[:3]).warm() == 3
    assert engine.warm("carl", []) == 0
    with pytest.raises(InvalidRequest, match="user_id"):
        engine.warm(None, ids)
    with pytest.raises(UnknownItem):
        engine.warm("ada", ["nope"])


def test_pinned_sessions_are_evicted_last(tiny):
    # 6 blocks: a history of 12 takes one
    engine = made(tiny, kv_budget="40KB")
    ids = tiny.ids(range(12))
    engine.warm("ada", ids, pin=True)
    for i in range(20):
        engine.recommend(ids[:5], user_id=f"u{i}")
    assert engine.stats().evictions > 0
    assert engine.stats().num_pinned == 1
    assert engine.warm("ada", ids) == 0
    assert engine.pin_session("ada", False)
    for i in range(20):
        engine.recommend(ids[:5], user_id=f"v{i}")
    assert engine.warm("ada", ids) == 12
    assert not engine.pin_session("nobody")


def test_a_pin_that_is_refused_is_told(tiny):
    ids = tiny.ids(range(12))
    for budget, others in (("0", 0), ("40KB", 6)):  # 6 blocks: a history of 12 takes one
        engine = made(tiny, kv_budget=budget)
        for i in range(others):
            assert engine.warm(f"u{i}", ids, pin=True) == 12
        with pytest.raises(CacheExhausted, match=f"'ada' is computed and not pinned: .* '{budget}'; raise it"):
            engine.warm("ada", ids, pin=True)
        assert engine.stats().num_pinned == others
        assert engine.warm("bob", [], pin=True) == 0  # nothing to keep
        engine.check_integrity()


def test_a_budget_is_a_bound(tiny):
    engine = made(tiny, kv_budget="40KB")
    for i in range(30):
        engine.recommend(tiny.ids(range(10)), user_id=f"u{i}")
        assert engine.stats().session_bytes <= 40_000
    assert engine.stats().num_sessions == 6
    assert engine.stats().evictions == 24


def test_the_number_of_sessions_is_a_bound(tiny):
    engine = made(tiny, max_sessions=3)
    for i in range(5):
        engine.recommend(["0001"], user_id=f"u{i}")
    assert engine.stats().num_sessions == 3
    assert engine.warm("u4", ["0001"]) == 0
    assert engine.warm("u0", ["0001"]) == 1


def test_a_users_quota_keeps_the_oldest_part(tiny):
    block = made(tiny, block_size=4)._now().cache.size.block_bytes
    engine, cold = made(tiny, block_size=4, user_quota=str(2 * block)), made(tiny, kv_budget="0", block_size=4)
    ids = tiny.ids(range(12))
    engine.recommend(ids[:11], user_id="ada")
    assert engine.stats().session_bytes == 2 * block
    assert rows_of(engine, lambda: engine.recommend(ids, user_id="ada")) == 4
    assert engine.recommend(ids, user_id="ada") == cold.recommend(ids)
    assert rows_of(engine, lambda: engine.recommend(ids[:7], user_id="bob")) == 7
    assert rows_of(engine, lambda: engine.recommend(ids[:7], user_id="bob")) == 0


def test_a_budget_of_less_than_a_window_keeps_the_oldest_part_of_one(tiny):
    block = made(tiny, block_size=4)._now().cache.size.block_bytes
    engine, cold = made(tiny, block_size=4, kv_budget=str(2 * block)), made(tiny, kv_budget="0", block_size=4)
    ids = tiny.ids(range(12))
    engine.recommend(ids, user_id="ada")
    assert rows_of(engine, lambda: engine.recommend(ids, user_id="ada")) == 4
    assert engine.recommend(ids, user_id="ada") == cold.recommend(ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evicted_to_host_memory_and_restored_is_as_if_never_gone(tiny, dtype):
    engine = made(tiny, kv_budget="26KB", host_budget="1MiB", dtype=dtype)
    cold = made(tiny, kv_budget="0", dtype=dtype)
    rng = np.random.default_rng(0)
    histories = {f"u{i}": tiny.ids(rng.integers(0, 120, 12)) for i in range(12)}
    for user, history in histories.items():
        engine.recommend(history[:8], user_id=user)
    stats = engine.stats()
    assert stats.num_host_sessions >= 4
    assert stats.evictions == 0
    assert (stats.num_sessions, stats.rows_computed) == (12, 96)
    for length, rows in ((8, 0), (9, 1), (12, 3)):
        for user, history in histories.items():
            candidates = tiny.ids(rng.permutation(120)[:5])
            expected = cold.recommend(history[:length], candidates=candidates)
            asked = {"user_id": user, "candidates": candidates}
            before = engine.stats().rows_computed
            assert engine.recommend(history[:length], **asked) == expected
            assert engine.stats().rows_computed - before == rows + 5
    assert engine.stats().blocks_restored >= 20
    # corrected while in host memory
    for user, history in histories.items():
        corrected = [*history[:3], f"{(int(history[3]) + 1) % 120:04d}", *history[4:]]
        before = engine.stats().rows_computed
        assert engine.recommend(corrected, user_id=user) == cold.recommend(corrected)
        assert engine.stats().rows_computed - before == 9


def test_a_step_that_fails_leaves_both_tiers_as_they_were(tiny, monkeypatch):
    engine = made(tiny, kv_budget="26KB", host_budget="1MiB")
    ids = tiny.ids(range(12))
    for i in range(9):
        engine.recommend(ids[: i + 3], user_id=f"u{i}")
    before = engine._now().cache.manager.stats()

    def fail(*_):
        raise RuntimeError("injected")

    for where, what in ((engine._now().scorer, "score"), (engine._now().runner, "forward")):
        monkeypatch.setattr(where, what, fail)
        for i in range(9):
            with pytest.raises(RuntimeError, match="injected"):
                engine.recommend([*ids[:2], *ids[5 : 7 + i]], user_id=f"u{i}")
        monkeypatch.undo()
    after = engine._now().cache.manager.stats()
    held = ("num_free_blocks", "num_sessions", "num_host_sessions", "session_blocks", "host_blocks_used", "evictions")
    assert {name: after[name] for name in held} == {name: before[name] for name in held}
    for i in reversed(range(9)):
        assert engine.warm(f"u{i}", ids[: i + 3]) == 0


def test_an_offload_that_fails_loses_only_what_was_leaving(tiny, monkeypatch):
    engine, cold = made(tiny, kv_budget="26KB", host_budget="1MiB"), made(tiny, kv_budget="0")
    ids = tiny.ids(range(12))
    for i in range(3):
        engine.recommend(ids[: i + 3], user_id=f"u{i}")

    def fail(*_):
        raise RuntimeError("no more host memory")

    monkeypatch.setattr(engine._now().cache, "_offload", fail)
    with pytest.raises(RuntimeError, match="no more host memory"):
        for i in range(3, 9):
            counted = engine.stats().rows_computed
            engine.recommend(ids[: i + 3], user_id=f"u{i}")
    monkeypatch.undo()
    assert engine.stats().rows_computed == counted
    engine.recommend(["0001"])
    assert engine.stats().rows_computed == counted + 1
    engine.check_integrity()
    for i in range(9):
        assert engine.recommend(ids[: i + 3], user_id=f"u{i}") == cold.recommend(ids[: i + 3])


class Interrupted:
    """A block manager whose call `name` is interrupted when it has come back: what it did is done."""

    def __init__(self, manager, name):
        self._manager, self._name = manager, name

    def __getattr__(self, name):
        real = getattr(self._manager, name)
        if name != self._name:
            return real

        def call(*args):
            real(*args)
            raise KeyboardInterrupt

        return call


@pytest.mark.parametrize("call", ["plan", "commit", "finish", "release"])
def test_an_interrupt_beside_a_native_call_leaves_no_step_open(tiny, monkeypatch, call):
    engine, cold = made(tiny, kv_budget="26KB", host_budget="1MiB"), made(tiny, kv_budget="0")
    ids, serving = tiny.ids(range(12)), engine._now()

    def fail(*_):
        raise RuntimeError("injected")

    for i in range(9):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(serving.cache, "manager", Interrupted(serving.cache.manager, call))
            if call == "release":
                patch.setattr(serving.runner, "forward", fail)
            for at in range(12):
                engine.recommend(ids[at : at + 9], user_id=f"u{i}")
                engine.recommend(ids[at : at + 9], user_id=f"v{at}")
    engine.recommend(ids, user_id="u1")
    stats = serving.cache.manager.stats()
    assert stats["num_open_steps"] == 0
    assert stats["num_free_blocks"] + stats["session_blocks"] == stats["num_blocks"] - serving.cache.size.num_shared
    for i in range(9):
        assert engine.recommend(ids[:i], user_id=f"u{i}") == cold.recommend(ids[:i])
    engine.check_integrity()


def test_a_step_that_was_abandoned_is_ended_once(tiny):
    engine = made(tiny)
    serving = engine._now()
    query = serving.resolve(Request(tiny.ids(range(5)), user_id="ada"))
    step = serving.forward([query])
    step.__enter__()  # and nobody ends it
    assert engine.warm("ada", tiny.ids(range(5))) == 5
    step.gen.close()
    assert engine.warm("ada", tiny.ids(range(5))) == 0
    engine.check_integrity()


@pytest.mark.parametrize("user", [7, None, ["ada"], "\ud800"])
def test_strange_users_are_refused_in_one_line(engine, user):
    for call in (engine.session, engine.close_session, engine.pin_session, lambda user: engine.warm(user, [])):
        with pytest.raises(InvalidRequest, match="user_id: ") as caught:
            call(user)
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="pinned: expected true or false"):
        engine.pin_session("ada", "yes")


def test_any_text_names_a_user(tiny, engine):
    for user in ("", "\0", "\0x", "ユーザー☕", " "):
        assert engine.warm(user, ["0001"]) == 1
        assert engine.warm(user, ["0001"]) == 0
    assert engine.stats().num_sessions == 5


@pytest.mark.parametrize("name", ["kv_budget", "host_budget"])
def test_more_memory_than_there_is_is_refused_in_one_line(tiny, name):
    with pytest.raises(ConfigError, match=rf"{name}.* would take .* bytes, which .* can't give; lower it") as caught:
        made(tiny, **{name: "1000000GiB"})
    assert "\n" not in str(caught.value)


def test_a_catalogue_beyond_memory_is_refused_before_it_is_made(tiny):
    wanted = r"catalogue_capacity: 2,000,000,000 items would take [\d,]+ bytes, which cpu can't give; lower it"
    with pytest.raises(ConfigError, match=wanted):
        made(tiny, catalogue_capacity=2 * 10**9)


@pytest.mark.parametrize("name", ["kv_budget", "host_budget"])
def test_what_a_container_may_not_take_is_refused_before_it_is_killed_for_it(tiny, name, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.limit_in_bytes").write_text("3000000\n")
    limits = [tmp_path / each for each in ("memory.max", "memory.limit_in_bytes", "of no such controller")]
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", limits)
    with pytest.raises(ConfigError, match=rf"{name}.* would take [34],[0-9,]+ bytes, which cpu can't give; lower it"):
        made(tiny, **{"kv_budget": "0", name: "4MB"})
    made(tiny, **{"kv_budget": "0", name: "2MB"})


@pytest.mark.parametrize("value", [0, -1, 2**40])
def test_counts_have_bounds(value):
    with pytest.raises(ConfigError, match=rf"EngineConfig.max_batch_users must be within 1\.\.\d+, is {value}"):
        EngineConfig(max_batch_users=value)


@pytest.mark.parametrize("name", ["kv_budget", "host_budget", "user_quota"])
def test_a_size_that_holds_nothing_is_refused(tiny, name):
    with pytest.raises(ConfigError, match=f"{name}: '100B' holds not one block of"):
        made(tiny, **{name: "100B"})
