"""Two processes that share layers and batches end as one process does."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_training import log_of, pretrained, together, without_dropout

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.errors import ConfigError
from speeder_engine.training.batches import TrainingBatch, TrainingBatches
from speeder_engine.training.config import Stage
from speeder_engine.training.fit import train
from speeder_engine.training.parallel import ALONE, Processes, join_processes

SCRIPT = Path(__file__).with_name("train_together.py")


def torchrun(*runs):
    """Two processes; a run is (folder, settings, how), see the script."""
    jobs = runs[0][0].with_name("runs.json")
    jobs.write_text(json.dumps([(str(out), config.to_json(), how) for out, config, how in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, jobs]
    done = subprocess.run(
        [str(each) for each in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SPEEDER_PROGRESS": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def sampled():
    """A batch of four segments, so that what one part holds the other often doesn't; five drawn items of 24."""
    stages = (Stage("S2", ("text", "collaborative"), 1, 3e-4),)
    return replace(together(), stages=stages, batch_size=4, sampled_items=5)


def adapters(base):
    config = pretrained("llama", base)
    backbone = replace(config.backbone, lora_dropout=0.0)
    stages = (Stage("S1", ("text",), 2, 3e-4),)
    return replace(without_dropout(replace(config, backbone=backbone)), stages=stages, validation_users=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left: the start of one run, two others whole. In one go, for they import for seconds."""
    place = tmp_path_factory.mktemp("together")
    torchrun(
        (place / "stopped", together(), "stopped"),
        (place / "sampled", sampled(), "whole"),
        (place / "adapters", adapters(place / "base"), "whole"),
    )
    return place


def hold_together(two, one):
    """Weights, tuned vectors and the log of a run of two processes are those of one process."""
    both, alone = Checkpoint.load(two), Checkpoint.load(one)
    found, expected = both.model.state_dict(), alone.model.state_dict()
    assert both.state is None and set(found) == set(expected)
    for name, value in found.items():
        if name == "rank.bias":
            continue  # added to all candidates it changes no loss: its gradient is rounding, which Adam blows up
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    for name, features in both.features.items():
        vectors = (torch.from_numpy(each.values) for each in (features, alone.features[name]))
        torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)
    logs = (log_of(each) for each in (one, two))
    for first, second in zip(*logs, strict=True):  # one process writes
        assert first.get("factors") == second.get("factors")
        if first["stage"] == "calibration":
            continue
        # the optimizer would forgive gradients that are all too large
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3)
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_two_processes_resumed_once_give_the_weights_of_one(split, folder, tmp_path):
    torch.manual_seed(0)
    train(split, together(), tmp_path / "one")
    two = folder / "stopped"
    state = Checkpoint.load(two).state
    assert state.epochs_done == 2 and any(name.startswith("averaged.") for name in state.tensors)
    torchrun((two, together(), "resumed"))
    assert Checkpoint.load(two).metrics["stage"] == "calibration"
    hold_together(two, tmp_path / "one")


def test_two_processes_share_the_drawn_items_of_a_sampled_softmax(split, folder, tmp_path):
    train(split, sampled(), tmp_path / "one")
    hold_together(folder / "sampled", tmp_path / "one")


def test_two_processes_tune_the_adapters_of_one(split, folder, tmp_path):
    alone = train(split, adapters(folder / "base"), tmp_path / "one")
    moved = [value.abs().max() for name, value in alone.model.state_dict().items() if "lora_B" in name]
    assert len(moved) == 14 and min(moved) > 1e-3  # seven matrices in each of two layers
    hold_together(folder / "adapters", tmp_path / "one")


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
