"""Checkpoints survive kill -9 at any moment of a save: the previous one or the new one is there, never neither."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny_training import one_stage

from speeder_engine.checkpoint import Checkpoint, TrainingState
from speeder_engine.training.fit import train

TRIALS = 50
# a parent that has imported everything once; each line it reads starts a child that saves one number after another
WRITER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from speeder_engine.checkpoint import Checkpoint, TrainingState
folder = Path(sys.argv[1])
checkpoint = Checkpoint.load(folder)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        number = int(line)
        while True:
            number += 1
            for parameter in checkpoint.model.parameters():
                parameter.data.fill_(number)
            checkpoint.state = TrainingState(step=number, tensors={"now": torch.full((1000,), float(number))})
            checkpoint.save(folder)
            os.write(1, b"%d\\n" % number)
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"gone\\n")
"""


def kill_one(parent, start, after):
    """Lets a child save from `start` on and kills it `after` seconds; the last number it reported."""
    parent.stdin.write(f"{start}\n")
    parent.stdin.flush()
    last, child = start, 0
    while not child:
        words = parent.stdout.readline().split()
        child = int(words[1]) if words[0] == "child" else 0
        last = last if child else int(words[0])
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    while (line := parent.stdout.readline().strip()) != "gone":
        last = int(line)
    return last


@pytest.mark.slow
def test_fifty_killed_saves_leave_the_previous_checkpoint_or_the_new_one(split, tmp_path):
    target = tmp_path / "c"
    checkpoint = train(split, one_stage(epochs=1), target)
    checkpoint.state = TrainingState()
    checkpoint.save(target)
    random.seed(0)
    saved, torn = 0, 0
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        for _ in range(TRIALS):
            reported = kill_one(parent, saved, random.uniform(0.0, 0.12))
            found = Checkpoint.load(target)
            # a kill may fall between the exchange and the report
            assert found.state.step in (reported, reported + 1)
            values = {float(p.detach().flatten()[0]) for p in found.model.parameters() if p.requires_grad}
            if found.state.step:
                assert values == {float(found.state.step)} == set(found.state.tensors["now"].tolist())
            saved = found.state.step
            strays = [path for path in tmp_path.iterdir() if path.name.startswith(".c.")]
            torn += len(strays)
            assert len(strays) <= 1, strays
        parent.stdin.close()
    assert saved > 0 and torn > 0  # saves were finished, and others interrupted
    checkpoint.save(target)
    assert not list(tmp_path.glob(".c.*"))
