"""The graphs before they are traced: what they compute, for every family, against the engine."""

import numpy as np
import pytest
import torch
from reference import make_tiny

from speeder_engine import ConfigError, Engine, EngineConfig
from speeder_engine.export import OnnxConfig
from speeder_engine.export.graph_engine import pad
from speeder_engine.export.graph_spec import graph_specs
from speeder_engine.export.static_graph import ExtendGraph, RecommendGraph, ScoreGraph, StaticModel
from speeder_engine.models.families import FAMILIES
from speeder_engine.random_engine import random_parts

WINDOW = 12


def defaults(parts):
    return parts.catalogue.available.clone(), parts.catalogue.prior.clone()


def batch(rng, lengths):
    return [rng.integers(0, 120, length) for length in lengths]


def as_inputs(windows):
    return torch.from_numpy(pad(windows, 0)), torch.tensor([len(rows) for rows in windows])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    tiny = make_tiny(family=request.param, num_layers=2)
    engine = Engine(tiny.parts(), EngineConfig(dtype="float32", kv_budget="0"))
    return tiny, engine


@pytest.mark.parametrize("opset", [18, 20])
def test_candidates_score_as_in_the_engine(family, opset):
    tiny, engine = family
    rng = np.random.default_rng(0)
    windows = batch(rng, (7, 0, 12, 1))
    candidates = np.stack([rng.permutation(120)[:9] for _ in windows])
    graph = ScoreGraph(StaticModel(tiny.parts(), OnnxConfig(opset=opset)))
    ranked, retrieved = graph(*as_inputs(windows), torch.from_numpy(candidates), *defaults(tiny.parts()))
    for b, rows in enumerate(windows):
        for head, scores in (("rank", ranked), ("retrieve", retrieved)):
            named = {"candidates": tiny.ids(candidates[b]), "head": head}
            expected = dict(engine.recommend(tiny.ids(rows), 9, **named))
            found = dict(zip(named["candidates"], scores[b].tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-5)


def test_the_attention_operator_computes_the_same(family):
    """Opset 23 has one; here in half precision, where it is used."""
    tiny, engine = family
    rng = np.random.default_rng(1)
    windows = batch(rng, (12, 3, 0))
    model = StaticModel(tiny.parts(), OnnxConfig(dtype="float16"))
    none, k = torch.full((3, 1), -1), torch.tensor([10])
    rows, scores, _ = RecommendGraph(model)(
        *as_inputs(windows), none, k, *defaults(tiny.parts()), exclude_seen=torch.tensor(True)
    )
    for b, window in enumerate(windows):
        expected = engine.recommend(tiny.ids(window), 10)
        np.testing.assert_allclose(scores[b], expected.scores, atol=5e-3)
        assert not set(rows[b].tolist()) & set(window.tolist())


def test_a_past_in_parts_is_one_history(family):
    """Sequences of one batch with pasts and news of different lengths, and with none."""
    tiny, engine = family
    graph, rng = ExtendGraph(StaticModel(tiny.parts(), OnnxConfig())), np.random.default_rng(2)
    windows = batch(rng, (9, 4, 0, 12))
    cuts = ((2, 5, 9), (0, 1, 4), (0, 0, 0), (10, 11, 12))
    past, known = [torch.zeros(4, 2, 0, 8)] * 4, torch.zeros(4, dtype=torch.int64)
    candidates, none = torch.arange(8).repeat(4, 1), torch.full((4, 1), -1)
    for step in range(3):
        new = [rows[int(n) : cut[step]] for rows, n, cut in zip(windows, known, cuts, strict=True)]
        inputs = *as_inputs(new), known, candidates, none, torch.tensor([7])
        scores, _, top_rows, top_scores, _, past = graph(*inputs, *defaults(tiny.parts()), past=past)
        known = torch.tensor([cut[step] for cut in cuts])
    for b, rows in enumerate(windows):
        expected = engine.recommend(tiny.ids(rows), 7, exclude_seen=False)
        assert tiny.ids(top_rows[b]) == list(expected.items)
        np.testing.assert_allclose(top_scores[b], expected.scores, atol=1e-5)
        ranked = dict(engine.recommend(tiny.ids(rows), 8, candidates=tiny.ids(range(8))))
        assert dict(zip(tiny.ids(range(8)), scores[b].tolist(), strict=True)) == pytest.approx(ranked, abs=1e-5)


def test_padding_and_company_change_nothing(family):
    tiny, _ = family
    graph = ScoreGraph(StaticModel(tiny.parts(), OnnxConfig()))
    row, long = torch.tensor([[3, 4, 5]]), torch.full((1, 40), 9)
    alone, _ = graph(row, torch.tensor([3]), torch.tensor([[7, 8]]), *defaults(tiny.parts()))
    long[0, :3] = row
    wide = torch.cat([long, torch.arange(40)[None]])
    candidates = torch.tensor([[7, -1, 8], [1, 2, 3]])
    packed, by_retrieve = graph(wide, torch.tensor([3, 12]), candidates, *defaults(tiny.parts()))
    torch.testing.assert_close(packed[0, [0, 2]], alone[0], atol=1e-6, rtol=1e-6)
    assert packed[0, 1] == by_retrieve[0, 1] == float("-inf")


def test_equal_scores_keep_the_catalogues_order_and_closed_items_come_last():
    alike = make_tiny(num_layers=1)
    alike.tokens[:] = alike.tokens[0].clone()
    alike.prior[:] = 0
    available, prior = defaults(alike.parts())
    available[2] = False
    graph = RecommendGraph(StaticModel(alike.parts(), OnnxConfig()))
    rows, scores, _ = graph(
        torch.tensor([[3, 0]]),
        torch.tensor([1]),
        torch.tensor([[4]]),
        torch.tensor([500]),
        available,
        prior,
        torch.tensor(True),
    )
    assert sorted(rows[0, -3:].tolist()) == [2, 3, 4]
    assert torch.isinf(scores[0, -3:]).all() and len(rows[0]) == 120


def test_a_specification_has_all_that_tracing_needs():
    parts = make_tiny(num_layers=2).parts()
    for flavour in ("standard", "ort"):
        for spec in graph_specs(parts, OnnxConfig(flavour)):
            assert set(spec.dynamic) <= set(spec.inputs) and set(spec.defaults) <= set(spec.inputs)
            assert spec.dynamic_shapes.keys() == spec.arguments.keys()
            sizes = {size for name, dims in spec.dynamic.items() for axis, size in dims.items()}
            assert {"batch"} <= sizes or spec.name == "compress"
    assert [spec.name for spec in graph_specs(parts, OnnxConfig(graphs=("recommend",)))] == ["recommend"]


def test_an_empty_catalogue_is_refused():
    with pytest.raises(ConfigError, match="catalogue: it is empty, and a graph has its items inside; add some first"):
        StaticModel(random_parts("tiny", num_items=0, instruction_len=5), OnnxConfig())
