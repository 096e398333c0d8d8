"""f: what followed a history's items in the histories of training, on the host.

S_ij    = pairs_ij / (events_i^a events_j^b), scaled to a mean of 1
f_j     = sqrt(sum over b = 0 .. last - 1 of decay^b S(item b from the end, j))
score_j = ... + gamma f_j

pairs_ij: how often j came at most `window` events after i, and where not `forward`, before it.

A low-rank product can't hold who follows whom pair by pair; this can (ItemKNN as in Sarwar et al. 2001, forward in time
and discounted by popularity). Only items that followed have an f: a few hundred of a catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.config import FollowersConfig
from speeder_engine.followers import Followers
from speeder_engine.runs import ranges

Rows = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Following:
    """The items that have an f, int32 [n] ascending, and their f, float32 [n]."""

    rows: Rows
    scores: Floats

    def weighed(self, gamma: float) -> "Following":
        return Following(self.rows, np.float32(gamma) * self.scores)

    def of(self, items: NDArray[np.integer[Any]]) -> Floats:
        """[m]: f of these rows, 0 where they have none."""
        if not len(self.rows):
            return np.zeros(len(items), np.float32)
        places = np.searchsorted(self.rows, items).clip(max=len(self.rows) - 1)
        return np.where(self.rows[places] == items, self.scores[places], np.float32(0))


@dataclass(frozen=True, eq=False)
class FollowerScorer:
    """f by the formula, on the host: `similar` holds S."""

    config: FollowersConfig
    similar: Followers

    @classmethod
    def of_counts(cls, config: FollowersConfig, pairs: Followers, events: NDArray[np.int64]) -> "FollowerScorer":
        """`pairs` holds pairs_ij, `events` [num_items] how often each item was taken."""
        return cls(config, pairs.scaled(*factors(config, pairs, events)))

    def following(self, history: Rows) -> Following:
        """Of a history of rows, oldest first; items that came after the table was counted have no followers."""
        last = history[-self.config.last :]
        weights = self.config.decay ** np.arange(len(last) - 1, -1, -1)
        known = last < self.similar.num_items
        last, weights = last[known], weights[known]
        starts, ends = self.similar.offsets[last], self.similar.offsets[last + 1]
        events = ranges(starts, ends)
        rows, places = np.unique(self.similar.rows[events], return_inverse=True)
        sums = np.bincount(places, np.repeat(weights, ends - starts) * self.similar.values[events], len(rows))
        return Following(rows.astype(np.int32), np.sqrt(sums).astype(np.float32))


@dataclass(frozen=True, eq=False)
class WeighedFollowers:
    """gamma f: `gamma` by head, as trained."""

    scorer: FollowerScorer
    gamma: Mapping[str, float]

    def of(self, head: str, window: Rows) -> Following | None:
        """Of the history's rows that the model sees; None for a head that knows nothing of it, or makes nothing of it:
        to add nothing must not round a score anew."""
        gamma = self.gamma.get(head, 0.0)
        return self.scorer.following(window).weighed(gamma) if gamma else None


def merged(
    following: Following, top: Floats, rows: NDArray[np.int64], followers: Rows, scores: Floats
) -> tuple[Floats, NDArray[np.int64]]:
    """The best k of a search without `following`, and the rows that followed [n] with their scores without it [n], as
    one: scores and rows, best first, equal scores by row.

    Its first k are exact, as gamma f is never negative: what isn't among the best k without it is not among the best
    k of those that have none.
    """
    if not len(followers):
        return top, rows
    others = ~np.isin(rows, followers)
    values = np.concatenate([top[others], scores + following.of(followers)])
    both = np.concatenate([rows[others], followers])
    order = np.lexsort((both, -values))
    return values[order], both[order]


def discounts(config: FollowersConfig, events: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """events^-a of an item and events^-b of its follower, both [num_items]."""
    taken = np.maximum(events, 1).astype(np.float64)
    of_item, of_follower = config.discounts
    return taken**-of_item, taken**-of_follower


def factors(
    config: FollowersConfig, pairs: Followers, events: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What makes S of pairs_ij, of an item and of its follower, both [num_items]: `discounts`, over their mean."""
    of_item, of_follower = discounts(config, events)
    discounted = pairs.values * of_item[pairs.items] * of_follower[pairs.rows]
    return of_item / (discounted.mean() if len(discounted) else 1.0), of_follower
