"""Who follows whom as constants of a graph: every item's nearest followers in one row of a table, padded.

f_j = sqrt(sum over b of decay^b S(item b from the end, j))       `following.py` has S
"""

import numpy as np
import torch
from torch import Tensor, nn

from speeder_engine.models.follower_table import NOBODY, FollowerTable


class StaticFollowers(nn.Module):
    """`rows` int64 [I + 1, keep] and `values` float32 for a catalogue of I items: row I is of no item, column I of no
    follower. Items beyond the table came later and follow nobody."""

    rows: Tensor
    values: Tensor
    weights: Tensor
    retrieve: Tensor
    rank: Tensor

    def __init__(self, table: FollowerTable, num_items: int, reduces: bool) -> None:
        """num_items: of the catalogue. reduces: whether the graph's runtime adds up what is scattered into one place;
        TensorRT doesn't."""
        super().__init__()
        self.reduces = reduces
        similar, config = table.scorer().similar, table.config
        items, counts = similar.items, np.diff(similar.offsets)
        places = np.arange(len(items)) - similar.offsets[items]
        shape = (num_items + 1, max(int(counts.max(initial=0)), 1))
        rows, values = np.full(shape, num_items), np.zeros(shape, np.float32)
        rows[items, places], values[items, places] = similar.rows, similar.values
        self.last = config.last
        self.register_buffer("rows", torch.from_numpy(rows))
        self.register_buffer("values", torch.from_numpy(values))
        self.register_buffer("weights", config.decay ** torch.arange(config.last, dtype=torch.float32))
        self.register_buffer("retrieve", table.retrieve.detach().float().clone())
        self.register_buffer("rank", table.rank.detach().float().clone())

    def last_rows(self, history: Tensor, lengths: Tensor) -> Tensor:
        """history [B, T], of which `lengths` [B] are real -> the last ones, newest first, [B, last]; -1 for none. More
        than T, as of a session that has outgrown its window, gather nothing that isn't there."""
        places = lengths.unsqueeze(1) - 1 - torch.arange(self.last)
        return torch.where(places < 0, NOBODY, history.gather(1, places.clamp(0, history.shape[1] - 1)))

    def forward(self, last_rows: Tensor) -> Tensor:
        """[B, last] -> f [B, I]."""
        none = self.rows.shape[0] - 1
        named = torch.where((last_rows < 0) | (last_rows > none), none, last_rows)
        found, rows = self.values[named] * self.weights.unsqueeze(1), self.rows[named]
        sums = torch.zeros(last_rows.shape[0], none + 1)
        if self.reduces:
            sums = sums.scatter_add(1, rows.flatten(1), found.flatten(1))
        else:
            # an item's followers are different items, and of those that are none it is no matter which is written
            for back in range(self.last):
                sums = sums.scatter(1, rows[:, back], sums.gather(1, rows[:, back]) + found[:, back])
        return sums[:, :none].sqrt()
