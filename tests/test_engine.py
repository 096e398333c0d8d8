"""The engine against plain transformers, and its invariants: bitwise on the CPU, in fp32 and bf16."""

import asyncio
import copy
import pickle
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import make_tiny, reference_scores

from speeder_engine import ConfigError, Engine, EngineConfig, InvalidRequest, Ranking, Request, UnknownItem, scorer
from speeder_engine.config import FollowersConfig, HeadsConfig
from speeder_engine.models.families import FAMILIES

WINDOW, STEP = 12, 4


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(window=WINDOW, step=STEP)


@pytest.fixture
def engine(tiny):
    return Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))


@pytest.fixture
def cold(tiny):
    return Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="0"))


def history_rows(rng, length):
    return rng.integers(0, 120, length)


@pytest.mark.parametrize("length", [0, 1, 5, 11, 12, 13, 16, 17, 40])
def test_retrieve_equals_transformers(tiny, engine, length):
    rows = history_rows(np.random.default_rng(length), length)
    expected, _ = reference_scores(tiny, rows)
    for user in (None, "a", "a"):  # cold, cold into a session, the same again
        ranking = engine.recommend(tiny.ids(rows), k=120, exclude_seen=False, user_id=user)
        found = torch.tensor([dict(ranking)[item_id] for item_id in tiny.item_ids])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 7, 12, 13, 30])
def test_rank_equals_one_prompt_a_candidate(tiny, engine, length):
    rng = np.random.default_rng(length)
    rows, candidates = history_rows(rng, length), rng.permutation(120)[:20]
    _, expected = reference_scores(tiny, rows, candidates)
    for user in (None, "a", "a"):
        ranking = engine.recommend(tiny.ids(rows), k=20, candidates=tiny.ids(candidates), user_id=user)
        found = torch.tensor([dict(ranking)[item_id] for item_id in tiny.ids(candidates)])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers(family):
    other, rng = make_tiny(window=WINDOW, step=STEP, family=family), np.random.default_rng(0)
    engine = Engine(other.parts(), EngineConfig(dtype="float32", kv_budget="4MiB"))
    cold = Engine(other.parts(), EngineConfig(dtype="float32", kv_budget="0"))
    rows, candidates = history_rows(rng, 15), rng.permutation(120)[:9]
    named = {"k": 9, "candidates": other.ids(candidates)}
    for length in (0, 3, 10, 12, 15, 15):  # appended to one session, slid, the same again
        history = other.ids(rows[:length])
        retrieve, rank = reference_scores(other, rows[:length], candidates)
        found = engine.recommend(history, k=120, exclude_seen=False, user_id="a")
        scores = torch.tensor([dict(found)[item_id] for item_id in other.item_ids])
        torch.testing.assert_close(scores, retrieve, atol=2e-5, rtol=1e-5)
        ranked = engine.recommend(history, user_id="a", **named)
        scores = torch.tensor([dict(ranked)[item_id] for item_id in named["candidates"]])
        torch.testing.assert_close(scores, rank, atol=2e-5, rtol=1e-5)
        assert cold.recommend(history, k=120, exclude_seen=False) == found
        assert cold.recommend(history, **named) == ranked


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "weights": "int8"},
        {"dtype": "float32", "cpu_path": "torch"},
        {"dtype": "bfloat16", "cpu_path": "torch"},
        {"dtype": "bfloat16", "cpu_path": "torch", "weights": "fp8", "kv": "fp8"},
        {"dtype": "float32", "cpu_path": "torch", "weights": "int8", "kv": "int8"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
@pytest.mark.parametrize(("family", "budget"), [("llama", "26KB"), ("qwen3", "26KB"), ("qwen3", "4MiB")])
def test_sessions_answer_bitwise_as_a_cold_engine(family, budget, settings):
    """With and without norms of single heads and followers. Appends, corrections, deletions, repeats, slides and
    evictions, one by one and packed."""
    followers = FollowersConfig(last=4, keep=20) if family == "qwen3" else None
    tiny = make_tiny(window=WINDOW, step=STEP, family=family, followers=followers)
    warm = Engine(tiny.parts(), EngineConfig(kv_budget=budget, max_batch_users=8, **settings))
    cold = Engine(tiny.parts(), EngineConfig(kv_budget="0", **settings))
    rng = np.random.default_rng(0)
    histories = {f"user {u}": [] for u in range(30)}
    asked, answered = [], []
    for _ in range(150):
        user = f"user {rng.integers(30)}"
        change(histories[user], rng)
        options = {"candidates": tiny.ids(rng.permutation(120)[: rng.integers(1, 21)])} if rng.random() < 0.5 else {}
        request = Request(tuple(histories[user]), **options)
        answer = warm.recommend(request.history, user_id=user, **options)
        assert answer == cold.recommend(request.history, **options)
        warm.check_integrity()
        asked.append(request)
        answered.append(answer)
    assert cold.recommend_many(asked) == answered
    if budget == "26KB":
        assert warm.stats().evictions > 0


@pytest.mark.parametrize("cpu_path", ["auto", "torch"])
@pytest.mark.parametrize("gamma", [0.0, 1e-9])
def test_what_hardly_followed_is_answered_alike_in_any_company(monkeypatch, cpu_path, gamma):
    """Its scores are summed once more, in another order than the search's: here by much more than rounding."""
    tiny = make_tiny(followers=FollowersConfig(last=4, keep=20))
    with torch.no_grad():
        tiny.model.followers.weights.fill_(gamma)
    summed = scorer.candidate_scores
    monkeypatch.setattr(scorer, "candidate_scores", lambda *given: summed(*given) - 0.05)
    engine = Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="0", cpu_path=cpu_path))
    for first in range(0, 100, 4):
        request, deep = Request(tiny.ids(range(first, first + 6)), 2), Request(tiny.ids([first]), 120)
        assert engine.recommend_many([request, deep])[0] == engine.recommend_many([request])[0]


