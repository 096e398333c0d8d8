"""The queue behind `submit`: batches within the row budget, deadlines, back-pressure, and answers of one's own."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from reference import make_tiny

from speeder_engine import (
    ConfigError,
    DeadlineExceeded,
    Engine,
    EngineClosed,
    EngineConfig,
    InvalidRequest,
    QueueFull,
    Request,
    UnknownItem,
)
from speeder_engine.parts import EngineParts


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=12, step=4)


def made(tiny, **settings):
    return Engine(tiny.parts(), EngineConfig(**{"dtype": "float32", "kv_budget": "4MiB", "debug": True} | settings))


def some_requests(tiny, count, users=5, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        history = tiny.ids(rng.integers(0, 120, rng.integers(0, 20)))
        options = {"candidates": tiny.ids(rng.permutation(120)[:7])} if i % 3 == 0 else {}
        yield Request(history, user_id=f"u{rng.integers(users)}", **options)


class Held:
    """Keeps an engine's worker from taking anything until it is let go."""

    def __init__(self, engine):
        self.lock = engine._now().lock

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_answers_are_those_of_recommend_whatever_the_company(tiny):
    cold = made(tiny, kv_budget="0")
    requests = list(some_requests(tiny, 60))
    expected = cold.recommend_many(requests)

    async def ask(engine):
        return await asyncio.gather(*(engine.submit(request) for request in requests))

    with made(tiny, max_batch_users=8, max_batch_rows=60) as engine:
        assert asyncio.run(ask(engine)) == expected
        assert asyncio.run(ask(engine)) == expected
        stats = engine.stats()
    assert stats.requests == 120
    assert 120 / 8 <= stats.steps < 120


def test_a_step_takes_what_waits_within_the_row_budget_and_one_request_a_user(tiny):
    sizes = []
    with made(tiny, max_batch_users=8, max_batch_rows=24) as engine:
        serving = engine._now()
        step = serving.step

        def counting(queries):
            sizes.append([(q.request.user_id, len(q.window)) for q in queries])
            return step(queries)

        serving.step = counting

        async def ask():
            with Held(engine):
                tasks = [
                    asyncio.ensure_future(engine.submit(Request(tiny.ids(range(10)), user_id=user)))
                    for user in ("a", "b", "a", "c", "d")
                ]
                tasks.append(asyncio.ensure_future(engine.submit(Request(tiny.ids(range(40)), user_id="e"))))
                await asyncio.sleep(0.05)
            return await asyncio.gather(*tasks)

        asyncio.run(ask())
    # 24 rows hold two cold users; the second request of a finds its history cached and needs no row
    assert sizes == [[("a", 10), ("b", 10)], [("a", 10), ("c", 10), ("d", 10)], [("e", 12)]]


def test_an_idle_engine_waits_for_company_no_longer_than_asked(tiny):
    async def ask(engine, count):
        return await asyncio.gather(*(engine.submit(Request(tiny.ids(range(i)))) for i in range(count)))

    with made(tiny, batch_wait_ms=150.0, max_batch_users=4) as engine:
        started = time.monotonic()
        asyncio.run(ask(engine, 2))
        assert time.monotonic() - started >= 0.15
        assert engine.stats().steps == 1
        # a step's worth does not wait
        started = time.monotonic()
        asyncio.run(ask(engine, 4))
        assert engine.stats().steps == 2
        assert time.monotonic() - started < 5


def test_a_full_queue_refuses_at_once_and_loses_nothing(tiny):
    with made(tiny, max_waiting=3) as engine:

        async def ask():
            with Held(engine):
                tasks = [asyncio.ensure_future(engine.submit(Request(["0001"], user_id=f"u{i}"))) for i in range(3)]
                await asyncio.sleep(0.05)
                assert engine.stats().num_waiting == 3
                started = time.monotonic()
                with pytest.raises(QueueFull, match="3 requests are waiting, max_waiting is 3"):
                    await engine.submit(Request(["0001"]))
                assert time.monotonic() - started < 0.5
                tasks[1].cancel()
                await asyncio.sleep(0)
                # a cancelled request makes room
                tasks.append(asyncio.ensure_future(engine.submit(Request(["0002"]))))
                await asyncio.sleep(0.05)
            return await asyncio.gather(*tasks, return_exceptions=True)

        answers = asyncio.run(ask())
        assert isinstance(answers[1], asyncio.CancelledError)
        assert answers[0] == answers[2] == engine.recommend(["0001"])
        assert answers[3] == engine.recommend(["0002"])
        assert engine.stats().requests == 3 + 2
        assert engine.stats().num_refused == 1


