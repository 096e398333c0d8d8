"""The small benchmarks as they are called: what each trick is worth, what int8 costs, limits on paper."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from energy import metered
from int8_accuracy import agreement
from on_paper import Body, Chip, row_of, ways
from tricks import TRICKS
from workload import Workload

from speeder_engine.random_engine import SHAPES
from speeder_engine.synthetic import write_synthetic_dataset


def last_line(root, script, *options):
    command = [sys.executable, str(root / "bench" / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_trick_is_switched_off_once(root):
    found = last_line(root, "tricks.py", "--shape", "tiny", "--rounds", 2)
    assert found.pop("shape") == "tiny"
    assert found.keys() == {f"without_{make.__name__}" for make in TRICKS}
    assert all(value > 0 for value in found.values())
    assert found["without_one_pass"] > 3  # twenty passes for one


def test_agreement_counts_what_is_missing_and_forgives_ties():
    exact = np.linspace(1, 0, 200, dtype=np.float32)
    assert agreement(exact, exact) == (1.0, 1.0)
    swapped = exact.copy()
    swapped[[9, 10]] = exact[[10, 9]]  # the tenth and the eleventh, which all but tie
    raw, tied = agreement(exact, swapped)
    assert raw == pytest.approx(0.9) and tied == 1.0
    lost = exact.copy()
    lost[0] = -1  # the best of all is gone; what moves one score by that much is no rounding of the others
    raw, tied = agreement(exact, lost)
    assert raw == pytest.approx(0.9)
    assert agreement(exact, exact[::-1].copy())[0] == 0.0


def test_the_power_asked_for_is_that_of_the_gpu_at_work(tmp_path, monkeypatch):
    """The first that CUDA sees needs not be the first there is."""
    uuid, asked, tool = "4a1c0e7e-0b0e-4c1c-9d3b-6f0c9f0a1b2c", tmp_path / "asked", tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\necho 100.0\necho 300.0\necho "[N/A]"\necho "$@" > {asked}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    outside = time.perf_counter()
    with metered(torch.device("cuda")) as found:
        inside = time.perf_counter()
        while not asked.exists() and time.perf_counter() - inside < 20:
            time.sleep(0.01)
        least = 200 * (time.perf_counter() - inside)
    assert f"--id=GPU-{uuid}" in asked.read_text().split()
    assert least <= found.joules <= 200 * (time.perf_counter() - outside)
    with metered(torch.device("cpu")) as found:
        pass
    assert found.joules is None


def test_limits_on_paper_are_those_of_the_chip():
    """Of the 0.5B body on an H200, by hand: 358 M weights in two bytes at 4.3 TB/s; 80 rows at 790 TFLOP/s."""
    chip = Chip(4.3e12, 790e12, 139 * 2**30, 4.0)
    body = Body(SHAPES["0.5b"])
    assert body.parameters == 24 * (896 * 64 * (2 * 14 + 2 * 2) + 3 * 896 * 4864)
    by_name = {way.name: row_of(body, way, chip) for way in ways(Workload())}
    whole = by_name["one pass, nothing shared"]
    assert whole["ms"] == pytest.approx(body.parameters * 2 / 4.3e12 * 1e3)
    assert whole["users_s"] == pytest.approx(13_700, rel=0.01)  # as published for these ceilings
    session = by_name["+ session (a user who returns)"]
    assert session["users_s"] > 2 * by_name["+ shared instruction (a new user)"]["users_s"]
    assert session["per_million"] == pytest.approx(4.0 / 3600 * 1e6 / session["users_s"])


def test_packing_leaves_less_padding(root, tmp_path):
    data = write_synthetic_dataset(tmp_path / "data", num_users=300, num_items=100)
    shape = ("--hidden-size", 16, "--layers", 1, "--batch-size", 64, "--batches", 3)
    found = last_line(root, "packing.py", data, *shape)
    assert 0 <= found["padding"]["packed"] < found["padding"]["padded"]
    each = found["us_per_real_row"]
    assert found["padded_vs_packed"] == pytest.approx(each["padded"] / each["packed"], rel=0.01)