def test_a_model_that_makes_nothing_of_followers_is_one_without():
    tiny = make_tiny(followers=FollowersConfig(last=4, keep=20))
    with torch.no_grad():
        tiny.model.followers.weights.fill_(-0.5)  # which counts as none
    parts, bare, settings = tiny.parts(), tiny.parts(), EngineConfig(dtype="float32", kv_budget="0")
    bare.model.followers = None
    without = Engine(bare, settings)
    for head in (None, "rank", "retrieve"):
        request = Request(tiny.ids(range(6)), 120, candidates=None if head is None else tiny.ids(range(40)), head=head)
        assert Engine(parts, settings).recommend_many([request]) == without.recommend_many([request])


def change(history, rng):
    """What happens to a history between two requests."""
    what = rng.random()
    if what < 0.6 or not history:
        history.extend(f"{i:04d}" for i in rng.integers(0, 120, rng.integers(0, 4)))
    elif what < 0.8:
        history[rng.integers(len(history))] = f"{rng.integers(120):04d}"
    else:
        del history[rng.integers(len(history))]


def test_rows_computed_shows_what_a_session_saves(tiny, engine):
    ids = tiny.ids(range(12))
    computed = []
    for history in (ids[:8], ids[:9], ids[:9], [*ids[:4], ids[11]], ids[:3]):
        before = engine.stats().rows_computed
        engine.recommend(history, user_id="a")
        computed.append(engine.stats().rows_computed - before)
    # cold, one appended, the same again, a corrected past, a proper prefix (whose last row is computed again)
    assert computed == [8, 1, 0, 1, 1]
    before = engine.stats().rows_computed
    engine.recommend(ids[:3], user_id="a", candidates=ids[:5])
    assert engine.stats().rows_computed - before == 5


