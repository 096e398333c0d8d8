"""Energy of a stretch of work, from the power that nvidia-smi says a GPU draws."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

EVERY_MS = 100


@dataclass
class Energy:
    """joules: None where nothing says what is drawn."""

    joules: float | None = None


@contextmanager
def metered(device: torch.device) -> Iterator[Energy]:
    """Fills in the energy when its body ends."""
    found, tool = Energy(), shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        yield found
        return
    command = [tool, "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"-lms={EVERY_MS}"]
    # by what it is: nvidia-smi counts all GPUs, CUDA those that CUDA_VISIBLE_DEVICES leaves
    command.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    started = time.perf_counter()
    try:
        yield found
    finally:
        seconds = time.perf_counter() - started
        process.terminate()
        watts = [float(line) for line in process.communicate()[0].splitlines() if line.strip()[:1].isdigit()]
        if watts:
            found.joules = statistics.mean(watts) * seconds
