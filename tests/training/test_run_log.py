"""The log says how an epoch went; TensorBoard gets the same numbers."""

import json
import sys
from types import SimpleNamespace

import pytest
from tiny_training import one_stage

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.errors import MissingDependency
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.fit import train

SHORT = one_stage()


class Board:
    """The face of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, folder):
        self.folder, self.scalars = folder, []
        boards.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


boards: list[Board] = []


def test_an_epochs_record_says_how_it_went(split, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    train(split, SHORT, tmp_path / "c", tensorboard=tmp_path / "board")
    first, second = (json.loads(line) for line in (tmp_path / "c.log.jsonl").read_text().splitlines())
    batches = TrainingBatches(split.train, 24, SHORT)
    assert (first["step"], second["step"]) == (batches.batches_per_epoch, 2 * batches.batches_per_epoch)
    assert 0 <= second["learning_rate"] < first["learning_rate"] <= 5e-3
    assert 0 < first["gradient_norm"] <= first["largest_gradient_norm"]
    drawn = list(batches.epoch(0))
    beside = len(Checkpoint.load(tmp_path / "c").model.config.prompt.instruction_ids) + SHORT.rank_negatives + 1 + 2
    rows = sum(b.rows.numel() + len(b) * beside for b in drawn)  # beside the history: instruction, candidates, a pair
    padding = sum(b.rows.numel() - int(b.lengths.sum()) for b in drawn)
    assert padding and first["padding"] == pytest.approx(padding / rows, abs=1e-4)
    assert first["targets_per_second"] == pytest.approx(batches.targets_per_epoch / first["seconds"], rel=0.1)
    (board,) = boards
    assert ("loss", first["loss"], 1) in board.scalars and ("ndcg@10", second["ndcg@10"], 2) in board.scalars


def test_tensorboard_that_is_not_there_is_named_before_anything_is_done(split, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"--tensorboard needs the package tensorboard: pip install"):
        train(split, SHORT, tmp_path / "c", tensorboard=tmp_path / "board")
    assert not list(tmp_path.iterdir())