def test_a_full_window_slides_in_steps(tiny, engine, cold):
    ids = tiny.ids(np.random.default_rng(5).integers(0, 120, 40))
    computed = []
    for length in range(1, 41):
        before = engine.stats().rows_computed
        assert engine.recommend(ids[:length], user_id="a") == cold.recommend(ids[:length])
        computed.append(engine.stats().rows_computed - before)
    assert computed[:12] == [1] * 12
    assert computed[12:] == [9, 1, 1, 1] * 7


def test_two_requests_of_one_user_in_one_batch(tiny, engine, cold):
    ids = tiny.ids(range(10))
    requests = [Request(ids[:5], user_id="a"), Request(ids[:7], user_id="a"), Request(ids[3:9], user_id="a")]
    expected = [cold.recommend(request.history) for request in requests]
    assert engine.recommend_many(requests) == expected
    assert engine.recommend_many(requests) == expected
    engine.check_integrity()


def test_a_failed_step_leaves_the_cache_as_it_was(tiny, engine, cold, monkeypatch):
    ids = tiny.ids(range(10))
    engine.recommend(ids[:6], user_id="a")
    blocks_free = engine._now().cache.manager.stats()["num_free_blocks"]
    counted = engine.stats()

    def fail(*_):
        raise RuntimeError("injected")

    monkeypatch.setattr(engine._now().scorer, "score", fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="injected"):
            engine.recommend([*ids[:3], *ids[7:]], user_id="a")
    monkeypatch.undo()
    assert engine.stats() == counted
    engine.check_integrity()
    assert engine._now().cache.manager.stats()["num_free_blocks"] == blocks_free
    before = engine.stats().rows_computed
    assert engine.recommend(ids[:6], user_id="a") == cold.recommend(ids[:6])
    assert engine.stats().rows_computed == before


def test_a_budget_of_nothing_keeps_nothing(tiny, cold):
    ids = tiny.ids(range(6))
    assert cold.recommend(ids, user_id="a") == cold.recommend(ids, user_id="a")
    assert cold.stats().num_sessions == 0
    assert cold.stats().rows_computed == 12


def test_seen_denied_and_unavailable_items_are_not_recommended(tiny, engine):
    ids = tiny.ids(range(6))
    everything = engine.recommend(ids, k=120, exclude_seen=False)
    assert len(everything) == 120
    assert list(everything.scores) == sorted(everything.scores, reverse=True)
    assert set(engine.recommend(ids, k=120).items) == set(tiny.item_ids) - set(ids)
    best = everything.items[0]
    assert best not in engine.recommend(ids, k=120, exclude_seen=False, deny=[best]).items
    allowed = ["0050", "0060", ids[0]]
    assert set(engine.recommend(ids, allow=allowed).items) == {"0050", "0060"}
    engine.catalogue.available[50] = False
    assert engine.recommend(ids, allow=allowed).items == ("0060",)
    assert engine.recommend(ids, candidates=["0050", "0061"]).items == ("0061",)


def test_named_candidates_are_ranked_even_if_seen(tiny, engine):
    ids = tiny.ids(range(6))
    assert set(engine.recommend(ids, candidates=ids).items) == set(ids)
    by_retrieve = engine.recommend(ids, candidates=ids, head="retrieve")
    full = dict(engine.recommend(ids, k=120, exclude_seen=False))
    assert dict(by_retrieve) == pytest.approx({item_id: full[item_id] for item_id in ids}, abs=1e-5)


def test_candidate_order_and_company_do_not_matter(tiny, engine):
    ids, rng = tiny.ids(range(6)), np.random.default_rng(1)
    candidates = tiny.ids(rng.permutation(120)[:17])
    whole = dict(engine.recommend(ids, k=17, candidates=candidates))
    shuffled = engine.recommend(ids, k=17, candidates=candidates[::-1])
    assert dict(shuffled) == whole
    for few in (candidates[:1], candidates[3:8]):
        assert dict(engine.recommend(ids, candidates=few)) == {item_id: whole[item_id] for item_id in few}


