"""The table of who follows whom as part of a model: counts, gamma of each head, and f along a training segment.

`following.py` has the formula.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speeder_engine.config import FollowersConfig
from speeder_engine.followers import Followers
from speeder_engine.following import FollowerScorer, WeighedFollowers, factors

NOBODY = -1


class FollowerTable(nn.Module):
    """The counts, which are integers and survive any cast, and gamma of the retrieve and of the rank head."""

    offsets: Tensor
    rows: Tensor
    pairs: Tensor
    events: Tensor

    def __init__(self, config: FollowersConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("offsets", torch.zeros(config.num_items + 1, dtype=torch.int64))
        self.register_buffer("rows", torch.zeros(config.num_pairs, dtype=torch.int32))
        self.register_buffer("pairs", torch.zeros(config.num_pairs, dtype=torch.int32))
        self.register_buffer("events", torch.zeros(config.num_items, dtype=torch.int64))
        self.weights = nn.Parameter(torch.ones(2))
        self._similar: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def retrieve(self) -> Tensor:
        """Never negative: an item that followed is never ranked lower for it, which the search relies on."""
        return self.weights[0].clamp_min(0)

    @property
    def rank(self) -> Tensor:
        return self.weights[1].clamp_min(0)

    @torch.no_grad()
    def fill(self, counted: Followers, events: NDArray[np.int64]) -> "FollowerTable":
        """`counted` holds pairs_ij, `events` [num_items] how often each item was taken."""
        self.offsets.copy_(torch.from_numpy(counted.offsets))
        self.rows.copy_(torch.from_numpy(counted.rows))
        self.pairs.copy_(torch.from_numpy(counted.values.astype(np.int32)))
        self.events.copy_(torch.from_numpy(events))
        return self

    def counted(self) -> tuple[Followers, NDArray[np.int64]]:
        """What `fill` was given."""
        counts = self.offsets, self.rows, self.pairs, self.events
        offsets, rows, pairs, events = (each.cpu().numpy() for each in counts)
        return Followers(offsets, rows, pairs.astype(np.float32)), events

    def scorer(self) -> FollowerScorer:
        """f on the host, as the counts are now."""
        return FollowerScorer.of_counts(self.config, *self.counted())

    def weighed(self) -> WeighedFollowers:
        """With gamma as it is now: before weights are cast."""
        return WeighedFollowers(self.scorer(), {"retrieve": float(self.retrieve), "rank": float(self.rank)})

    def along(self, rows: Tensor, targets: Tensor, items: Tensor | None = None) -> Tensor:
        """f [B, L + 1, I] after the instruction and after each of a segment's items, its own pairs left out.

        rows int64 [B, L] and targets [B, L + 1] as in a training batch, places in `items` [I] where these are given.
        A user's own pairs would tell what comes next: S is as if this segment had not been counted.
        """
        (size, length), device = rows.shape, rows.device
        named = rows if items is None else items[rows]
        of_item, of_follower, values = self._factors(device)
        num_items = len(self.events) if items is None else len(items)
        direct = rows.new_zeros(size * length, num_items, dtype=torch.float32)
        starts = self.offsets[named].flatten()
        counts = self.offsets[named + 1].flatten() - starts
        lines = torch.repeat_interleave(torch.arange(size * length, device=device), counts)
        ends = counts.cumsum(0)
        places = torch.arange(len(lines), device=device) + (starts - ends + counts)[lines]
        columns, found = self.rows[places].long(), values[places]
        if items is not None:
            columns, lines, found = _among(items, columns, lines, found)
        direct.view(-1).index_add_(0, lines * num_items + columns, found)
        direct = direct.view(size, length, num_items)
        for apart in range(1, min(self.config.window, length) + 1):
            followers = targets[:, apart:]
            taken = followers.clamp_min(0)
            of = of_follower[taken if items is None else items[taken]] * (followers != NOBODY)
            own = of_item[named[:, : length + 1 - apart]] * of
            direct[:, : length + 1 - apart].scatter_add_(2, taken.unsqueeze(2), -own.unsqueeze(2))
        return self._decayed(direct.clamp_min_(0))

    def _decayed(self, direct: Tensor) -> Tensor:
        """S of each item [B, L, I] -> f [B, L + 1, I]."""
        size, length, num_items = direct.shape
        decay, last = self.config.decay, self.config.last
        sums = direct.new_zeros(size, length + 1, num_items)
        for at in range(length):
            torch.add(direct[:, at], sums[:, at], alpha=decay, out=sums[:, at + 1])
            if at >= last:
                sums[:, at + 1].sub_(direct[:, at - last], alpha=decay**last)
        return sums.clamp_min_(0).sqrt_()

    def _factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """events^-a over the mean and events^-b, both [num_items], and S at the pairs; made once."""
        if self._similar is None or self._similar[0].device != device:
            pairs, events = self.counted()
            of_item, of_follower = factors(self.config, pairs, events)
            parts = of_item, of_follower, pairs.scaled(of_item, of_follower).values
            first, second, third = (torch.from_numpy(part).float().to(device) for part in parts)
            self._similar = first, second, third
        return self._similar


def _among(items: Tensor, columns: Tensor, lines: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Only the entries whose column is one of `items` [I], ascending, and its place there."""
    places = torch.searchsorted(items, columns).clamp_max(len(items) - 1)
    inside = items[places] == columns
    return places[inside], lines[inside], found[inside]
