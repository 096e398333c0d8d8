"""Processes that were forked from one that computed: the threads of torch's parallel loops were not copied, and whoever
waits for them waits for good. What loads, trains or serves asks here first."""

import os

import torch

from speeder_engine.errors import ConfigError

_computed = False  # here, or in the process that this one was forked from
_forked = False  # since then


def _note_fork() -> None:
    global _forked
    _forked = _computed


os.register_at_fork(after_in_child=_note_fork)


def claim_threads(what: str) -> None:
    """Before `what` computes. Raises ConfigError in a process that it would never return in."""
    global _computed
    if _forked and torch.get_num_threads() > 1:
        raise ConfigError(
            f"{what}: this process was forked from one that had loaded a model, and torch's threads are not copied; "
            "start workers by spawn, fork before anything is loaded, trained or evaluated, or set OMP_NUM_THREADS=1"
        )
    _computed = True