@pytest.mark.parametrize("cpu_path", ["auto", "torch"])
def test_who_asks_for_few_neither_pays_nor_answers_for_who_asks_for_many(monkeypatch, cpu_path):
    tiny = make_tiny(400, window=12, step=4)
    engine = Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="4MiB", cpu_path=cpu_path))
    requests = [Request(tiny.ids(range(at, at + 4)), k) for at, k in ((0, 10), (20, 400), (40, 3), (60, 300))]
    alone = [engine.recommend_many([request])[0] for request in requests]
    searched, search = [], scorer.search_catalogue

    def watched(vectors, table, prior, answerable, k, kernels):
        searched.append((list(k), kernels))
        return search(vectors, table, prior, answerable, k, kernels)

    monkeypatch.setattr(scorer, "search_catalogue", watched)
    assert engine.recommend_many(requests) == alone
    # the native search knows each user's own k; others are searched apart from those that no kernel is for
    together = [[10, 400, 3, 300]] if searched[0][1] else [[10, 3], [400, 300]]
    assert [depths for depths, _ in searched] == together


def test_equal_scores_keep_the_catalogues_order():
    alike = make_tiny()
    alike.tokens[:] = alike.tokens[0].clone()
    alike.prior[:] = 0
    engine = Engine(alike.parts(), EngineConfig(dtype="float32"))
    assert list(engine.recommend(["0003"], k=5).items) == ["0000", "0001", "0002", "0004", "0005"]
    assert list(engine.recommend([], candidates=["0009", "0002", "0005"]).items) == ["0002", "0005", "0009"]


def test_what_is_answered_at_the_edges(tiny, engine):
    assert len(engine.recommend([])) == 10
    assert len(engine.recommend(tiny.ids(range(115)), k=50)) == 5
    assert len(engine.recommend(tiny.item_ids, k=5)) == 0
    assert len(engine.recommend(tiny.ids(range(100)))) == 10
    assert engine.recommend(["0001"], k=3, candidates=["0002"]).items == ("0002",)
    assert engine.recommend_many([]) == []
    ranking = engine.recommend(["0001", "nope"], on_unknown="skip")
    assert ranking.unknown == ("nope",)
    assert ranking == Ranking(*zip(*engine.recommend(["0001"]), strict=True), unknown=("nope",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected a whole number of at least 1, got 0"),
        ({"k": 2.5}, "k: expected"),
        ({"k": True}, "k: expected"),
        ({"k": np.arange(200)}, "k: expected a whole number of at least 1, got array"),
        ({"history": np.full((30, 30), "0001")}, "item ids are strings, got array"),
        ({"history": [np.zeros(3)] * 200}, "item ids are strings, got array"),
        ({"exclude_seen": "no"}, "exclude_seen: expected true or false, got 'no'"),
        ({"exclude_seen": np.ones(2)}, "exclude_seen: expected true or false"),
        ({"head": np.array(["rank", "title"])}, "is no head of this engine"),
        ({"on_unknown": np.array(["skip", "error"])}, "choose 'error' or 'skip'"),
        ({"history": "0001"}, "got the string '0001'"),
        ({"history": None}, "history: expected a list"),
        ({"history": [1]}, r"item ids are strings, got 1 \(int\)"),
        ({"candidates": []}, "candidates: the list is empty"),
        ({"candidates": ["0001", "0002", "0001"]}, "'0001' more than once"),
        ({"candidates": "0001"}, "candidates: expected a list"),
        ({"head": "title"}, "head: 'title'"),
        ({"head": "rank"}, "pass candidates"),
        ({"user_id": 7}, "user_id: expected a string"),
        ({"user_id": "\ud800"}, "no valid Unicode"),
        ({"user_id": "x" * 513}, "user_id: 513 characters, at most 512"),
        ({"allow": ["\ud800"]}, r"allow: item id '\\ud800' is no valid Unicode text"),
        ({"history": {"0001", "0002"}}, "a set has no order"),
        ({"history_offset": -1}, "history_offset"),
        ({"on_unknown": "ignore"}, "on_unknown"),
        ({"history_offset": 30}, "send more of the history"),
    ],
)
def test_bad_requests_are_refused_in_one_line(engine, arguments, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        engine.recommend(**{"history": ["0001"], **arguments})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert engine.stats().requests == engine.stats().rows_computed == 0


def test_more_candidates_than_a_request_may_name_are_refused(tiny):
    """They are computed in one step, which everybody else waits for."""
    engine = Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="0", max_candidates=20, max_batch_rows=8))
    many, history = tiny.ids(range(50, 71)), tiny.ids([3])
    for head in (None, "rank", "retrieve"):
        with pytest.raises(InvalidRequest, match=r"candidates: 21 are more than max_candidates=20; name") as caught:
            engine.recommend(history, candidates=many, head=head)
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="max_candidates"):
        asyncio.run(engine.submit(Request(history, candidates=many)))
    assert engine.stats().rows_computed == 0
    assert len(engine.recommend(history, k=20, candidates=many[1:])) == 20  # more than a step's rows, as before
    native = engine._now().runner.native
    assert native is None or native.scratch_bytes == 0  # and gave back what they took
    assert set(engine.recommend(history, k=30, allow=many).items) == set(many)