def test_a_deadline_that_passes_while_waiting_is_an_error_of_its_own(tiny):
    with made(tiny) as engine:

        async def ask():
            with Held(engine):
                late = asyncio.ensure_future(engine.submit(Request(["0001"]), timeout_ms=30))
                patient = asyncio.ensure_future(engine.submit(Request(["0002"]), timeout_ms=60_000))
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded, match="still waiting after timeout_ms=30"):
                    await late
                assert time.monotonic() - started < 5
            return await patient

        assert asyncio.run(ask()) == engine.recommend(["0002"])
        assert engine.stats().requests == 2
        assert engine.stats().num_expired == 1


def test_the_worker_drops_what_expired_before_it_came_to_it(tiny):
    """The waiting side may be busy itself: the deadline then holds all the same."""
    with made(tiny) as engine:
        with Held(engine):
            waiting = engine._enqueue(Request(["0001"]), 10)
            time.sleep(0.03)
        with pytest.raises(DeadlineExceeded):
            waiting.future.result(timeout=30)
        assert engine.stats().requests == 0


def test_one_request_that_fails_does_not_spoil_the_others(tiny, monkeypatch):
    with made(tiny) as engine:
        serving = engine._now()
        step = serving.step

        def failing(queries):
            if any(len(query.window) == 4 for query in queries):
                raise RuntimeError("injected")
            return step(queries)

        monkeypatch.setattr(serving, "step", failing)

        async def ask():
            with Held(engine):
                tasks = [asyncio.ensure_future(engine.submit(Request(tiny.ids(range(i))))) for i in range(7)]
                await asyncio.sleep(0.05)
            return await asyncio.gather(*tasks, return_exceptions=True)

        answers = asyncio.run(ask())
        monkeypatch.undo()
        for i, answer in enumerate(answers):
            if i == 4:
                assert isinstance(answer, RuntimeError)
            else:
                assert answer == engine.recommend(tiny.ids(range(i)))


def test_one_users_flood_does_not_hold_the_others_up(tiny):
    with made(tiny, max_batch_users=4) as engine:

        async def ask():
            with Held(engine):
                flood = [asyncio.ensure_future(engine.submit(Request(["0001"], user_id="a"))) for _ in range(50)]
                others = [asyncio.ensure_future(engine.submit(Request(["0002"], user_id=f"u{i}"))) for i in range(6)]
                await asyncio.sleep(0.05)
            await asyncio.gather(*others)
            steps = engine.stats().steps
            await asyncio.gather(*flood)
            return steps

        # two steps' worth, and what the flood's own steps were until the others are told
        assert asyncio.run(ask()) < 25


@pytest.mark.parametrize("ask", ["submit", "recommend_many"])
def test_a_change_waits_for_the_step_that_runs_and_for_no_other(tiny, monkeypatch, ask):
    engine = made(tiny, max_batch_users=2)
    serving, order, running, go_on = engine._now(), [], threading.Event(), threading.Event()
    step, apply = serving.step, serving.catalogue.apply

    def watched(queries):
        order.append("step")
        running.set()
        assert go_on.wait(60)
        return step(queries)

    def answer():
        if ask == "recommend_many":
            return engine.recommend_many(list(some_requests(tiny, 8)))
        return asyncio.run(answers())

    async def answers():
        return await asyncio.gather(*(engine.submit(request) for request in some_requests(tiny, 8)))

    monkeypatch.setattr(serving, "step", watched)
    monkeypatch.setattr(serving.catalogue, "apply", lambda change: (order.append("change"), apply(change)))
    asking = threading.Thread(target=answer)
    changing = threading.Thread(target=engine.set_prior, args=[{"0001": 1.0}])
    asking.start()
    assert running.wait(60)
    changing.start()
    deadline = time.monotonic() + 60
    while not serving.lock._door.locked() and time.monotonic() < deadline:
        time.sleep(1e-3)
    go_on.set()
    changing.join()
    asking.join()
    assert order[:3] == ["step", "change", "step"] and order.count("step") > 3


