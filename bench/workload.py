"""The standard workload: one user as all contenders see it, and streams of users who come back."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# interactions of a user, from the shortest history to the longest in steps of five percent, as counted
MOVIETWEETINGS = (5, 5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 11, 13, 14, 16, 18, 21, 26, 32, 45, 321)  # 5,549 users, 5-core
MOVIELENS = (12, 21, 23, 26, 30, 34, 38, 44, 51, 57, 68, 78, 96, 113, 128, 156, 198, 253, 349, 508, 2039)  # 610 users
ITEM_EXPONENT = 0.94  # of MovieTweetings, fitted over its 10th to 1,000th most popular item
USER_EXPONENT = 0.6
LONGEST = 256  # items of a history that a request carries


@dataclass(frozen=True)
class Workload:
    """How long everything is. A cold user shares the instruction with everybody; a returning one has one new item.

    image_tokens are those of an item's picture in a multimodal LLM: 32 are what BLIP-2's Q-Former makes, the fewest in
    the literature (LLaVA-1.5 has 576, Qwen-VL 256), so that what is measured against them is said cautiously.
    """

    instruction_len: int = 30
    history_len: int = 30
    num_candidates: int = 20
    window: int = 50
    window_step: int = 10
    title_tokens: int = 17
    prompt_tokens: int = 50
    generated_tokens: int = 12
    image_tokens: int = 32

    @property
    def text_prompt_len(self) -> int:
        """Tokens of a prompt that writes titles out: LLaRA's."""
        return (self.history_len + self.num_candidates) * self.title_tokens + self.prompt_tokens

    @property
    def multimodal_prompt_len(self) -> int:
        """The same, and a picture for each item of the history."""
        return self.text_prompt_len + self.history_len * self.image_tokens

    @property
    def cold_rows(self) -> int:
        return self.history_len + self.num_candidates

    @property
    def warm_rows(self) -> int:
        return 1 + self.num_candidates


@dataclass(frozen=True)
class BenchUser:
    """A user as rows of the catalogue. The candidates are distinct; `next_item` is what the user takes next."""

    user_id: str
    history: tuple[int, ...]  # oldest first
    candidates: tuple[int, ...]
    next_item: int

    @property
    def grown(self) -> tuple[int, ...]:
        """The history when the user returns."""
        return (*self.history, self.next_item)


class Zipf:
    """Numbers 0 ... count - 1, the r-th most frequent in proportion to r ** -exponent; which one that is, is random."""

    def __init__(self, count: int, exponent: float, rng: np.random.Generator) -> None:
        self.rng, self.order = rng, rng.permutation(count)
        self.shares = np.cumsum(np.arange(1, count + 1) ** -exponent)

    def draw(self, count: int) -> NDArray[np.int64]:
        """[count], with repetitions."""
        drawn = np.searchsorted(self.shares, self.rng.random(count) * self.shares[-1], side="right")
        found: NDArray[np.int64] = self.order[np.minimum(drawn, len(self.order) - 1)]
        return found

    def distinct(self, count: int) -> tuple[int, ...]:
        """`count` different ones, in the order they came up. Raises ValueError if there are not so many."""
        if count > len(self.order):
            raise ValueError(f"{count} different items asked for, there are {len(self.order)}; give num_items more")
        found: dict[int, None] = {}
        while len(found) < count:
            if 2 * count > len(self.order):  # the rare ones would take for ever
                return tuple(self.rng.permutation(self.order)[:count].tolist())
            found |= dict.fromkeys(self.draw(2 * count).tolist())
        return tuple(found)[:count]


def make_users(count: int, num_items: int, workload: Workload, seed: int) -> list[BenchUser]:
    """Users of the standard workload with popular items more often; the same seed, the same users."""
    rng = np.random.default_rng(seed)
    items, users = Zipf(num_items, ITEM_EXPONENT, rng), []
    for number in range(count):
        *history, next_item = items.distinct(workload.history_len + 1)
        candidates = items.distinct(workload.num_candidates)
        users.append(BenchUser(f"user-{number}", tuple(history), candidates, next_item))
    return users


class Stream:
    """Requests of users who come and come back, each time with the item they took since.

    Who comes is drawn by Zipf's law over `num_users`, items likewise, the length of a first history from `lengths` (its
    quantiles, evenly spaced). Seeded: two streams with the same arguments are the same. A stream goes on where the last
    iterator stopped.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        workload: Workload | None = None,
        *,
        seed: int = 0,
        lengths: tuple[int, ...] = MOVIETWEETINGS,
        user_exponent: float = USER_EXPONENT,
    ) -> None:
        self.workload, self.num_items, self.lengths = workload or Workload(), num_items, lengths
        self.rng = np.random.default_rng(seed)
        self.items = Zipf(num_items, ITEM_EXPONENT, self.rng)
        self.users = Zipf(num_users, user_exponent, self.rng)
        self.known: dict[int, BenchUser] = {}
        self.num_returned = 0
        self.num_requests = 0

    @property
    def returning_share(self) -> float:
        """Of the requests so far, those of users who had been here."""
        return self.num_returned / max(1, self.num_requests)

    def arrivals(self, rate: float, seconds: float) -> Iterator[tuple[float, BenchUser]]:
        """An open loop: `rate` users a second on average, with exponential gaps (Poisson), as (seconds since the
        beginning, user) until `seconds` are over."""
        now = float(self.rng.exponential(1 / rate))
        while now < seconds:
            yield now, self._visit(int(self.users.draw(1)[0]))
            now += float(self.rng.exponential(1 / rate))

    def closed(self, concurrency: int, think_seconds: float = 0.0) -> Iterator[tuple[float, BenchUser]]:
        """A closed loop that never ends: keep `concurrency` requests waiting, send the next when one is answered, after
        thinking for as long as it says (exponential, `think_seconds` on average). Of any `concurrency` in a row no two
        are of one user. Raises ValueError for more than there are users."""
        if concurrency > len(self.users.order):
            raise ValueError(f"{concurrency} users at a time, there are {len(self.users.order)}; give num_users more")
        waiting: deque[int] = deque(maxlen=concurrency - 1)
        while True:
            number = int(self.users.draw(1)[0])
            if number in waiting:
                continue
            waiting.append(number)
            yield float(self.rng.exponential(think_seconds)) if think_seconds else 0.0, self._visit(number)

    def _visit(self, number: int) -> BenchUser:
        before = self.known.get(number)
        self.num_requests += 1
        self.num_returned += before is not None
        if before is None:
            length = min(self._first_length(), self.num_items - 1)
            *history, next_item = self.items.distinct(length + 1)
            user = BenchUser(f"user-{number}", tuple(history), self._candidates(), next_item)
        else:
            grown = before.grown
            taken = set(grown)
            new = next((item for item in self.items.draw(64).tolist() if item not in taken), grown[0])
            user = replace(before, history=grown, candidates=self._candidates(), next_item=int(new))
        self.known[number] = user
        return user

    def _first_length(self) -> int:
        at = self.rng.random() * (len(self.lengths) - 1)
        return min(LONGEST, round(float(np.interp(at, range(len(self.lengths)), self.lengths))))

    def _candidates(self) -> tuple[int, ...]:
        return self.items.distinct(self.workload.num_candidates)