def test_odd_shapes_answer_as_transformers():
    """A window of one, steps of a whole window, an instruction of one token, one item, no room for another."""
    for shape in ({"window": 1, "step": 1}, {"window": 5, "step": 5, "instruction_len": 1}, {"num_items": 1}):
        other = make_tiny(**shape)
        size = len(other.item_ids)
        warm, cold = (
            Engine(
                other.parts(), EngineConfig(dtype="float32", kv_budget=budget, catalogue_capacity=size, block_size=2)
            )
            for budget in ("8KB", "0")
        )
        rows = np.random.default_rng(0).integers(0, size, 23)
        for length in (*range(8), 8, 22, 23, 3):
            expected, _ = reference_scores(other, rows[:length])
            asked = {"k": size, "exclude_seen": False}
            found = warm.recommend(other.ids(rows[:length]), user_id="a", **asked)
            scores = torch.tensor([dict(found)[item_id] for item_id in other.item_ids])
            torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)
            assert found == cold.recommend(other.ids(rows[:length]), **asked)
            warm.check_integrity()


def test_requests_of_any_size_are_answered(tiny, engine, cold):
    few = Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="9KB", max_batch_rows=4, max_batch_users=2))
    long, everything = tiny.ids(np.arange(20_000) % 97), list(tiny.item_ids)
    requests = [
        Request(long, 10**30, user_id="a"),
        Request((item_id for item_id in long[:30]), candidates=iter(everything), user_id="a"),
        Request(np.array(long[:7]), deny=["0001", "0001"], allow=["0002", "0100", "0100"]),
        Request(["x"] * 5, on_unknown="skip", user_id="b"),
    ]
    for each in (few, engine):
        assert each.recommend_many(requests) == cold.recommend_many(requests)
        each.check_integrity()


@pytest.mark.parametrize("field", ["history", "candidates", "allow", "deny"])
def test_unknown_items_are_all_named(engine, field):
    ids = ["0001", *(f"x{i}" for i in range(7))]
    with pytest.raises(UnknownItem, match=rf"{field}: unknown item 'x0'.*and 2 more") as caught:
        engine.recommend(**{"history": [], field: ids})
    assert caught.value.ids == tuple(ids[1:])


def test_integers_of_any_kind_are_integers(engine):
    assert engine.recommend(["0001"], k=np.int64(3)) == engine.recommend(["0001"], k=3)


def test_wrong_types_are_refused_with_a_word(engine):
    for wrong in (Request(["0001"]), 3, [["0001"]]):
        with pytest.raises(InvalidRequest, match="recommend_many: expected"):
            engine.recommend_many(wrong)
    with pytest.raises(ConfigError, match="expected the path of an engine directory, got None"):
        Engine.load(None)
    for wrong, reason in (("x" * 300, "File name too long"), ("a\0b", "embedded null byte")):
        for ask in (Engine.load, engine.reload, engine.save):
            with pytest.raises(ConfigError, match=f"{reason}; give the path of an engine directory$"):
                ask(wrong)
    assert ["0001"] not in engine.catalogue


