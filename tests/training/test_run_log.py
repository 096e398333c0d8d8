"""The log says how an epoch went; TensorBoard gets the same numbers."""

import sys
from types import SimpleNamespace

import pytest
from tiny_training import log_of, one_stage

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.errors import MissingDependency
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.fit import train
from speeder_engine.training.run_log import RunLog

SHORT = one_stage()


class Board:
    """The face of torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, folder, purge_step=None):
        self.purge_step, self.scalars, self.is_open = purge_step, [], True
        boards.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.is_open = False


boards: list[Board] = []


@pytest.fixture(autouse=True)
def tensorboard(monkeypatch):
    boards.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))


def test_an_epochs_record_says_how_it_went(split, tmp_path):
    train(split, SHORT, tmp_path / "c", tensorboard=tmp_path / "board")
    first, second = log_of(tmp_path / "c")
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


def test_an_epoch_that_is_trained_again_stands_in_the_log_once(split, tmp_path, monkeypatch):
    """Of a run that is stopped between the second epoch's record and its checkpoint."""
    out, board, save = tmp_path / "c", tmp_path / "board", Checkpoint.save

    def stop(self, folder):
        if len(log_of(out)) == 2:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "save", stop)
        train(split, SHORT, out, tensorboard=board)
    stopped = log_of(out)
    train(split, SHORT, out, resume=True, tensorboard=board)
    assert [(r["epoch"], r["loss"]) for r in log_of(out)] == [(r["epoch"], r["loss"]) for r in stopped]
    assert boards[-1].purge_step == 2 and {step for _, _, step in boards[-1].scalars} == {2}
    assert len(boards) == 3 and not any(board.is_open for board in boards)


def test_a_log_stands_until_another_run_has_a_line(tmp_path):
    path = tmp_path / "c.log.jsonl"
    RunLog(path).write({"epoch": 1, "run": "old"}, 1)
    log = RunLog(path)
    log.begin_anew()
    assert log_of(tmp_path / "c") == [{"epoch": 1, "run": "old"}]
    for epoch in (1, 2):
        log.write({"epoch": epoch}, epoch)
    assert log_of(tmp_path / "c") == [{"epoch": 1}, {"epoch": 2}]


def test_the_record_of_an_untrained_model_is_no_epochs(tmp_path):
    log = RunLog(tmp_path / "c.log.jsonl")
    for epoch in range(4):
        log.write({"epoch": epoch}, epoch)
    log.rewind(1)
    assert [record["epoch"] for record in log_of(tmp_path / "c")] == [0, 1]


def test_tensorboard_that_is_not_there_is_named_before_anything_is_done(split, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"--tensorboard needs the package tensorboard: pip install"):
        train(split, SHORT, tmp_path / "c", tensorboard=tmp_path / "board")
    assert not list(tmp_path.iterdir())
