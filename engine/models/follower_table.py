"""The table of who follows whom as part of a model: counts, gamma of each head, and f along a training segment.

`following.py` has the formula.
"""

from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import FollowersConfig
from speeder_engine.followers import Followers
from speeder_engine.following import FollowerScorer, WeighedFollowers, factors

NOBODY = -1
AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}  # floats of a part of a batch


class FollowerTable(nn.Module):
    """The counts, which are integers, and gamma of the retrieve and of the rank head: both survive any cast."""

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps gamma in its type whatever the other weights become: scores on the host are made of it as it was
        trained, and so must be those of an engine that is made of, or saved from, a model that has been cast."""
        exact = self.weights.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weights.dtype != exact.dtype:
            self.weights.data = exact.to(self.weights.device)
        return self

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
        self._similar = None
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
        return WeighedFollowers(
            self.scorer(), {"retrieve": float(self.retrieve.detach()), "rank": float(self.rank.detach())}
        )

    def along(self, rows: Tensor, targets: Tensor, items: Tensor | None = None) -> Tensor:
        """f [N, I] where something is to be told: after the instruction and after each of a segment's items, its own
        pairs left out. N places of `targets` that aren't NOBODY, one segment after the other.

        rows int64 [B, L] and targets [B, L + 1] as in a training batch, places in `items` [I] where these are given.
        A user's own pairs would tell what comes next: S is as if this segment had not been counted.
        """
        (size, length), num_items = rows.shape, len(self.events) if items is None else len(items)
        asked = targets != NOBODY
        segments, after = asked.nonzero(as_tuple=True)
        lengths = (asked * torch.arange(length + 1, device=rows.device)).amax(dim=1)  # items that something comes after
        entries, columns, found = self._counted_of(rows, lengths, items)
        followers, own = self._own_pairs(rows, targets, items)
        decays = self._decays(length, rows.device)
        out = torch.empty(len(segments), num_items, device=rows.device)
        # a few segments at a time, so that what lies between stays in a CPU's cache
        step = max(1, AT_ONCE.get(rows.device.type, AT_ONCE["cuda"]) // ((length + 1) * num_items))
        firsts = torch.arange(0, size + step, step, device=rows.device).clamp_max(size)
        ends = torch.searchsorted(entries, firsts * length).tolist()
        places = torch.searchsorted(segments, firsts).tolist()
        longest = [int(part.max()) for part in torch.split(lengths.cpu(), step)]
        for chunk, first in enumerate(range(0, size, step)):
            last, most = min(first + step, size), longest[chunk]
            inside, told = slice(*ends[chunk : chunk + 2]), slice(*places[chunk : chunk + 2])
            direct = out.new_zeros(last - first, most, num_items)
            lines = (entries[inside] // length - first) * most + entries[inside] % length
            direct.view(-1).index_add_(0, lines * num_items + columns[inside], found[inside])
            direct.scatter_add_(2, followers[first:last, :most], own[first:last, :most]).clamp_min_(0)
            with torch.autocast(rows.device.type, enabled=False):
                sums = torch.matmul(decays[: most + 1, :most], direct).view(-1, num_items)
            torch.index_select(sums, 0, (segments[told] - first) * (most + 1) + after[told], out=out[told])
            out[told].sqrt_()
        return out

    def _counted_of(self, rows: Tensor, lengths: Tensor, items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """S of the first `lengths` [B] of the items `rows` [B, L] as a list: the place in rows (ascending), the
        follower's column, the value."""
        device = rows.device
        asked = (torch.arange(rows.shape[1], device=device) < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
        named = rows.flatten()[asked]
        named = named if items is None else items[named]
        starts = self.offsets[named]
        counts = self.offsets[named + 1] - starts
        owners = torch.repeat_interleave(torch.arange(len(named), device=device), counts)
        places = torch.arange(len(owners), device=device) + (starts - counts.cumsum(0) + counts)[owners]
        lines, columns, found = asked[owners], self.rows[places].long(), self._factors(device)[2][places]
        return (lines, columns, found) if items is None else _among(items, lines, columns, found)

    def _own_pairs(self, rows: Tensor, targets: Tensor, items: Tensor | None) -> tuple[Tensor, Tensor]:
        """What stood beside each item in its own segment: columns [B, L, N] and the share of S, negative. N is the
        window, or twice that where those before an item count as well."""
        of_item, of_follower, _ = self._factors(rows.device)
        window, length = self.config.window, rows.shape[1]
        followers = F.pad(targets[:, 1:], (0, window - 1), value=NOBODY).unfold(1, window, 1)[:, :length]
        if not self.config.forward:
            before = F.pad(rows, (window, 0), value=NOBODY).unfold(1, window, 1)[:, :length]
            followers = torch.cat([followers, before], dim=2)
        taken = followers.clamp_min(0)
        named, named_followers = (rows, taken) if items is None else (items[rows], items[taken])
        return taken, -of_item[named].unsqueeze(2) * of_follower[named_followers] * (followers != NOBODY)

    def _decays(self, length: int, device: torch.device) -> Tensor:
        """[L + 1, L]: what each item weighs after each place, decay^(t - 1 - s) for the `last` items s before t."""
        apart = torch.arange(length + 1, device=device).unsqueeze(1) - 1 - torch.arange(length, device=device)
        weights = self.config.decay ** apart.clamp_min(0).float()
        return weights * ((apart >= 0) & (apart < self.config.last))

    def _factors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """events^-a over the mean and events^-b, both [num_items], and S at the pairs; made once."""
        if self._similar is None or self._similar[0].device != device:
            pairs, events = self.counted()
            of_item, of_follower = factors(self.config, pairs, events)
            parts = of_item, of_follower, pairs.scaled(of_item, of_follower).values
            first, second, third = (torch.from_numpy(part).float().to(device) for part in parts)
            self._similar = first, second, third
        return self._similar


def _among(items: Tensor, lines: Tensor, columns: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Only the entries whose column is one of `items` [I], ascending, and its place there."""
    places = torch.searchsorted(items, columns).clamp_max(len(items) - 1)
    inside = items[places] == columns
    return lines[inside], places[inside], found[inside]