def test_one_bad_request_stops_the_batch_before_anything_is_computed(engine):
    with pytest.raises(UnknownItem):
        engine.recommend_many([Request(["0001"], user_id="a"), Request(["nope"])])
    assert engine.stats().rows_computed == engine.stats().num_sessions == 0


def test_a_tail_with_its_offset_answers_as_the_whole_history(tiny, engine, cold):
    ids = tiny.ids(np.random.default_rng(2).integers(0, 120, 30))
    whole = cold.recommend(ids, exclude_seen=False)
    assert engine.recommend(ids[15:], history_offset=15, exclude_seen=False, user_id="a") == whole
    assert engine.recommend(ids, exclude_seen=False, user_id="a") == whole


def test_a_tail_with_ids_that_are_skipped_is_long_enough_if_it_was_with_them(tiny, engine):
    ids = tiny.ids(np.random.default_rng(3).integers(0, 120, WINDOW + 1))
    tail = [*ids[STEP:-1], "gone", ids[-1]][1:]  # WINDOW + 1 - STEP of them, as WINDOW + 1 interactions take
    asked = {"history_offset": STEP, "exclude_seen": False, "on_unknown": "skip"}
    with pytest.raises(InvalidRequest, match="send more of the history"):
        engine.recommend(tail[1:], **asked)
    found = engine.recommend(tail, **asked)
    assert found.unknown == ("gone",)
    known = [item_id for item_id in tail if item_id != "gone"]
    assert (found.items, found.scores) == ((again := engine.recommend(known, exclude_seen=False)).items, again.scores)


def test_vectors_and_similar_items(tiny, engine):
    ids = tiny.ids(range(4))
    full = dict(engine.recommend(ids, k=120, exclude_seen=False))
    beta = float(engine.model.retrieve.beta)
    scores = engine.item_vectors(tiny.item_ids) @ engine.user_vector(ids) + beta * tiny.prior.numpy()
    np.testing.assert_allclose(scores, [full[item_id] for item_id in tiny.item_ids], atol=1e-5)
    tokens = torch.nn.functional.normalize(tiny.tokens, dim=1)
    cosine = tokens @ tokens[7]
    cosine[7] = -2
    assert list(engine.similar_items("0007", 4).items) == tiny.ids(cosine.topk(4).indices)
    with pytest.raises(UnknownItem):
        engine.similar_items("nope")


@pytest.mark.parametrize("cpu_path", ["auto", "torch"])
def test_one_item_has_one_score_whoever_asks(tiny, cpu_path):
    """In bf16 too: a search, named candidates and `scores` sum in fp32, only in different order."""
    engine = Engine(tiny.parts(), EngineConfig(dtype="bfloat16", kv_budget="0", cpu_path=cpu_path))
    rng = np.random.default_rng(0)
    requests = [Request(tiny.ids(rng.integers(0, 120, 6)), 20, exclude_seen=False) for _ in range(20)]
    every, ids = engine.scores(requests, tiny.item_ids), tiny.item_ids
    for request, found, scores in zip(requests, engine.recommend_many(requests), every, strict=True):
        expected = [scores[ids.index(item)] for item in found.items]
        np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-6)
        named = engine.recommend(request.history, 20, candidates=found.items, head="retrieve")
        assert dict(named) == pytest.approx(dict(zip(found.items, expected, strict=True)), rel=1e-5, abs=1e-6)


def test_candidates_are_told_apart_in_bf16(tiny):
    engine = Engine(tiny.parts(), EngineConfig(dtype="bfloat16", kv_budget="0"))
    engine.set_prior(dict.fromkeys(tiny.item_ids, 0.0))
    for start in range(0, 100, 20):
        scores = engine.recommend(tiny.ids(range(6)), 20, candidates=tiny.item_ids[start : start + 20]).scores
        assert len(set(scores)) == 20


