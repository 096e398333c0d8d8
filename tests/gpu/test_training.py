"""Training on a GPU: it learns, resumes in the middle of a stage, and what it made is served.

Skipped where there is no CUDA device, or not what training needs.
"""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from counting import make_dataset
from tiny_training import CONFIG, one_stage, resumed_after

from speeder_engine import Engine, Request
from speeder_engine.data.splits import leave_one_out
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.training.fit import train

MISSING = [name for name in ("peft", "sklearn", "yaml") if find_spec(name) is None]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: the extra train"),
]


@pytest.fixture(scope="module")
def split():
    return leave_one_out(make_dataset())


def hit_rate(checkpoint, split):
    assert checkpoint.model.prompts.weight.is_cuda
    scorer = ModelScorer(checkpoint.model, checkpoint.item_tokens(), query_prior(checkpoint, split, "test"))
    return evaluate(scorer, split.queries("test"), None, ks=(1, 10), show_progress=False).metrics["hr@1"]


def test_it_learns_the_rule_and_is_served(split, tmp_path):
    checkpoint = train(split, CONFIG, tmp_path / "checkpoint")
    assert hit_rate(checkpoint, split) > 0.8  # by chance 1 in 24
    export_engine(tmp_path / "checkpoint", tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", device="cuda", dtype="float32", kv_budget="16MiB", freeze_gc=False)
    queries, ids = split.queries("test"), split.dataset.item_ids
    histories = [[ids[row] for row in queries.history(q)] for q in range(len(queries))]
    asked = [Request(history, 1, exclude_seen=False) for history in histories]
    answers = [answer.items[0] for answer in engine.recommend_many(asked)]
    assert np.mean([item == ids[row] for item, row in zip(answers, queries.targets, strict=True)]) > 0.7
    engine.close()


def test_an_averaged_run_resumes_in_the_middle_of_a_stage(split, tmp_path):
    config = replace(one_stage(3), averaging=0.9)
    resumed = resumed_after(1, split, config, tmp_path / "checkpoint")
    assert hit_rate(resumed, split) > 0.3