def test_sessions_are_found_while_the_engine_reloads(tiny, tmp_path, monkeypatch):
    tiny.parts().save(tmp_path / "e")
    reading, go_on = threading.Event(), threading.Event()
    load = EngineParts.load

    def slow(path):
        reading.set()
        assert go_on.wait(30)
        return load(path)

    monkeypatch.setattr(EngineParts, "load", slow)
    with made(tiny) as engine:
        loading = threading.Thread(target=engine.reload, args=(tmp_path / "e",))
        loading.start()
        assert reading.wait(30)
        assert len(engine.session("ada").append("0001").recommend()) == 10
        assert engine.close_session("ada")
        go_on.set()
        loading.join()
        assert engine.revision != "unsaved"


def test_the_worker_outlives_a_request_that_cannot_be_resolved_anew(tiny, tmp_path, monkeypatch):
    tiny.parts().save(tmp_path / "e")
    with made(tiny) as engine:
        held = Held(engine)
        with held:
            waiting = engine._enqueue(Request(["0001"]), None)
            engine.reload(tmp_path / "e")

            def fail(*_):
                raise RuntimeError("injected")

            monkeypatch.setattr(engine._now(), "resolve", fail)
        # the worker has this or the next serving; both end the request
        try:
            assert len(waiting.future.result(timeout=30)) == 10
        except RuntimeError as error:
            assert str(error) == "injected"
        monkeypatch.undo()
        assert len(asyncio.run(engine.submit(Request(["0001"])))) == 10


@pytest.mark.parametrize("timeout", [10**400, float("inf"), np.float32(9e9), np.int64(10**9)])
def test_any_number_is_a_timeout(tiny, timeout):
    with made(tiny) as engine:
        for _ in range(2):
            assert len(asyncio.run(engine.submit(Request(["0001"]), timeout_ms=timeout))) == 10


@pytest.mark.parametrize(
    ("request_", "options", "error", "message"),
    [
        (lambda: Request(["nope"]), {}, UnknownItem, "history: unknown item 'nope'"),
        (lambda: ["0001"], {}, InvalidRequest, "submit: expected Requests, got list"),
        (lambda: Request(["0001"]), {"timeout_ms": 0}, InvalidRequest, "timeout_ms: expected a positive number"),
        (lambda: Request(["0001"]), {"timeout_ms": "fast"}, InvalidRequest, "timeout_ms: expected a positive number"),
        (lambda: Request(["0001"]), {"timeout_ms": float("nan")}, InvalidRequest, "timeout_ms: expected a positive"),
    ],
)
def test_bad_submissions_are_refused_at_once(tiny, request_, options, error, message):
    with made(tiny) as engine, pytest.raises(error, match=message):
        asyncio.run(engine.submit(request_(), **options))


def test_closing_ends_what_waits_and_everything_after(tiny):
    engine = made(tiny)

    async def ask():
        held = Held(engine)
        held.__enter__()
        tasks = [asyncio.ensure_future(engine.submit(Request(["0001"], user_id=f"u{i}"))) for i in range(3)]
        await asyncio.sleep(0.05)
        closing = threading.Thread(target=engine.close)
        closing.start()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        held.__exit__()
        closing.join(timeout=30)
        return answers

    assert all(isinstance(answer, EngineClosed) for answer in asyncio.run(ask()))
    engine.close()
    for call in (
        lambda: engine.recommend(["0001"]),
        lambda: engine.recommend_many([]),
        lambda: asyncio.run(engine.submit(Request(["0001"]))),
        lambda: engine.stats(),
        lambda: engine.catalogue,
        lambda: engine.session("a"),
        lambda: engine.warm("a", ["0001"]),
        lambda: engine.close_session("a"),
        lambda: engine.upsert([]),
        lambda: engine.remove(["0001"]),
        lambda: engine.reload("nowhere"),
        lambda: engine.user_vector(["0001"]),
        lambda: engine.item_vectors(["0001"]),
        lambda: engine.similar_items("0001"),
        lambda: engine.pin_session("a"),
        lambda: engine.__enter__(),
    ):
        with pytest.raises(EngineClosed, match="closed"):
            call()


