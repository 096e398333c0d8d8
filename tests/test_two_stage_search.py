"""The catalogue searched in two stages: the exact answers, whether the first stage was certain or not."""

import numpy as np
import pytest
import torch
from reference import make_tiny

from speeder_engine import ConfigError, Engine, EngineConfig, Item, Request
from speeder_engine.catalogue import ItemUpdate
from speeder_engine.config import FollowersConfig
from speeder_engine.triton_kernels.top_scores_two_stage import CoarseTable

NUM_ITEMS = 900


@pytest.fixture(scope="module", params=[None, FollowersConfig(last=4, keep=20)], ids=["plain", "followers"])
def tiny(request):
    return make_tiny(NUM_ITEMS, window=12, step=4, followers=request.param)


def made(tiny, **settings):
    given = {"dtype": "float32", "cpu_path": "torch", "kv_budget": "4MiB", "search": "two_stage", "debug": True}
    return Engine(tiny.parts(), EngineConfig(**given | settings))


def requests(tiny, rng, count, k=10):
    asked = []
    for _ in range(count):
        options = {}
        if rng.random() < 0.3:
            options["deny"] = tiny.ids(rng.permutation(NUM_ITEMS)[:50])
        if rng.random() < 0.3:
            options["allow"] = tiny.ids(rng.permutation(NUM_ITEMS)[: rng.integers(3, 300)])
        if rng.random() < 0.3:
            options = {"candidates": tiny.ids(rng.permutation(NUM_ITEMS)[:8])}
        asked.append(Request(tiny.ids(rng.integers(0, NUM_ITEMS, rng.integers(0, 15))), k, **options))
    return asked


