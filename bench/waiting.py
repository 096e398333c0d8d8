"""How contenders' threads wait for one another: asleep, or spinning first, as libraries let them by themselves."""

import os
import sys

SLEEP, SPIN = "sleep", "spin"
SPINS = "GOMP_SPINCOUNT"  # how long torch's and faiss's threads spin, whatever OMP_WAIT_POLICY says
LIBRARY = "300000"  # libgomp's own, where nothing is said
SETTLE = 0.1  # seconds; after their work ONNX Runtime's threads spin for some 45 ms, libgomp's for 10


def spinning() -> bool:
    return os.environ.get(SPINS, "0") != "0"


def wait_by(waiting: str) -> None:
    """Starts this program again where threads were to spin: OpenMP reads its environment once, with torch's import."""
    if waiting == SPIN and not spinning():
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {SPINS: LIBRARY})
