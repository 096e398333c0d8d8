"""Histories -> padded training batches: segments of at most a window, with what each loss needs drawn beside them.

Everything random comes out of one generator per epoch, so that a resumed run draws what the first would have drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.config import CalendarConfig
from speeder_engine.data.splits import Histories
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.title_targets import TitleTargets

PAD = -1
MEGABATCH = 16  # batches sorted by length together: little padding, still random


@dataclass(frozen=True)
class TrainingBatch:
    """B segments right-padded to L items. A target of -1 isn't trained."""

    rows: Tensor  # int64 [B, L], 0 where padded
    lengths: Tensor  # int64 [B]
    targets: Tensor  # int64 [B, L + 1]: what follows the instruction, then each item
    cuts: Tensor  # int64 [B]: candidates are ranked after this many items
    candidates: Tensor  # int64 [B, C]: the item that came next, then negatives
    pairs: Tensor  # int64 [B, 2]: two slots in random order; equal where the segment is too short for a pair
    first_is_earlier: Tensor  # float32 [B]
    buckets: Tensor  # int64 [B, L]: calendar buckets of the items, 0 where none is known or shown
    times: Tensor  # int64 [B, L + 1]: Unix seconds of the targets, 0 where not known
    title_cuts: Tensor  # int64 [B, K]: titles are asked for after so many items; -1 where there is none
    titles: Tensor  # int64 [B, K, T]: the answers' token ids, -1 behind; K = 0 where titles aren't trained

    def __len__(self) -> int:
        return self.rows.shape[0]

    @cached_property
    def trained(self) -> Tensor:
        """bool [B, L + 1]: which targets are."""
        return self.targets != PAD

    def to(self, device: torch.device) -> "TrainingBatch":
        return TrainingBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Segment:
    """Items `start..stop` of one user; the first `start` says whether the prompt before it is really empty."""

    offset: int
    start: int
    stop: int

    @property
    def num_inputs(self) -> int:
        return self.stop - self.start - 1


class TrainingBatches:
    """Iterates over the epochs of a training set."""

    def __init__(
        self,
        histories: Histories,
        num_items: int,
        config: TrainingConfig,
        calendar: CalendarConfig | None = None,
        titles: TitleTargets | None = None,
    ) -> None:
        self.histories = histories
        self.num_items = num_items
        self.config = config
        self.calendar = calendar
        self.titles = titles
        self.num_segments = sum(len(_cuts(int(n), config.window, 0)) for n in histories.lengths)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.num_segments // self.config.batch_size)

    @property
    def targets_per_epoch(self) -> int:
        lengths = self.histories.lengths
        return int(lengths[lengths > 1].sum())

    def epoch(self, number: int) -> Iterator[TrainingBatch]:
        """The batches of epoch `number`: the same number gives the same batches."""
        rng = np.random.default_rng((self.config.seed, number))
        segments = self._segments(rng)
        together = 1 if self.config.packing else MEGABATCH  # packing wants long and short ones in a batch
        for chosen in _batches_by_length(segments, self.config.batch_size, together, rng):
            yield self._batch([segments[i] for i in chosen], rng)

    def _segments(self, rng: np.random.Generator) -> list[Segment]:
        """Every history whole, or cut at a new random phase each epoch where it is longer than a window."""
        window, offsets = self.config.window, self.histories.offsets
        phases = rng.integers(0, window, size=len(offsets) - 1)
        return [
            Segment(int(offsets[u]), start, stop)
            for u, phase in enumerate(phases)
            for start, stop in _cuts(int(offsets[u + 1] - offsets[u]), window, int(phase))
        ]

    def _batch(self, segments: list[Segment], rng: np.random.Generator) -> TrainingBatch:
        size, longest = len(segments), max(segment.num_inputs for segment in segments)
        rows = np.zeros((size, longest), dtype=np.int64)
        targets = np.full((size, longest + 1), PAD, dtype=np.int64)
        times = np.zeros((size, longest + 1), dtype=np.int64)
        for i, segment in enumerate(segments):
            events = slice(segment.offset + segment.start, segment.offset + segment.stop)
            items = self.histories.rows[events]
            rows[i, : segment.num_inputs] = items[:-1]
            targets[i, : len(items)] = items
            if self.histories.times is not None:
                times[i, : len(items)] = self.histories.times[events]
            if segment.start > 0:
                targets[i, 0] = PAD  # the prompt is empty here, the user's history is not
        lengths = np.array([segment.num_inputs for segment in segments], dtype=np.int64)
        # from the second item on: an empty history ranks nothing that popularity would not
        cuts = rng.integers(np.minimum(1, lengths), lengths + 1)
        pairs, earlier = _pairs(lengths, rng)
        candidates = self._candidates(targets, cuts, rng)
        buckets = self._buckets(times[:, :-1], lengths, rng)
        titles = no_titles(size) if self.titles is None else self.titles.draw(targets, rng)
        arrays = rows, lengths, targets, cuts, candidates, pairs, earlier, buckets, times, *titles
        return TrainingBatch(*(torch.from_numpy(array) for array in arrays))

    def _buckets(
        self, times: NDArray[np.int64], lengths: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Some histories come without times, so that a request may."""
        if self.calendar is None:
            return np.zeros_like(times)
        shown = rng.random(len(times)) >= self.config.time_dropout
        known = (np.arange(times.shape[1]) < lengths[:, None]) & shown[:, None]
        return np.where(known, self.calendar.buckets(times.ravel()).reshape(times.shape), 0)

    def _candidates(
        self, targets: NDArray[np.int64], cuts: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        positives = targets[np.arange(len(cuts)), cuts]
        negatives = rng.integers(0, self.num_items - 1, size=(len(cuts), self.config.rank_negatives))
        negatives += negatives >= positives[:, None]  # uniform over all items but the positive
        return np.concatenate([np.maximum(positives, 0)[:, None], negatives], axis=1)


def no_titles(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts and titles of a batch that asks for none."""
    return np.zeros((size, 0), dtype=np.int64), np.zeros((size, 0, 1), dtype=np.int64)


def _cuts(length: int, window: int, phase: int) -> list[tuple[int, int]]:
    """(start, stop) of segments with at most window + 1 items whose targets together cover the history once."""
    if length <= window + 1:
        return [(0, length)] if length > 1 else []
    first = phase + 1
    edges = [0, *range(first, length - 1, window), length - 1]
    return [(start, stop + 1) for start, stop in pairwise(edges) if stop > start]


def _batches_by_length(
    segments: list[Segment], size: int, together: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """In random order; `together` batches are drawn at random and sorted by length before they are parted."""
    order = rng.permutation(len(segments))
    lengths = np.array([segment.num_inputs for segment in segments])
    batches = []
    for start in range(0, len(order), size * together):
        chunk = order[start : start + size * together]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _pairs(lengths: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Two slots p < q of each segment, shown in random order; early p and distant q are drawn more often."""
    size = len(lengths)
    first = np.floor((lengths - 1) * rng.random(size) ** 2).astype(np.int64).clip(min=0)
    room = np.maximum(lengths - 1 - first, 0)
    second = first + np.ceil(room * np.sqrt(rng.random(size))).astype(np.int64)
    swap = rng.random(size) < 0.5
    pairs = np.where(swap[:, None], np.stack([second, first], axis=1), np.stack([first, second], axis=1))
    return pairs, (~swap).astype(np.float32)
