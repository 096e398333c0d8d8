"""What a contender is: it answers the same users over the same weights, each in its own way."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from workload import BenchUser

Floats = NDArray[np.float32]
T = TypeVar("T")


class Unavailable(Exception):
    """A contender can't run here: a package or a feature lacks. One line, the reason."""


@dataclass(frozen=True)
class Answer:
    """What was asked for: scores of the candidates, float32 [C] in the user's order, or written text."""

    scores: Floats | None
    text_tokens: int = 0


class Baseline(Protocol):
    """A contender. `warm_up(user)` comes right before every `answer_warm(user)`: the user was here, and returns with
    one new item. Where nothing is kept (`has_warm` false) a returning user costs as much as a stranger.
    """

    @property
    def key(self) -> str:
        """Part of flat JSON keys."""
        ...

    @property
    def label(self) -> str:
        """For the table; names the precision where it isn't the subject's."""
        ...

    @property
    def has_warm(self) -> bool: ...

    @property
    def heavy(self) -> bool:
        """Takes seconds a user, in large shapes."""
        ...

    def answer(self, user: BenchUser) -> Answer:
        """Nothing is known of this user; what all users share may be."""
        ...

    def warm_up(self, user: BenchUser) -> None: ...

    def answer_warm(self, user: BenchUser) -> Answer: ...

    def close(self) -> None:
        """Gives memory and files back."""
        ...


def known(states: dict[str, T], user: BenchUser) -> T:
    """What `warm_up` kept of this user."""
    if user.user_id not in states:
        raise ValueError(f"user {user.user_id}: nothing is kept; call warm_up before answer_warm")
    return states[user.user_id]
