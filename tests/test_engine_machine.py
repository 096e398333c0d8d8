"""The engine's invariants in combination: whatever happens between two requests, every answer is a cold engine's, bit
for bit, and every step computes exactly the rows that a session leaves to compute.

A warm engine with tight budgets and a cold one without a cache are told of the same changes. `Watch` holds what each
user's session must be, in plain words, and compares it with every plan of the warm one.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import make_titled, reference_scores, reference_title_scores

from speeder_engine import Engine, EngineConfig, InvalidRequest, Item, Request
from speeder_engine import serving as serving_module
from speeder_engine.config import CalendarConfig
from speeder_engine.errors import CacheExhausted, CatalogueFull, DataError, UnknownItem

WINDOW, STEP, NUM_ITEMS, CAPACITY = 7, 3, 36, 40
DAY = 86_400
USERS = ("ada", "bob", "cid", "dörte", "")
HELD = ("num_free_blocks", "num_sessions", "num_host_sessions", "num_pinned", "session_blocks", "host_blocks_used")

Event = tuple[str, float]  # item id, time


@cache
def titled():
    return make_titled(NUM_ITEMS, WINDOW, STEP, calendar=CalendarConfig(0, DAY, 4))


@cache
def block_bytes(dtype: str, block_size: int) -> int:
    engine = Engine(titled().parts(), EngineConfig(dtype=dtype, block_size=block_size))
    return engine._now().cache.size.block_bytes


class Watch:
    """What each user's session must be: the keys of its positions, and whether h(last) is there."""

    def __init__(self, engine: Engine, quota: int | None) -> None:
        self.engine, self.quota = engine, quota
        self.cache = engine._now().cache
        self.sessions: dict[str, tuple[tuple, bool]] = {}
        self.rows = 0  # history rows of all steps
        self._real = {name: getattr(self.cache, name) for name in ("plan", "commit", "release")}
        for name in self._real:
            setattr(self.cache, name, getattr(self, name))

    def usable(self, user: str, keys: tuple) -> int:
        stored, has_last = self.sessions.get(user, ((), False))
        if stored == keys and has_last:
            return len(keys)
        same = next((i for i, (a, b) in enumerate(zip(stored, keys, strict=False)) if a != b), len(stored))
        return min(same, len(keys) - 1)

    def plan(self, users, keys):
        self.before = self.cache.manager.stats()
        plan = self._real["plan"](users, keys)
        self.writing, expected = {}, []
        for user, array in zip(users, keys, strict=True):
            sent = tuple(map(tuple, array.tolist()))
            writes = user is not None and len(sent) > 0 and user not in self.writing
            expected.append(self.usable(user, sent) if writes else 0)
            if writes:
                self.writing[user] = sent
        assert plan.cached_len.tolist() == expected
        self.rows += int(plan.extend_len.sum())
        return plan

    def commit(self, plan):
        self._real["commit"](plan)
        for user, keys in self.writing.items():
            if self.usable(user, keys) < len(keys):
                self.sessions[user] = keys[: self.quota], self.quota is None or len(keys) <= self.quota
        self.forget_evicted(self.cache.manager.stats()["evictions"] - self.before["evictions"])

    def forget_evicted(self, count: int) -> None:
        gone = [user for user in self.sessions if user not in self.cache.manager]
        assert len(gone) == count
        for user in gone:
            del self.sessions[user]

    def release(self, plan):
        """Nothing may be otherwise than before the step that failed."""
        self._real["release"](plan)
        after = self.cache.manager.stats()
        assert {name: after[name] for name in HELD} == {name: self.before[name] for name in HELD}


def breaking(call: Callable, error: type[BaseException], nth: int, after: bool) -> Callable:
    """`call`, whose nth time raises: before it has done its work, or after."""
    left = [nth]

    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0]:
            return call(*args, **kwargs)
        if after:
            call(*args, **kwargs)
        raise error("injected")

    return wrapped


@dataclass(frozen=True)
class Ask:
    """A change of a user's history and a request with what it is then."""

    user: str | None
    edit: str
    at: int
    events: list[tuple[int, int]]  # item, day
    kind: str
    items: list[int]
    k: int
    flag: bool  # exclude_seen, and deny or allow
    timed: bool
    tail: bool


