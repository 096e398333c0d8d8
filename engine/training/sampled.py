"""Sampled softmax: a step compresses and scores some items of the catalogue, and stands for all of them.

S = {what the batch holds} + {drawn: n times from q_i ~ (events_i + 1)^.75}
Z = sum over i in S of exp(s_i - log p_i)        p_i = 1 for the batch's own, else 1 - (1 - q_i)^n, to be drawn at all

The expectation of Z over what is drawn is the sum over the whole catalogue. An item stands in S once, so a target is
never its own negative.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.errors import ConfigError
from speeder_engine.models.prior import Prior
from speeder_engine.training.batches import PAD, TrainingBatch
from speeder_engine.training.config import TrainingConfig

SMOOTHING = 0.75  # word2vec's: between uniform and by frequency
SAMPLED_ITEMS = 8192


@dataclass(frozen=True)
class SampledItems:
    """`rows` int64 [S] of the catalogue, ascending; `log_inclusion` float32 [S], log p of the formula."""

    rows: Tensor
    log_inclusion: Tensor

    def renumber(self, batch: TrainingBatch) -> TrainingBatch:
        """`batch` with places in `rows` instead of rows of the catalogue."""
        targets = torch.where(batch.targets == PAD, PAD, torch.searchsorted(self.rows, batch.targets))
        rows, candidates = (torch.searchsorted(self.rows, each) for each in (batch.rows, batch.candidates))
        return replace(batch, rows=rows, targets=targets, candidates=candidates)


@dataclass(frozen=True)
class SampledPrior:
    """A prior of these items alone."""

    prior: Prior
    items: Tensor

    def at(self, times: Tensor, items: Tensor | None = None) -> Tensor:
        return self.prior.at(times, self.items if items is None else self.items[items])


class ItemSampler:
    """Draws the items of a step; the same `number` and batch give the same items."""

    def __init__(self, counts: NDArray[np.int64], num_sampled: int, seed: int) -> None:
        weights = (counts + 1.0) ** SMOOTHING
        shares = weights / weights.sum()
        self.num_sampled, self.seed = num_sampled, seed
        self.edges = np.cumsum(shares)
        self.log_inclusion = np.log(-np.expm1(num_sampled * np.log1p(-shares))).astype(np.float32)

    def draw(self, batch: TrainingBatch, number: tuple[int, ...]) -> SampledItems:
        rng = np.random.default_rng((self.seed, *number))
        drawn = np.searchsorted(self.edges, rng.random(self.num_sampled) * self.edges[-1], side="right")
        held = torch.cat([batch.rows.flatten(), batch.targets[batch.trained], batch.candidates.flatten()])
        own = np.unique(held.numpy())
        rows = np.union1d(own, drawn)
        log_inclusion = np.where(np.isin(rows, own), np.float32(0), self.log_inclusion[rows])
        return SampledItems(torch.from_numpy(rows), torch.from_numpy(log_inclusion))


def make_sampler(config: TrainingConfig, counts: NDArray[np.int64]) -> ItemSampler | None:
    """Of items with these training events [I]; None where the softmax is over the whole catalogue, ConfigError for
    settings that need that."""
    num_sampled, num_items = config.sampled_items, len(counts)
    if not num_sampled and num_items > config.full_softmax_items:
        num_sampled = SAMPLED_ITEMS
    if not num_sampled or num_sampled >= num_items:
        return None
    if config.label_smoothing:
        raise ConfigError(
            f"label_smoothing needs a softmax over all {num_items:,} items: set it to 0, or full_softmax_items higher"
        )
    return ItemSampler(counts, num_sampled, config.seed)
