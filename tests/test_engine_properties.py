"""One invariant a test, bit for bit on the CPU: order, company, padding, sessions, tiers and failures change nothing.

`test_engine_machine.py` holds them in combination; here a failure has a name and a small example.
"""

from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import make_titled

from speeder_engine import Engine, EngineConfig, Request
from speeder_engine.models.decoder import DecoderLayer
from speeder_engine.native.decoder import NativeDecoder

WINDOW, STEP, NUM_ITEMS = 40, 8, 60
HEADS = ("retrieve", "rank", "title")

KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "torch": {"dtype": "bfloat16", "cpu_path": "torch"},
    "torch fp8": {"dtype": "bfloat16", "cpu_path": "torch", "weights": "fp8", "kv": "fp8"},
    "torch int8": {"dtype": "float32", "cpu_path": "torch", "weights": "int8", "kv": "int8"},
}
by_kind = pytest.mark.parametrize("kind", list(KINDS))
quick = settings(deadline=None, max_examples=15, database=None)
rows = st.integers(0, NUM_ITEMS - 1)
histories = st.lists(rows, max_size=60)
some_rows = st.lists(rows, min_size=1, max_size=20, unique=True)


@cache
def titled():
    return make_titled(NUM_ITEMS, WINDOW, STEP)


@cache
def engine(kind: str) -> Engine:
    """One without a cache: it remembers nothing, so all examples may share it."""
    return made(kind, kv_budget="0")


def made(kind: str, **more: object) -> Engine:
    return Engine(titled().parts(), EngineConfig(**{"block_size": 4, "debug": True} | KINDS[kind] | more))


def ids(numbers) -> list[str]:
    return titled().ids(numbers)


def answer(engine: Engine, history, **options):
    return engine.recommend(ids(history), NUM_ITEMS, **options)


@by_kind
@quick
@given(histories, some_rows, st.randoms(use_true_random=False), st.sampled_from(HEADS))
def test_candidates_in_another_order_and_fewer_score_the_same(kind, history, candidates, random, head):
    whole = answer(engine(kind), history, candidates=ids(candidates), head=head)
    random.shuffle(candidates)
    assert answer(engine(kind), history, candidates=ids(candidates), head=head) == whole
    few = ids(candidates[: random.randint(1, len(candidates))])
    part, scores = dict(answer(engine(kind), history, candidates=few, head=head)), dict(whole)
    assert part == {item_id: scores[item_id] for item_id in few if item_id in scores}
    unanswered = {row for row in candidates if head == "title" and not titled().titles[row]}
    assert set(ids(candidates)) - set(scores) == set(ids(unanswered))


lengths = st.one_of(st.just(0), st.just(1), st.integers(2, 10), st.integers(WINDOW - 2, WINDOW + 20))
uneven = st.lists(st.tuples(lengths, st.sampled_from((None, *HEADS)), some_rows), min_size=2, max_size=9)


@by_kind
@quick
@given(uneven, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_neither_company_nor_padding_matters(kind, batch, seed, random):
    """Nothing beside a whole window, every head beside the others, in any order."""
    requests = []
    for number, (length, head, candidates) in enumerate(batch):
        history = [(seed + number + 7 * i * i) % NUM_ITEMS for i in range(length)]
        options = {} if head is None else {"candidates": ids(candidates), "head": head}
        requests.append(Request(ids(history), NUM_ITEMS, **options))
    alone = [engine(kind).recommend_many([request])[0] for request in requests]
    order = random.sample(range(len(requests)), len(requests))
    assert engine(kind).recommend_many([requests[i] for i in order]) == [alone[i] for i in order]


@by_kind
@quick
@given(st.lists(rows, min_size=1, max_size=WINDOW), st.lists(st.integers(0, WINDOW), max_size=4), some_rows)
def test_a_history_sent_bit_by_bit_is_the_history_sent_at_once(kind, history, cuts, candidates):
    warm, before = made(kind, kv_budget="1MiB"), 0
    for end in [*sorted(cut for cut in cuts if cut < len(history)), len(history)]:
        assert warm.warm("ada", ids(history[:end])) == end - before
        before = end
    for head in HEADS:
        asked = {"candidates": ids(candidates), "head": head}
        first = answer(warm, history, user_id="ada", **asked)
        assert first == answer(warm, history, user_id="ada", **asked) == answer(engine(kind), history, **asked)
    assert answer(warm, history, user_id="ada") == answer(engine(kind), history)
    assert warm.warm("ada", ids(history)) == 0


@by_kind
@quick
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(rows, max_size=9), st.integers(0, 12)), min_size=4, max_size=14))
def test_evicted_and_restored_is_resident(kind, turns):
    """The same answers at the same number of rows, whether sessions stay or come and go."""
    block = engine(kind)._now().cache.size.block_bytes
    resident = made(kind, kv_budget="1MiB")
    moved = made(kind, kv_budget=str(11 * block), host_budget="1MiB")
    now: dict[int, list[int]] = {}
    for user, items, kept in turns:
        now[user] = [*now.get(user, [])[: 3 * kept], *items]
        asked = {"user_id": f"u{user}", "candidates": ids(range(5))}
        assert answer(moved, now[user], **asked) == answer(resident, now[user], **asked)
        moved.check_integrity()
    for user, history in now.items():
        asked = {"candidates": ids(range(5))}
        assert answer(moved, history, user_id=f"u{user}", **asked) == answer(engine(kind), history, **asked)
        assert resident.warm(f"u{user}", ids(history)) == 0
    assert moved.stats().evictions == 0
    assert moved.stats().positions_reused == resident.stats().positions_reused


@by_kind
@quick
@given(
    st.lists(st.lists(rows, min_size=1, max_size=WINDOW), min_size=1, max_size=4),
    st.integers(0, WINDOW),
    st.lists(rows, max_size=10),
    st.sampled_from([MemoryError, KeyboardInterrupt]),
    st.integers(0, 2),
)
def test_a_pass_that_fails_in_any_layer_was_not(kind, known, cut, more, error, nth):
    """Some layers have written their keys already, behind those of the sessions and into copies; native passes all."""
    warm = made(kind, kv_budget="1MiB")
    computes = DecoderLayer if kind.startswith("torch") else NativeDecoder
    users = [f"u{i}" for i in range(len(known))]
    before = [answer(warm, history, user_id=user) for user, history in zip(users, known, strict=True)]
    held = warm._now().cache.manager.stats()
    changed = [Request(ids([*history[:cut], *more]), user_id=user) for user, history in zip(users, known, strict=True)]
    calls = iter(range(nth if computes is DecoderLayer else 0))
    forward = computes.forward

    def failing(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if next(calls, None) is None:
            raise error("injected")
        return out

    with mock.patch.object(computes, "forward", failing):
        try:
            warm.recommend_many(changed)
        except error:
            after = warm._now().cache.manager.stats()
            for name in ("num_free_blocks", "num_sessions", "session_blocks", "num_open_steps"):
                assert after[name] == held[name]
            rows_before = warm.stats().rows_computed
            assert [answer(warm, h, user_id=u) for u, h in zip(users, known, strict=True)] == before
            assert warm.stats().rows_computed == rows_before
    alone = [engine(kind).recommend_many([replace(request, user_id=None)])[0] for request in changed]
    assert warm.recommend_many(changed) == alone
    warm.check_integrity()