numbers = st.integers(0, CAPACITY - 1)
asks = st.builds(
    Ask,
    user=st.sampled_from([*USERS, *USERS, None]),
    edit=st.sampled_from(["append", "append", "append", "same", "same", "correct", "delete", "truncate", "new"]),
    at=st.integers(0, 30),
    events=st.lists(st.tuples(numbers, st.integers(-1, 5)), min_size=1, max_size=4),
    kind=st.sampled_from(["search", "filtered", "rank", "rank", "retrieve", "title"]),
    items=st.lists(numbers, min_size=1, max_size=10, unique=True),
    k=st.sampled_from([1, 3, 10, CAPACITY]),
    flag=st.booleans(),
    timed=st.booleans(),
    tail=st.booleans(),
)
batches = st.lists(asks, min_size=1, max_size=5)
ways = st.sampled_from(["one by one", "packed", "packed", "submitted"])
faults = st.sampled_from(["keys", "batch", "prepare", "forward", "store", "store", "store", "score", "keep"])
errors = st.sampled_from([RuntimeError, MemoryError, KeyboardInterrupt])


class EngineMachine(RuleBasedStateMachine):
    def __init__(self, dtype: str, folder) -> None:
        super().__init__()
        self.dtype, self.folder = dtype, folder

    @initialize(
        block_size=st.sampled_from([2, 4, 16]),
        budget=st.sampled_from([3, 6, 9, 1000]),
        host=st.sampled_from([0, 6, 1000, 1000]),
        quota=st.sampled_from([None, None, None, 1, 2]),
        max_sessions=st.sampled_from([2, 1000, 1000]),
        max_batch=st.sampled_from([(1, 1), (2, 20), (4, 4096)]),
    )
    def make(self, block_size, budget, host, quota, max_sessions, max_batch) -> None:
        block = block_bytes(self.dtype, block_size)
        config = EngineConfig(
            dtype=self.dtype,
            kv_budget=str(budget * block),
            host_budget=str(host * block),
            user_quota=None if quota is None else str(quota * block),
            block_size=block_size,
            max_sessions=max_sessions,
            max_batch_users=max_batch[0],
            max_batch_rows=max_batch[1],
            catalogue_capacity=CAPACITY,
            debug=True,
        )
        self.config = config
        self.warm = Engine(titled().parts(), config)
        self.cold = Engine(titled().parts(), EngineConfig(dtype=self.dtype, kv_budget="0", catalogue_capacity=CAPACITY))
        if budget < -(-WINDOW // block_size):
            quota = min(quota or budget, budget)  # a budget of less than a window is a quota
        self.quota = None if quota is None else quota * block_size
        self.budgets = budget * block, host * block
        self.watch = Watch(self.warm, self.quota)
        self.last: dict[str, Request] = {}
        self.ids = list(titled().item_ids)  # of all rows, removed ones too
        self.histories: dict[str, list[Event]] = {
            user: [(self.ids[7 * at + length], 60.0) for at in range(length)] for length, user in enumerate(USERS)
        }
        for user, history in self.histories.items():
            self.warm.warm(user, [item_id for item_id, _ in history])

    def teardown(self) -> None:
        if hasattr(self, "warm"):
            self.warm.close()

    def item(self, number: int) -> str:
        return self.ids[number % len(self.ids)]

    def named(self, numbers) -> list[str]:
        return list(dict.fromkeys(map(self.item, numbers)))

    def edited(self, ask: Ask) -> list[Event]:
        events = [(self.item(item), day * DAY + 60.0) for item, day in ask.events]
        if ask.user is None:
            return events
        history = self.histories[ask.user]
        at = ask.at % (len(history) + 1)
        if ask.edit == "append":
            history += events
        elif ask.edit == "correct":
            history[at : at + 1] = events[:1]
        elif ask.edit == "delete":
            del history[at : at + 2]
        elif ask.edit == "truncate":
            del history[at:]
        elif ask.edit == "new":
            history[:] = events
        return history

    def request(self, ask: Ask) -> Request:
        history = self.edited(ask)
        ids, times = [item_id for item_id, _ in history], [time for _, time in history]
        start = self.cold._now().layout.start(len(ids)) if ask.tail else 0
        options: dict = {"exclude_seen": ask.flag, "user_id": ask.user, "history_offset": start}
        if ask.timed:
            options["times"] = times[start:]
        if ask.kind == "filtered":
            options["deny" if ask.flag else "allow"] = self.named(ask.items)
        elif ask.kind != "search":
            options |= {"candidates": self.named(ask.items), "head": ask.kind}
        return Request(ids[start:], ask.k, **options)

    def expected(self, request: Request):
        return self.cold.recommend_many([replace(request, user_id=None)])[0]

    def requests(self, batch: list[Ask]) -> list[Request]:
        return [self.request(ask) for ask in batch]

    def check(self, requests, answers, rows: int, history_rows: int) -> None:
        """The answers are the cold engine's; no row was computed that needn't be."""
        for request, answer in zip(requests, answers, strict=True):
            assert answer == self.expected(request)
            if request.user_id is not None:
                self.last[request.user_id] = request
        queries = [self.warm._now().resolve(request) for request in requests]
        more = sum(query.num_rows - len(query.window) for query in queries)
        assert self.warm.stats().rows_computed - rows == self.watch.rows - history_rows + more

    def answers(self, requests, way: str):
        if way == "one by one":
            return [self.warm.recommend_many([request])[0] for request in requests]
        if way == "packed":
            return self.warm.recommend_many(requests)

        async def submitted():
            return await asyncio.gather(*(self.warm.submit(request) for request in requests), return_exceptions=True)

        return asyncio.run(submitted())

    def ask(self, requests, way: str) -> None:
        before = self.warm.stats().rows_computed, self.watch.rows
        self.check(requests, self.answers(requests, way), *before)

    @rule(batch=batches, way=ways)
    def asked(self, batch, way) -> None:
        self.ask(self.requests(batch), way)

    @rule(batch=batches)
    def asked_again(self, batch) -> None:
        requests = self.requests(batch)
        self.ask(requests, "packed")
        self.ask(requests[::-1], "packed")

    @rule(ask=asks, head=st.sampled_from(["rank", "retrieve", "title"]), order=st.permutations(range(10)), few=numbers)
    def company_of_candidates(self, ask, head, order, few) -> None:
        request = replace(self.request(replace(ask, kind=head)), k=CAPACITY)
        whole = dict(self.warm.recommend_many([request])[0])
        names = [request.candidates[i] for i in order if i < len(request.candidates)][: 1 + few % 10]
        part = dict(self.warm.recommend_many([replace(request, candidates=names)])[0])
        assert part == {name: whole[name] for name in names if name in whole}

    @rule(ask=asks)
    def a_tail_is_the_whole(self, ask) -> None:
        tail = self.request(replace(ask, tail=True, kind="rank"))
        whole = self.request(replace(ask, tail=False, kind="rank", edit="same"))
        if ask.user is not None:
            self.ask([tail], "packed")
            assert self.expected(whole) == self.expected(tail)

    @rule(batch=batches)
    def vectors(self, batch) -> None:
        requests = self.requests(batch)
        found = self.warm.user_vectors(requests)
        alone = [self.cold.user_vectors([replace(request, user_id=None)])[0] for request in requests]
        assert np.array_equal(found, np.stack(alone))

    @rule(batch=st.lists(asks, min_size=1, max_size=3))
    def generated(self, batch) -> None:
        requests = self.requests(batch)
        alone = [self.cold.generate([replace(request, user_id=None)], 3)[0] for request in requests]
        assert self.warm.generate(requests, 3) == alone

    @rule(ask=asks, pin=st.booleans())
    def warmed(self, ask, pin) -> None:
        request = self.request(replace(ask, user=ask.user or USERS[0], kind="search"))
        before = self.watch.rows
        options = {"times": request.times, "history_offset": request.history_offset}
        try:
            rows = self.warm.warm(request.user_id, request.history, pin=pin, **options)
            assert rows == self.watch.rows - before
        except CacheExhausted:  # computed, and there is no room for one more that is pinned
            assert pin
        if request.user_id in self.watch.sessions and self.watch.sessions[request.user_id][1] and request.history:
            assert self.warm.warm(request.user_id, request.history, **options) == 0
        self.ask([request], "packed")

    @rule(user=st.sampled_from(USERS), pinned=st.booleans())
    def pinned(self, user, pinned) -> None:
        held = self.warm.pin_session(user, pinned)
        assert not held or user in self.watch.sessions
        assert pinned or held == (user in self.watch.sessions)

    @rule(user=st.sampled_from(USERS))
    def closed(self, user) -> None:
        held = self.warm._histories.get(user)
        there = bool(held and held.ids) or user in self.watch.sessions
        assert self.warm.close_session(user) == there
        self.watch.sessions.pop(user, None)

    @rule(ask=asks, how=st.sampled_from(["append", "replace"]))
    def session_object(self, ask, how) -> None:
        user = ask.user or USERS[0]
        session = self.warm.session(user)
        known = [item_id for item_id in session.history if item_id in self.cold.catalogue._row_of]
        events = [(self.item(item), day * DAY + 60.0) for item, day in ask.events]
        ids, times = [item_id for item_id, _ in events], [time for _, time in events] if ask.timed else None
        if how == "replace" or bool(session.times) != ask.timed or len(known) < len(session.history):
            session.replace(ids, times=times)
        else:
            session.append(*ids, times=times)
        request = Request(session.history, ask.k, user_id=user, times=tuple(session.times) or None)
        before = self.warm.stats().rows_computed, self.watch.rows
        self.check([request], [session.recommend(ask.k)], *before)
        self.histories[user] = list(zip(session.history, session.times or [0.0] * len(session), strict=True))

    @rule(
        numbers=st.lists(st.integers(0, CAPACITY + 2), min_size=1, max_size=2, unique=True),
        token=st.sampled_from([None, 0, 1, 2]),
        title=st.sampled_from([None, "the old man", "two kings"]),
        available=st.sampled_from([None, True, False]),
        prior=st.sampled_from([None, -1.0, 0.5]),
    )
    def upserted(self, numbers, token, title, available, prior) -> None:
        items = []
        for number in numbers:
            rng = np.random.default_rng([number, token or 0])
            vectors = {} if token is None else {"text": rng.normal(size=8), "image": rng.normal(size=5)}
            name = self.ids[number] if number < len(self.ids) else f"new {number}"
            items.append(Item(name, title=title, vectors=vectors, available=available, prior=prior))
        self.both(lambda engine: engine.upsert(items), CatalogueFull, DataError)
        self.ids = list(self.cold.catalogue._ids)

    @rule(numbers=st.lists(numbers, max_size=2))
    def removed(self, numbers) -> None:
        self.both(lambda engine: engine.remove(self.named(numbers)))

    @rule(numbers=st.lists(numbers, max_size=3), available=st.booleans())
    def made_available(self, numbers, available) -> None:
        self.both(lambda engine: engine.set_available(self.named(numbers), available), UnknownItem)

    @rule(numbers=st.lists(numbers, max_size=3), prior=st.sampled_from([-2.0, 0.0, 3.5]))
    def weighted(self, numbers, prior) -> None:
        self.both(lambda engine: engine.set_prior(dict.fromkeys(self.named(numbers), prior)), UnknownItem)

    def both(self, change: Callable[[Engine], object], *refusals: type[Exception]) -> None:
        """The same change of both catalogues, or the same refusal."""
        outcomes = []
        for engine in (self.warm, self.cold):
            try:
                outcomes.append(change(engine))
            except refusals as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        assert self.warm.catalogue.item_ids == self.cold.catalogue.item_ids

    @rule(ask=asks)
    def refused(self, ask) -> None:
        """A request that can't be answered computes nothing and spoils those beside it for now only."""
        request = self.request(ask)
        before = self.warm.stats()
        with pytest.raises(InvalidRequest):
            self.warm.recommend_many([request, Request([*request.history, "nope"], user_id=request.user_id)])
        assert self.warm.stats() == before
        self.ask([request], "packed")

    @rule(batch=batches, where=faults, error=errors, nth=st.integers(1, 4), after=st.booleans(), submit=st.booleans())
    def failed(self, batch, where, error, nth, after, submit) -> None:
        requests = self.requests(batch)
        serving = self.warm._now()
        owner, name = {
            "keys": (serving, "_keys"),
            "batch": (serving_module, "make_batch"),
            "prepare": (serving.cache, "prepare"),
            "forward": (serving.runner, "forward"),
            "store": (serving.cache, "store"),
            "score": (serving.scorer, "score"),
            "keep": (serving.model_step, "read"),
        }[where]
        submit = submit and error is not KeyboardInterrupt  # which comes to the main thread alone
        with mock.patch.object(owner, name, breaking(getattr(owner, name), error, nth, after)):
            if submit and where != "keys":  # they are looked at before a step begins, too
                answers = self.answers(requests, "submitted")
            else:
                try:
                    answers = self.warm.recommend_many(requests)
                except error as failure:
                    answers = [failure] * len(requests)
        for request, answer in zip(requests, answers, strict=True):
            assert type(answer) is error or answer == self.expected(request)
        # who was there still is; who failed is answered as before
        users, keys = list(self.watch.sessions), [stored for stored, _ in self.watch.sessions.values()]
        for user, stored in zip(users, keys, strict=True):
            found = self.watch.cache.cached_len([user], [np.array(stored, np.int32)])
            assert found == [self.watch.usable(user, stored)]
        self.ask([self.last[user] for user in dict.fromkeys(ask.user for ask in batch) if user in self.last], "packed")
        self.ask(requests, "packed")

    @rule(chance=st.integers(0, 2))
    def reloaded(self, chance) -> None:
        if chance:
            return
        for engine in (self.warm, self.cold):
            engine.reload(self.folder)
        self.watch = Watch(self.warm, self.quota)
        self.ids = list(self.cold.catalogue._ids)
        for user, history in self.histories.items():
            self.histories[user] = [event for event in history if event[0] in self.cold.catalogue]
        self.last = {}

    @precondition(lambda self: self.dtype == "float32")
    @rule(ask=asks)
    def equals_transformers(self, ask) -> None:
        history, catalogue = self.edited(ask), self.cold.catalogue
        rows = catalogue.rows([item_id for item_id, _ in history], "history")
        candidates = catalogue.rows(self.named(ask.items[:4]), "candidates")
        size = catalogue.num_rows
        state = replace(
            titled(),
            tokens=catalogue.tokens[:size].clone(),
            prior=catalogue.prior[:size].clone(),
            item_ids=list(catalogue._ids),
            titles=list(catalogue.titles),
        )
        times = [time for _, time in history]
        buckets = titled().model.config.prompt.calendar.buckets(times).tolist()
        retrieve, ranked = reference_scores(state, rows, candidates, buckets)
        by_title = reference_title_scores(state, rows, candidates, buckets=buckets)
        asked = {"times": times, "exclude_seen": False, "user_id": ask.user}
        request = Request(state.ids(rows), CAPACITY, **asked)
        among = [replace(request, candidates=state.ids(candidates), head=head) for head in ("rank", "title")]
        search, rank, title = self.warm.recommend_many([request, *among])
        close(search, dict(zip(state.item_ids, retrieve.tolist(), strict=True)))
        close(rank, dict(zip(state.ids(candidates), ranked.tolist(), strict=True)))
        close(title, dict(zip(state.ids(candidates), by_title.tolist(), strict=True)))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "warm"):
            return
        self.warm.check_integrity()
        stats = self.warm.stats()
        assert stats.session_bytes <= self.budgets[0]
        assert stats.host_bytes <= self.budgets[1]
        assert stats.num_sessions == len(self.watch.sessions) <= self.config.max_sessions
        assert stats.num_waiting == self.watch.cache.manager.stats()["num_open_steps"] == 0


def close(ranking, expected) -> None:
    found = torch.tensor(ranking.scores)
    torch.testing.assert_close(found, torch.tensor([expected[i] for i in ranking.items]), atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engine"
    titled().parts().save(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_happens_every_answer_is_a_cold_engines(dtype, folder) -> None:
    run_state_machine_as_test(
        lambda: EngineMachine(dtype, folder),
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
