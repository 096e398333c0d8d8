"""bench/tune.py: what is tried around a launcher's choice, and what becomes of it."""

import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
import tune
from kernel_cases import Case
from measure import CPU

CHOSEN = {"BLOCK_ROWS": 32, "BLOCK_OUT": 32, "BLOCK_SIZE": 128, "SPLITS": 4, "PART": 1280, "num_warps": 4}


class Stub(tune.Subject):
    """Gives what `outcomes` says of an option's value, or raises it."""

    outcomes: ClassVar = {16: RuntimeError("out of resource"), 64: torch.ones(3) * 2}

    def chosen(self):
        return {"KEYS": 32, "num_warps": 4}

    def run(self, options, case):
        found = self.outcomes.get(options["KEYS"], torch.ones(3))
        if isinstance(found, Exception):
            raise found
        return found, torch.arange(3)


def test_one_option_differs_from_the_choice():
    names = ("BLOCK_OUT", "BLOCK_SIZE", "SPLITS", "num_warps", "num_stages")
    found = list(tune.neighbours(CHOSEN, names))
    assert all({**CHOSEN, "num_stages": 3}.keys() >= each.keys() for each in found)
    changes = [{name: each[name] for name in names if each.get(name, 3) != CHOSEN.get(name, 3)} for each in found]
    assert all(len(change) == 1 for change in changes)
    assert [change["BLOCK_SIZE"] for change in changes if "BLOCK_SIZE" in change] == [64, 256]
    assert [change["num_stages"] for change in changes if "num_stages" in change] == [2, 4, 5]
    for each in found:  # however it is cut, all of it is covered
        assert each["SPLITS"] * each["PART"] >= 4 * 1280 and each["PART"] % tune.CUT_AT == 0


def test_parts_are_whole_blocks_however_far_a_climb_has_gone():
    tried, ahead = [], [CHOSEN]
    for _ in range(3):
        ahead = [each for options in ahead for each in tune.neighbours(options, ("BLOCK_SIZE", "SPLITS"))]
        tried += ahead
    assert {256, 512} <= {each["BLOCK_SIZE"] for each in tried} and {8, 16} <= {each["SPLITS"] for each in tried}
    assert all(each["PART"] % each["BLOCK_SIZE"] == 0 and each["SPLITS"] * each["PART"] >= 4 * 1280 for each in tried)


def test_what_is_wrong_or_impossible_is_never_the_best(monkeypatch):
    seconds = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(tune, "clocked", lambda call: next(seconds))
    climb = tune.Climb(Stub("compressed_attention", "x", lambda: Case("x", lambda: None, 1, 1)))
    climb.measure(CPU)
    found = climb.found()
    assert found["wrong"] == [{"KEYS": 64, "num_warps": 4}]
    assert found["impossible"] == {'{"KEYS": 16, "num_warps": 4}': "RuntimeError: out of resource"}
    assert found["best"] == {"num_warps": 8} and (found["chosen_us"], found["best_us"]) == (3e6, 1e6)
    assert {"KEYS": 16, "num_warps": 8} in climb.ahead() and climb.chosen not in climb.ahead()
    climb.best = climb.chosen
    assert climb.ahead() == []
    assert "WRONG x: with {'KEYS': 64, 'num_warps': 4}" in tune.table({"x": found})


def test_a_choice_that_cannot_run_ends_its_climb(monkeypatch):
    monkeypatch.setattr(Stub, "outcomes", {32: RuntimeError("no kernel image")})
    climb = tune.Climb(Stub("compressed_attention", "x", lambda: Case("x", lambda: None, 1, 1)))
    climb.measure(CPU)
    assert climb.found()["chosen_us"] is None and "can't be run" in tune.table({"x": climb.found()})


@pytest.mark.slow
def test_every_launcher_takes_what_is_tried(root, tmp_path):
    command = [sys.executable, root / "bench" / "tune.py", "--cpu-smoke", "--out", tmp_path, "--seconds", "900"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "tune.json").read_text())
    assert report["is_smoke"] and len(report["found"]) == 10
    for row in report["found"].values():
        assert row["tried"] >= 2 and row["wrong"] == [] and row["impossible"] == {}


def test_wrong_usage_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--only", "matmul"])
    assert tune.main() == 1
    monkeypatch.setattr(sys, "argv", ["tune.py", "--out", str(tmp_path / "none")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 1 and not (tmp_path / "none").exists()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("bench/tune.py: matmul: nothing is tried there; of fused_linear; ")
    assert second.startswith("bench/tune.py: no CUDA device is usable here")
