"""All contenders by key."""

from collections.abc import Callable

from baselines.base import Baseline, Unavailable
from baselines.exported import OnnxRuntime, OpenVino
from baselines.llamacpp import LlamaCpp
from baselines.one_token import Compiled, SeparatePrompts, StaticPrefix, Uncached
from baselines.text_generation import MultimodalGeneration, TextGeneration
from subject import Subject

BASELINES: dict[str, Callable[[Subject], Baseline]] = {
    each.key: each
    for each in (
        Uncached,
        StaticPrefix,
        Compiled,
        SeparatePrompts,
        TextGeneration,
        MultimodalGeneration,
        OnnxRuntime,
        OpenVino,
        LlamaCpp,
    )
}
# one token an item, the same rows, launched operator by operator: the best of them is what a user would take
EAGER = (Uncached.key, StaticPrefix.key)


def make(key: str, subject: Subject) -> Baseline:
    """Raises Unavailable where a package or a feature lacks, ValueError for a key that isn't known."""
    if key not in BASELINES:
        raise ValueError(f"no contender {key!r}; choose of {', '.join(BASELINES)}")
    return BASELINES[key](subject)


__all__ = ["BASELINES", "EAGER", "Unavailable", "make"]
