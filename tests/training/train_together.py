"""One of torchrun's processes in test_parallel.py: trains into argv[1] as the JSON file argv[2] says.

`stop` ends it at the first checkpoint.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from counting import make_dataset

from speeder_engine.data.splits import leave_one_out
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.parallel import Processes, join_processes

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def stopping(self, wait=Processes.wait):
    """The second time all meet the first checkpoint has been written."""
    wait(self)
    waited.append(self)
    if len(waited) == 2:
        torch.distributed.destroy_process_group()
        sys.exit(0)


waited = []
if "stop" in sys.argv:
    Processes.wait = stopping
train(
    leave_one_out(make_dataset()),
    TrainingConfig.from_json(json.loads(Path(sys.argv[2]).read_text())),
    Path(sys.argv[1]),
    resume="resume" in sys.argv,
    processes=join_processes(),
)
torch.distributed.destroy_process_group()