def test_an_engine_nobody_holds_is_freed_with_its_worker(tiny):
    engine = made(tiny)
    asyncio.run(engine.submit(Request(["0001"])))
    thread, ref = engine._worker._thread, weakref.ref(engine)
    assert thread.is_alive()
    del engine
    gc.collect()
    assert ref() is None
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_warmed_up_engine_with_sessions_is_freed_too(tiny):
    """What the garbage collector no longer looks at must not need it."""
    engine = made(tiny)
    engine.warm_up()
    try:
        engine.session("ada").append("0001").recommend()
        ref = weakref.ref(engine)
        del engine
        assert ref() is None
    finally:
        gc.unfreeze()


LEAVES = """
import asyncio
from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.random_engine import random_parts

parts = random_parts(num_items=120)
engine, ids = Engine(parts, EngineConfig(dtype="float32")), parts.catalogue.item_ids[:100]

async def main():
    for _ in range(50):
        asyncio.ensure_future(engine.submit(Request(ids, candidates=ids)))
    await asyncio.sleep(0.02)

asyncio.run(main())
"""


def test_a_process_that_ends_while_a_step_runs_ends_well():
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_is_told_to_load_its_own(tiny):
    engine = made(tiny)
    asyncio.run(engine.submit(Request(["0001"])))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for call in (lambda: engine.recommend(["0001"]), lambda: asyncio.run(engine.submit(Request(["0001"])))):
                with pytest.raises(EngineClosed, match="forked from"):
                    call()
            engine.close()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    os.close(reading)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(engine.recommend(["0001"])) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_loads_its_own_with_one_thread_or_is_told(tiny):
    """torch's threads are not copied by a fork: a parallel loop in the child would wait for them for good."""
    expected = made(tiny).recommend(["0001"])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(2)
            with pytest.raises(
                ConfigError, match=r"Engine: this process was forked from one that had loaded a model.*spawn"
            ):
                made(tiny)
            torch.set_num_threads(1)
            assert made(tiny).recommend(["0001"]) == expected
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("waits", [{}, {"timeout_ms": 60_000}])
def test_waiting_for_company_costs_nobody_a_deadline(tiny, waits):
    async def ask(engine):
        with_deadline = engine.submit(Request(["0001"]), timeout_ms=2_000)
        return await asyncio.gather(engine.submit(Request(["0002"]), **waits), with_deadline)

    with made(tiny, batch_wait_ms=60_000.0) as engine:
        assert [len(answer) for answer in asyncio.run(ask(engine))] == [10, 10]
        assert engine.stats().steps == 1


def test_the_cancelled_are_nobodys_company(tiny):
    async def ask(engine):
        tasks = [asyncio.ensure_future(engine.submit(Request(["0001"]))) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert engine.stats().num_waiting == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.stats().num_waiting == 0

    with made(tiny, batch_wait_ms=60_000.0, max_batch_users=4) as engine:
        asyncio.run(ask(engine))


def test_a_worker_that_fails_leaves_nobody_waiting(tiny, monkeypatch, caplog):
    engine = made(tiny)
    monkeypatch.setattr(engine._scheduler, "wait", lambda: 1 / 0)
    with pytest.raises(EngineClosed):
        asyncio.run(engine.submit(Request(["0001"])))
    assert "ZeroDivisionError" in caplog.text


def test_many_loops_and_threads_at_once(tiny):
    cold, requests = made(tiny, kv_budget="0"), list(some_requests(tiny, 40, users=6, seed=3))
    expected = cold.recommend_many(requests)
    wrong = []

    async def ask(engine, order):
        answers = await asyncio.gather(*(engine.submit(requests[i]) for i in order))
        wrong.extend(i for i, answer in zip(order, answers, strict=True) if answer != expected[i])

    def direct(engine, order):
        wrong.extend(i for i in order if engine.recommend_many([requests[i]])[0] != expected[i])

    with made(tiny, kv_budget="40KB", max_batch_users=8) as engine:
        orders = [np.random.default_rng(seed).permutation(40).tolist() for seed in range(4)]
        threads = [threading.Thread(target=lambda o=o: asyncio.run(ask(engine, o))) for o in orders[:2]]
        threads += [threading.Thread(target=direct, args=(engine, o)) for o in orders[2:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.check_integrity()
    assert not wrong
