"""Two processes that share layers and batches end as one process does."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_training import together

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.errors import ConfigError
from speeder_engine.training.batches import TrainingBatch, TrainingBatches
from speeder_engine.training.fit import train
from speeder_engine.training.parallel import ALONE, Processes, join_processes

SCRIPT = Path(__file__).with_name("train_together.py")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SPEEDER_PROGRESS": "0"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_resumed_once_give_the_weights_of_one(split, tmp_path):
    torch.manual_seed(0)
    alone = train(split, together(), tmp_path / "one")
    torchrun(tmp_path / "two", "stop")
    assert Checkpoint.load(tmp_path / "two").state.epochs_done == 1
    torchrun(tmp_path / "two", "resume")
    both = Checkpoint.load(tmp_path / "two")
    assert both.state is None and both.metrics["stage"] == "S2"
    expected = alone.model.state_dict()
    found = both.model.state_dict()
    assert set(found) == set(expected)
    for name, value in found.items():
        if name == "rank.bias":
            continue  # added to all candidates it changes no loss: its gradient is rounding, which Adam blows up
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    tuned = torch.from_numpy(both.features["collaborative"].values)
    torch.testing.assert_close(tuned, torch.from_numpy(alone.features["collaborative"].values), atol=1e-5, rtol=0)
    logs = [
        [json.loads(line) for line in (tmp_path / f"{name}.log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(logs[1]) == 3  # one process writes
    for one, two in zip(*logs, strict=True):
        # the optimizer would forgive gradients that are all too large
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_parts_of_a_batch_are_the_whole(split):
    for batch in TrainingBatches(split.train, 24, together()).epoch(0):
        parts = [Processes(rank, 3).part(batch) for rank in range(3)]
        rows = sorted(segment.tolist() for part in parts for segment in part.targets)
        assert rows == sorted(segment.tolist() for segment in batch.targets)
    single = TrainingBatch(*(getattr(batch, field.name)[:1] for field in fields(batch)))
    assert [Processes(rank, 3).has_part(single) for rank in range(3)] == [True, False, False]
    assert len(Processes(2, 3).part(single)) == 1  # something to run
    assert ALONE.part(single).targets.tolist() == single.targets.tolist()


def test_without_torchrun_it_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"--fsdp: start it with `torchrun --nproc-per-node 2 -m speeder_engine.cli"):
        join_processes()
