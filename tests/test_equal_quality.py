"""Time to equal quality on a made catalogue: the text run's likelihoods are transformers', both sides leave a curve."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from equal_quality import TextRun
from transformers import LlamaForCausalLM

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out
from speeder_engine.synthetic import write_synthetic_dataset
from speeder_engine.training.config import BackboneConfig, TrainingConfig

SMALL = BackboneConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=300)
RECIPE = """
instruction: "Next:"
collaborative: {epochs: 1}
backbone: {hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 64, vocab_size: 300}
stages:
  - {name: S1, modalities: [text, collaborative], epochs: 1, learning_rate: 0.003}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_synthetic_dataset(tmp_path_factory.mktemp("made") / "data", num_users=80, num_items=100)


def test_likelihoods_are_those_of_the_whole_causal_model(data):
    run = TextRun(leave_one_out(load_dataset(data)), TrainingConfig(backbone=SMALL))
    run.body.eval()
    lm = LlamaForCausalLM(run.body.config).eval()
    lm.model.load_state_dict(run.body.state_dict())
    lm.tie_weights()
    lm.lm_head.weight = lm.model.embed_tokens.weight
    prompts, answers = next(run.batches())
    with torch.no_grad():
        found = run.log_likelihoods(prompts[:5], answers[:5])
        for b in range(5):
            ids = torch.tensor([[*prompts[b], *answers[b]]])
            labels = ids.clone()
            labels[:, : len(prompts[b])] = -100
            expected = -lm(input_ids=ids, labels=labels).loss * len(answers[b])
            torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-4)


def test_it_learns(data):
    run = TextRun(leave_one_out(load_dataset(data)), TrainingConfig(backbone=SMALL))
    prompts, answers = next(run.batches())
    with torch.no_grad():
        before = float(run.log_likelihoods(prompts, answers).mean())
    run.train_for(2)
    with torch.no_grad():
        run.body.eval()
        assert float(run.log_likelihoods(prompts, answers).mean()) > before + 1
    assert run.targets >= 32


@pytest.mark.slow
def test_both_sides_leave_a_curve(data, root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, str(root / "bench" / "equal_quality.py"), str(data), "--minutes", "0.05", "--steps", "2"]
    command += ["--users", "20", "--recipe", str(tmp_path / "tiny.yaml"), "--epochs", "1", "--out"]
    subprocess.run([*command, str(tmp_path / "out.json")], capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["speeder"]) == 2 and len(found["titles in the prompt"]) == 2
    seconds = [point["seconds"] for point in found["titles in the prompt"]]
    assert np.all(np.diff(seconds) > 0) and all(0 <= p["vhr@1"] <= 1 and p["targets"] > 0 for p in found["speeder"])
