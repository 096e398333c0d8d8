"""What the benchmark's and the study's scripts share."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from commands import end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 300).result()
"""


def test_workers_end_with_a_parent_that_is_killed(root, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(root / "bench")}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    try:
        worker = Path("/proc", parent.stdout.readline().strip())
        assert worker.exists()
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while worker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not worker.exists()
    finally:
        parent.kill()
        parent.wait()
