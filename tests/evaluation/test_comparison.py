import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from speeder_engine.cli import app
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.bootstrap import paired_difference
from speeder_engine.evaluation.compare import compare, make_scorer
from speeder_engine.evaluation.comparison import Comparison
from speeder_engine.evaluation.groups import by_length, grouped
from speeder_engine.evaluation.report import CandidateOutcome, Report
from speeder_engine.random_engine import random_parts
from speeder_engine.synthetic import write_synthetic_dataset


@pytest.fixture
def reports():
    rng = np.random.default_rng(0)
    users = np.arange(80, dtype=np.int32)
    outcome = CandidateOutcome(rng.integers(0, 3, 80).astype(np.int32), np.ones(80, bool))
    return [Report(name, False, users, rng.integers(0, 30, 80).astype(np.int32), {}, outcome) for name in "abc"]


def test_json_holds_groups_and_differences(reports, make_queries):
    queries = make_queries([[0] * (user % 9) for user in range(80)], [0] * 80)
    comparison = Comparison.of(reports, [by_length(queries)], "b")
    told = json.loads(json.dumps(comparison.to_json()))
    assert [each["system"] for each in told] == ["a", "b", "c"]
    first = grouped(reports[0], by_length(queries))[0]
    assert told[0]["groups"]["length"][0] == {
        "group": "up to 5",
        "num_users": first.num_users,
        "metrics": first.metrics,
    }
    assert "difference" not in told[1]
    found = told[2]["difference"]
    assert found.pop("against") == "b" and set(found) == {"hr@10", "ndcg@10", "vhr@1"}
    expected = paired_difference(reports[2], reports[1], "ndcg@10")
    assert found["ndcg@10"] == {
        "mean": expected.mean,
        "low": expected.low,
        "high": expected.high,
        "excludes_zero": expected.excludes_zero,
    }
    assert len(list(comparison.tables())) == 3


def test_nothing_asked_is_nothing_added(reports):
    comparison = Comparison.of(reports)
    assert comparison.to_json() == [report.to_json() for report in reports]
    assert len(list(comparison.tables())) == 1


def test_the_command_evaluates_what_others_are_paired_with(tmp_path):
    folder = write_synthetic_dataset(tmp_path / "data", num_users=60, num_items=100)
    asked = ["evaluate", "markov", "--data", str(folder), "--by", "length, popularity", "--against", "popularity"]
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert [each["system"] for each in told] == ["markov", "popularity"]
    assert set(told[0]["groups"]) == {"length", "popularity"} and told[0]["difference"]["against"] == "popularity"
    shown = CliRunner().invoke(app, asked).stdout
    assert "up to 5" in shown and "head" in shown and "difference to popularity" in shown
    full = json.loads(CliRunner().invoke(app, [*asked, "--negatives", "0", "--json"]).stdout)
    assert "vhr@1" not in full[0]["metrics"] and full[0]["metrics"]["hr@10"] == told[0]["metrics"]["hr@10"]
    assert "difference to popularity" in CliRunner().invoke(app, [*asked, "--negatives", "0"]).stdout
    few = compare(["markov"], folder, num_negatives=1).reports[0]
    assert few.metrics["vhr@1"] > told[0]["metrics"]["vhr@1"]
    with pytest.raises(ConfigError, match="negatives: 0 leaves candidate lists out; leave out `candidates` and `head`"):
        compare(["markov"], folder, head="rank", num_negatives=0)
    with pytest.raises(DataError, match=r"leaves \d+ items, 77 negatives are needed; draw fewer \(--negatives"):
        compare(["markov"], folder, num_negatives=77)
    with pytest.raises(DataError, match=r"1000000000000 negatives of 78 items; draw fewer"):
        compare(["markov"], folder, num_negatives=10**12)
    with pytest.raises(ConfigError, match="by: 'age'"):
        compare(["markov"], folder, by=["age"])
    with pytest.raises(ConfigError, match="gossip: neither"):
        compare(["markov"], folder, against="gossip")


def test_an_engine_answers_lists_as_long_as_the_catalogue(make_split, tmp_path):
    """The bound on a request's candidates is there for others who wait, and nobody does."""
    parts = random_parts(num_items=30)
    parts.save(tmp_path / "engine")
    split = make_split([[0, 1, 2, 3]] * 3, [[0, 1, 2, 3]] * 3, 30)
    items = replace(split.dataset.items, item_ids=parts.catalogue.item_ids)
    split = replace(split, dataset=replace(split.dataset, items=items))
    scorer = make_scorer(str(tmp_path / "engine"), split, "test")
    assert scorer.engine.config.max_candidates == 30
    lists = np.tile(np.arange(30, dtype=np.int32), (3, 1))
    assert np.isfinite(scorer.candidate_scores(split.queries("test"), lists)).all()
