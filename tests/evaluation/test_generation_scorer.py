"""The title head under the protocols: by likelihood, and by what is written."""

import numpy as np
import pytest
from reference import make_titled, reference_generation, reference_title_scores

from speeder_engine import Engine, EngineConfig
from speeder_engine.data.candidates import CandidateLists
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.generation_scorer import GenerationScorer
from speeder_engine.evaluation.protocols import evaluate

HISTORIES = [[5, 6, 7], [1], [9, 9, 2, 4], [30, 31]]


@pytest.fixture(scope="module")
def titled():
    return make_titled()


@pytest.fixture
def engine(titled):
    return Engine(titled.parts(), EngineConfig(dtype="float32"))


@pytest.fixture
def case(make_queries):
    queries = make_queries(HISTORIES, [20, 21, 22, 23])
    rows = np.array([[20, 40, 41], [42, 21, 43], [22, 44, 45], [46, 47, 23]], np.int32)
    return queries, CandidateLists(rows, np.array([0, 1, 0, 2], np.int32), queries.users, 0)


def test_candidates_by_the_likelihood_of_their_titles(titled, engine, case):
    queries, lists = case
    scorer = EngineScorer(engine, tuple(titled.item_ids), head="title")
    expected = [
        reference_title_scores(titled, history, rows) for history, rows in zip(HISTORIES, lists.rows, strict=True)
    ]
    found = scorer.candidate_scores(queries, lists.rows)
    np.testing.assert_allclose(found, np.stack([each.numpy() for each in expected]), atol=2e-5)
    assert evaluate(scorer, queries, lists, show_progress=False).metrics["valid_ratio"] == 1


def test_an_answer_is_the_candidate_whose_title_was_written(titled, case):
    """The first user's answer becomes the target's title, the second's a negative's, the others' nobody's."""
    queries, lists = case
    written = [reference_generation(titled, history) for history in HISTORIES]
    assert len(set(written)) == 4
    titles = list(titled.titles)
    titled.titles[20], titled.titles[42] = written[:2]
    engine = Engine(titled.parts(), EngineConfig(dtype="float32"))
    titled.titles[:] = titles
    scorer = GenerationScorer(engine, tuple(titled.item_ids))
    scores = scorer.candidate_scores(queries, lists.rows)
    assert np.argwhere(scores == 0).tolist() == [[0, 0], [1, 0]]
    assert np.isneginf(scores).sum() == scores.size - 2
    metrics = evaluate(scorer, queries, lists, show_progress=False).metrics
    assert (metrics["valid_ratio"], metrics["hr@1_valid"], metrics["vhr@1"]) == (0.5, 0.5, 0.25)
    by_retrieve = evaluate(EngineScorer(engine, tuple(titled.item_ids)), queries, None, show_progress=False)
    assert metrics["hr@10"] == by_retrieve.metrics["hr@10"]
