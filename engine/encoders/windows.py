"""Histories cut into training windows and grouped into batches of like length; knows no model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.errors import DataError

Ints = NDArray[np.integer[Any]]


def check_histories(offsets: Ints, rows: Ints, num_items: int) -> None:
    """Refuses offsets [U + 1] that do not cut `rows` [N] into histories, and rows outside the catalogue."""
    rising = offsets.ndim == 1 and len(offsets) > 0 and not (np.diff(offsets) < 0).any()
    if not rising or offsets[0] != 0 or offsets[-1] != len(rows):
        raise DataError(f"histories: offsets must rise from 0 to {len(rows)}, the number of rows")
    if len(rows) and (rows.min() < 0 or rows.max() >= num_items):
        raise DataError(f"histories: item rows must lie in 0..{num_items - 1}, not {rows.min()}..{rows.max()}")


def cut_windows(offsets: Ints, window: int) -> tuple[Ints, Ints]:
    """Cuts histories into windows of at most `window` steps (event -> next event), from the end backwards.

    Returns each window's first row and number of steps, int64 [n]; every step of every history is in exactly one.
    """
    starts, lengths = [], []
    for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for last in range(end - 1, first, -window):
            starts.append(max(first, last - window))
            lengths.append(last - starts[-1])
    return np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64)


def draw_batches(lengths: Ints, tokens: int, generator: np.random.Generator) -> list[Ints]:
    """Groups windows of like length into batches of at most `tokens` padded positions, in random order."""
    order = np.lexsort((generator.random(len(lengths)), -lengths))
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return [batches[index] for index in generator.permutation(len(batches))]


def by_length(lengths: Sequence[int] | Ints, at_once: int) -> list[Ints]:
    """Places of sequences of these lengths [n], shortest first and `at_once` of them together: little padding."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + at_once] for start in range(0, len(order), at_once)]


def gather(rows: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The windows' inputs [B, L], right-padded, which of them are real bool [B, L], and the next rows of those [n]."""
    steps = torch.arange(int(lengths.max()))
    real = steps < lengths[:, None]
    at = torch.where(real, starts[:, None] + steps, starts[:, None])
    return rows[at], real, rows[at[real] + 1]


def pad_right(histories: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    """Histories of at least one row -> int64 [n, longest], padded with row 0, and their lengths [n]."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    padded = np.zeros((len(histories), int(lengths.max())), np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(histories)
    return torch.from_numpy(padded), torch.from_numpy(lengths)
