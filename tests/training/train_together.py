"""One of torchrun's processes in test_parallel.py: trains one model after the other, as the JSON file argv[1] says.

A run is its folder, its settings, and how: "stopped" at the second checkpoint, "resumed", or "whole".
"""

import json
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from counting import make_dataset

from speeder_engine.data.splits import leave_one_out
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.parallel import Processes, join_processes

torch.set_num_threads(1)
warnings.simplefilter("ignore")


class Stopped(Exception):
    pass


def stopping(wait, waited):
    """The third time all meet the second checkpoint has been written, in the middle of the second stage."""

    def wait_and_stop(self):
        wait(self)
        waited.append(self)
        if len(waited) == 3:
            raise Stopped

    return wait_and_stop


processes, split = join_processes(), leave_one_out(make_dataset())
for out, settings, how in json.loads(Path(sys.argv[1]).read_text()):
    given = {"resume": how == "resumed", "processes": processes}
    config = TrainingConfig.from_json(settings)
    if how != "stopped":
        train(split, config, Path(out), **given)
        continue
    with patch.object(Processes, "wait", stopping(Processes.wait, [])):
        try:
            train(split, config, Path(out), **given)
        except Stopped:
            continue
        raise AssertionError(f"{out}: was not stopped")
torch.distributed.destroy_process_group()
