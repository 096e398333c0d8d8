"""For tests that interrupt a process they start."""

import signal


def take_interrupts() -> None:
    """`preexec_fn` of a process: tests that run in the background ignore interrupts, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
