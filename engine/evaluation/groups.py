"""Users in groups, by the length of their history or the popularity of their target, and a report's metrics in each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries, Split
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import Rows
from speeder_engine.evaluation.report import Report

LENGTHS = (5, 10, 20, 50, 200)
SHARES = ("head", "mid", "tail")
GROUP_METRICS = ("vhr@1", "hr@10", "ndcg@10", "mrr")


@dataclass(frozen=True, eq=False)
class Grouping:
    """User `users[q]` is in group `names[of_user[q]]`; both int32 [Q]. A group may have no users."""

    by: str
    names: tuple[str, ...]
    users: Rows
    of_user: Rows

    def members(self, report: Report) -> list[tuple[str, NDArray[np.bool_]]]:
        """Each group that has users, and which of the report's users [Q] these are."""
        if not np.array_equal(report.users, self.users):
            raise DataError(f"{report.system}: was evaluated on other users than those grouped by {self.by}")
        masks = [(name, self.of_user == group) for group, name in enumerate(self.names)]
        return [(name, mask) for name, mask in masks if mask.any()]


@dataclass(frozen=True)
class GroupMetrics:
    group: str
    num_users: int
    metrics: dict[str, float]


def grouped(report: Report, grouping: Grouping, metrics: Sequence[str] = GROUP_METRICS) -> list[GroupMetrics]:
    """The means over each group's users, groups without users left out; `vhr@1` only where candidates were ranked."""
    values = {name: report.values(name) for name in metrics if name != "vhr@1" or report.on_candidates is not None}
    return [
        GroupMetrics(name, int(mask.sum()), {metric: float(each[mask].mean()) for metric, each in values.items()})
        for name, mask in grouping.members(report)
    ]


def by_length(queries: Queries, bounds: Sequence[int] = LENGTHS) -> Grouping:
    """Groups of history lengths 0 to bounds[0], bounds[0] + 1 to bounds[1], and so on, the last one open."""
    between = [f"{low + 1}-{high}" for low, high in pairwise(bounds)]
    names = (f"up to {bounds[0]}", *between, f"over {bounds[-1]}")
    return Grouping("length", names, queries.users, np.searchsorted(bounds, queries.lengths).astype(np.int32))


def by_popularity(queries: Queries, counts: NDArray[np.int64]) -> Grouping:
    """Groups of the target's number of training events, `counts` int64 [num_items]: none (cold), or its share.

    Items from the most popular down hold the first third of all events (head), the second (mid) and the last (tail);
    an item belongs where its own events begin, equally popular ones to the same group.
    """
    falling = np.sort(counts)[::-1]
    more_popular = np.searchsorted(-falling, -counts)  # items with more events
    held = np.concatenate([np.zeros(1, np.int64), np.cumsum(falling)])
    share = held[more_popular] / max(int(held[-1]), 1)
    group = np.where(counts > 0, 1 + np.minimum((share * len(SHARES)).astype(np.int32), len(SHARES) - 1), 0)
    return Grouping("popularity", ("cold", *SHARES), queries.users, group[queries.targets].astype(np.int32))


def _by_popularity_in(split: Split, queries: Queries) -> Grouping:
    return by_popularity(queries, np.bincount(split.train.rows, minlength=split.dataset.num_items))


GROUPINGS: dict[str, Callable[[Split, Queries], Grouping]] = {
    "length": lambda split, queries: by_length(queries),
    "popularity": _by_popularity_in,
}


def check_groupings(names: Sequence[str]) -> None:
    """ConfigError for a name that is not in GROUPINGS."""
    for name in names:
        if name not in GROUPINGS:
            raise ConfigError(f"by: {name!r} is no way to group users; choose of {', '.join(GROUPINGS)}")