def assert_alike(found, expected):
    assert [ranking.items for ranking in found] == [ranking.items for ranking in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("error", [None, 1e6])
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_answers_are_those_of_the_exact_search(tiny, graphs, error):
    """And so they are where the certificate never holds: then every search is repeated."""
    ours, theirs = made(tiny, graphs=graphs, max_batch_users=8), made(tiny, search="exact")
    ours.warm_up()
    assert ours.stats().searched_again == 0
    if error is not None:
        ours.catalogue.coarse.worst_error.fill_(error)
    rng, searched = np.random.default_rng(0), 0
    for _ in range(15):
        asked = requests(tiny, rng, rng.integers(1, 8))
        assert_alike(ours.recommend_many(asked), theirs.recommend_many(asked))
        # where an allowed list is shorter than the first stage, all of it was seen
        searched += sum(each.candidates is None and (each.allow is None or len(each.allow) > 270) for each in asked)
    again = ours.stats().searched_again
    assert again >= searched * 0.9 if error is not None else again < searched / 2
    assert theirs.stats().searched_again == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobodys_answer_depends_on_how_many_another_asks_for(tiny, dtype):
    engine, exact = made(tiny, dtype=dtype, kv_budget="0"), made(tiny, dtype=dtype, kv_budget="0", search="exact")
    rng = np.random.default_rng(3)
    for _ in range(20):
        request = Request(tiny.ids(rng.integers(0, NUM_ITEMS, 6)), 10)
        alone = engine.recommend_many([request])
        for k in (1, 60, 100, 400):
            company = Request(tiny.ids(rng.integers(0, NUM_ITEMS, 4)), k)
            assert engine.recommend_many([request, company])[:1] == alone
        assert_alike(alone, exact.recommend_many([request]))
    assert engine.stats().searched_again < 50


def test_deep_answers_alone_are_waited_for_once(tiny, monkeypatch):
    engine, exact = made(tiny), made(tiny, search="exact")
    asked = [Request(tiny.ids(range(at, at + 4)), 100) for at in range(5)]
    fetched, fetch = [], engine._now().transfer.fetch
    monkeypatch.setattr(engine._now().transfer, "fetch", lambda tensors: fetched.append(1) or fetch(tensors))
    assert_alike(engine.recommend_many(asked), exact.recommend_many(asked))
    assert len(fetched) == 1 and engine.stats().searched_again == 0


def test_only_who_is_not_certain_is_searched_again(tiny):
    """Somebody with more equal items before all others than the first stage hands on, beside one who denies them."""
    engine, exact = made(tiny), made(tiny, search="exact")
    vector = [0.4, -0.3, 0.2, 0.1, 0.9, -0.5, 0.3, 0.2]
    for each in (engine, exact):
        each.upsert([Item(f"twin {i}", vectors={"text": vector}) for i in range(400)])
        each.set_prior({f"twin {i}": 9 / float(each.model.retrieve.beta) for i in range(400)})
    twins = [f"twin {i}" for i in range(400)]
    asked = [Request(tiny.ids(range(4)), 5, deny=twins), Request(tiny.ids(range(4)), 5)]
    assert_alike(engine.recommend_many(asked), exact.recommend_many(asked))
    assert engine.stats().searched_again == 1


def test_what_the_first_stage_can_not_tell_apart_is_found_again(tiny):
    """400 items that int8 takes for one: the first 256 go on, the best is the last."""
    engine, exact, history = made(tiny), made(tiny, search="exact"), tiny.ids(range(4))
    vector = torch.tensor(engine.user_vector(history))
    at = int(vector.abs().argmax())
    tokens = (vector / vector.norm()).repeat(400, 1)
    tokens[:, at] = 0
    tokens[:, at] = vector[at].sign() * torch.arange(400) * (tokens.abs().amax() / 127 / 2 / 401)
    ids, nothing = tuple(f"near {i}" for i in range(400)), (None,) * 400
    for each in (engine, exact):
        each.catalogue.put(ItemUpdate(ids, tokens, np.ones(400, bool), nothing, nothing, nothing))
    first = engine.catalogue.coarse.tokens.values[NUM_ITEMS : NUM_ITEMS + 400]
    assert (first == first[0]).all()
    found = engine.recommend(history, 3)
    assert found.items == ("near 399", "near 398", "near 397")
    assert_alike([found], [exact.recommend(history, 3)])
    assert engine.stats().searched_again == 1


def test_upserts_keep_the_copy_true(tiny):
    """Never moved, and its bounds hold for every item there is."""
    engine, exact = made(tiny, graphs="on", row_buckets=(16, 128)), made(tiny, search="exact")
    engine.warm_up()
    coarse, rng = engine.catalogue.coarse, np.random.default_rng(1)
    pointers = [tensor.data_ptr() for tensor in (coarse.tokens.values, coarse.tokens.scales, coarse.worst_error)]
    for turn in range(6):
        items = [Item(f"new {turn}", vectors={"text": rng.normal(size=8).tolist()})]
        items.append(Item(f"{rng.integers(NUM_ITEMS):04d}", vectors={"text": (9 * rng.normal(size=8)).tolist()}))
        for each in (engine, exact):
            each.upsert(items)
            each.remove([f"{turn:04d}"])
        asked = requests(tiny, np.random.default_rng(turn), 5)
        assert_alike(engine.recommend_many(asked), exact.recommend_many(asked))
    tokens, kept = engine.catalogue.tokens, coarse.tokens
    step = tokens.abs().amax(1, keepdim=True) / 127
    assert ((kept.dequantized() - tokens).abs() <= step * 0.5001).all()
    assert (kept.dequantized() - tokens).norm(dim=1).max() <= coarse.worst_error
    assert torch.maximum(kept.dequantized().norm(dim=1), tokens.norm(dim=1)).max() <= coarse.largest_norm
    assert pointers == [tensor.data_ptr() for tensor in (kept.values, kept.scales, coarse.worst_error)]


@pytest.mark.parametrize("settings", [{}, {"search": "exact"}, {"search": "exact", "cpu_path": "auto"}])
def test_a_search_leaves_the_room_for_new_items_out_and_finds_them_all(settings):
    """Items beside the border of what is searched too; nothing changes for those that were there."""
    nearly, vectors = make_tiny(1020, window=12, step=4), np.random.default_rng(3).normal(size=(10, 8)).tolist()
    engine = made(nearly, catalogue_capacity=5000, **settings)
    history = nearly.ids(range(3))
    before = engine.recommend(history, 2000)
    assert engine.catalogue.searched_rows == 1024
    engine.upsert([Item(f"new {i}", vectors={"text": each}) for i, each in enumerate(vectors)])
    after = engine.recommend(history, 2000)
    assert engine.catalogue.searched_rows == 2048
    assert {f"new {i}" for i in range(10)} == set(after.items) - set(before.items)
    old = dict(after)
    assert [(item_id, old[item_id]) for item_id in before.items] == list(before)


def test_a_refused_upsert_leaves_the_copy_alone(tiny):
    engine = made(tiny, catalogue_capacity=NUM_ITEMS)
    coarse = engine.catalogue.coarse
    before = [tensor.clone() for tensor in (coarse.tokens.values, coarse.tokens.scales, coarse.worst_error)]
    with pytest.raises(Exception, match="catalogue_capacity"):
        engine.upsert([Item("0001", vectors={"text": [9.0] * 8}), Item("new", vectors={"text": [1.0] * 8})])
    after = (coarse.tokens.values, coarse.tokens.scales, coarse.worst_error)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_deep_answers_are_searched_exactly_at_once(tiny):
    engine, exact = made(tiny), made(tiny, search="exact")
    asked = [Request(tiny.ids(range(5)), 65), Request(tiny.ids(range(9)), 300)]
    assert_alike(engine.recommend_many(asked), exact.recommend_many(asked))
    assert engine.stats().searched_again == 0


def test_a_table_built_in_parts_is_the_table(monkeypatch):
    from speeder_engine.triton_kernels import top_scores_two_stage as module

    table = torch.randn(100, 16)
    whole = CoarseTable.build(table)
    monkeypatch.setattr(module, "ROUNDED_AT_ONCE", 7)
    parts = CoarseTable.build(table)
    assert torch.equal(whole.tokens.values, parts.tokens.values)
    torch.testing.assert_close(whole.tokens.scales, parts.tokens.scales)
    torch.testing.assert_close(whole.worst_error, parts.worst_error)
    torch.testing.assert_close(whole.largest_norm, parts.largest_norm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "fast"}, "search: 'fast'; choose 'exact' or 'two_stage'"),
        ({"cpu_path": "plain"}, "search: native kernels search exactly; leave it at 'exact', or set cpu_path"),
    ],
)
def test_what_can_not_be_had_is_refused(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        made(tiny, **settings)