def test_scores_do_not_depend_on_who_and_what_else_is_asked_for(tiny, engine):
    requests = [Request(tiny.ids(range(i, i + 4))) for i in range(10)]
    every = engine.scores(requests, tiny.item_ids)
    np.testing.assert_array_equal(every, np.concatenate([engine.scores([each], tiny.item_ids) for each in requests]))
    np.testing.assert_array_equal(every[:, 5:12], engine.scores(requests, tiny.item_ids[5:12]))


def test_engines_are_not_copied(engine):
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"Engine: can.t be pickled or copied; call Engine.load"):
            copying(engine)


def test_the_catalogue_from_outside(tiny, engine):
    assert len(engine.catalogue) == 120
    assert "0001" in engine.catalogue
    assert 1 not in engine.catalogue
    assert engine.catalogue.item_ids == tuple(tiny.item_ids)
    assert engine.catalogue.title("0003") == "Title 0003"


def test_sessions_can_be_closed(tiny, engine):
    engine.recommend(tiny.ids(range(3)), user_id="a")
    assert engine.stats().num_sessions == 1
    assert engine.close_session("a")
    assert not engine.close_session("a")
    assert engine.stats().num_sessions == 0


def test_threads_get_their_own_answers(tiny, engine, cold):
    histories = [tiny.ids(np.random.default_rng(i).integers(0, 120, 8)) for i in range(24)]
    expected = [cold.recommend(history) for history in histories]
    wrong = []

    def ask(first):
        for i in range(first, 24, 3):
            if engine.recommend(histories[i], user_id=str(i % 5)) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    engine.check_integrity()


def test_a_model_without_a_rank_head_ranks_by_retrieve(tiny):
    parts = tiny.parts()
    without = replace(parts.config, heads=HeadsConfig(rank=False))
    engine = Engine(replace(parts, config=without), EngineConfig(dtype="float32"))
    ids, candidates = tiny.ids(range(6)), tiny.ids(range(10, 20))
    assert engine.recommend(ids, candidates=candidates) == engine.recommend(ids, candidates=candidates, head="retrieve")
    with pytest.raises(InvalidRequest, match="trained without a rank head"):
        engine.recommend(ids, candidates=candidates, head="rank")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch_users": 2**31 - 1}, "max_batch_users: keys and values would take"),
        ({"catalogue_capacity": 10**12}, "catalogue_capacity: 1,000,000,000,000 items would take"),
    ],
)
def test_what_no_memory_holds_is_named(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Engine(make_tiny().parts(), EngineConfig(**settings))


def test_room_for_more_sessions_than_blocks_costs_nothing():
    tiny = make_tiny()
    engine = Engine(tiny.parts(), EngineConfig(max_sessions=2**31 - 1, kv_budget="1MiB"))
    engine.recommend(tiny.ids(range(5)), user_id="ada")
    assert engine.stats().num_sessions == 1


def test_candidates_that_are_all_unknown_leave_nothing_to_answer_and_others_alone(engine, tiny):
    nothing = Request(tiny.ids(range(5)), candidates=["nope"], on_unknown="skip")
    other = Request(tiny.ids(range(5)), candidates=tiny.ids(range(5, 8)))
    found = engine.recommend_many([other, nothing, Request(tiny.ids(range(5)), 1)])
    assert found[1] == Ranking((), (), ("nope",))
    assert [len(each) for each in found] == [3, 0, 1]
    for head in ("rank", "retrieve"):
        assert engine.recommend_many([replace(nothing, head=head)]) == [found[1]]


def test_an_unknown_item_is_named_with_the_call_that_asked_for_it(engine):
    with pytest.raises(UnknownItem, match=r"similar_items: unknown item 'nope'"):
        engine.similar_items("nope")
