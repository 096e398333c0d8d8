"""Segments side by side in shared rows of the backbone, instead of one a row with padding behind.

A packed row holds whole segments. What a row of a segment sees is what it saw in the padded batch: its own segment, at
its own positions; so losses are the same, and only the padding is not computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.models.recommender import Recommender


@dataclass(frozen=True)
class Packing:
    """Where the N real rows of a padded batch [B, T] stand in R packed rows of S places each."""

    segments: Tensor  # int64 [N]: their segment, 0..B-1
    columns: Tensor  # int64 [N]: their place in it, 0..T-1
    places: Tensor  # int64 [N]: r * S + s
    num_rows: int
    row_len: int  # S: the longest segment

    @property
    def num_places(self) -> int:
        return self.num_rows * self.row_len

    @classmethod
    def of(cls, real: Tensor) -> "Packing":
        """real: bool [B, T], false where padded."""
        lengths = real.sum(dim=1).tolist()
        row_len = max(lengths)
        rows, starts = first_fit(lengths, row_len)
        segments, columns = real.nonzero(as_tuple=True)
        begin = torch.tensor([row * row_len + start for row, start in zip(rows, starts, strict=True)])
        within = real.cumsum(dim=1) - 1
        places = begin.to(real.device)[segments] + within[segments, columns]
        return cls(segments, columns, places, max(rows) + 1, row_len)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [R, S, ...], zero in free places."""
        packed = padded.new_zeros(self.num_places, *padded.shape[2:])
        packed[self.places] = padded[self.segments, self.columns]
        return packed.view(self.num_rows, self.row_len, *padded.shape[2:])

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """[R, S, d] -> the shape of `like` [B, T, d], zero where padded."""
        padded = packed.new_zeros(like.shape)
        padded[self.segments, self.columns] = packed.flatten(0, 1)[self.places]
        return padded

    def mask(self, padded: Tensor | None) -> Tensor:
        """bool [R, 1, S, S] of a padded batch's mask [B, 1, T, T], None for a causal one. A free place sees itself."""
        device = self.places.device
        segment = torch.full((self.num_places,), -1, device=device)
        segment[self.places] = self.segments
        column = torch.zeros_like(segment)
        column[self.places] = self.columns
        segment, column = (each.view(self.num_rows, self.row_len) for each in (segment, column))
        from_, to = column.unsqueeze(2), column.unsqueeze(1)
        seen = to <= from_ if padded is None else padded[segment.unsqueeze(2), 0, from_, to]
        own = (segment.unsqueeze(2) == segment.unsqueeze(1)) & (segment >= 0).unsqueeze(2)
        return (seen & own | torch.eye(self.row_len, dtype=torch.bool, device=device)).unsqueeze(1)


def first_fit(lengths: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """The row and the start in it of each length, the longest placed first, each in the first row that has room: at
    most 11/9 of the fewest rows possible (Johnson, 1973)."""
    used: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, taken in enumerate(used) if taken + lengths[i] <= room), len(used))
        if row == len(used):
            used.append(0)
        rows[i], starts[i] = row, used[row]
        used[row] += lengths[i]
    return rows, starts


def packed_forward(
    model: Recommender, packing: Packing, embeddings: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """As `model(embeddings, positions, mask)`, [B, T, d]; zero where there is padding."""
    hidden = model(packing.pack(embeddings), packing.pack(positions), packing.mask(mask))
    return packing.unpack(hidden, embeddings)
