"""What is added to scores: the prior, a constant of the catalogue or popularity as it stood at each target."""

from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from speeder_engine.live_prior import LivePopularity
from speeder_engine.memory import CPU, refuse_beyond_memory

REFRESH = 3600  # seconds: how old counts are at most in training, as where a service sets them every hour


class Prior(Protocol):
    def at(self, times: Tensor, items: Tensor | None = None) -> Tensor:
        """Unix seconds [n] -> [n, I], or [I] where it is the same at all times; of the given item rows only."""
        ...


class ConstantPrior:
    """[I], whenever."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def at(self, times: Tensor, items: Tensor | None = None) -> Tensor:
        return self.values if items is None else self.values[items]


class LivePrior:
    """Features of a `LivePopularity` at every hour that has an event, weighed by a model's `prior_weights` [S]."""

    def __init__(self, popularity: LivePopularity, weights: nn.Parameter, device: torch.device) -> None:
        self.weights = weights
        hours = np.unique(popularity.times // REFRESH)
        shape = len(hours), popularity.num_items, len(popularity.config.half_lives_days)
        what = f"live_prior: counts of {shape[1]:,} items at {shape[0]:,} hours with {shape[2]} half-lives"
        refuse_beyond_memory(what, prod(shape) * np.float16().itemsize, CPU)
        self.hours = torch.from_numpy(hours).to(device)
        self.features = torch.from_numpy(popularity.features(hours * REFRESH, np.float16)).to(device)  # [hours, I, S]

    def at(self, times: Tensor, items: Tensor | None = None) -> Tensor:
        hours = torch.searchsorted(self.hours, torch.div(times, REFRESH, rounding_mode="floor"))
        hours = hours.clamp_max(len(self.hours) - 1)
        if items is not None:
            return self._weighed(self.features[hours.unsqueeze(1), items])
        # a user's events often share an hour: its counts are read and weighed once
        distinct, places = torch.unique(hours, return_inverse=True)
        return self._weighed(self.features[distinct])[places]

    def _weighed(self, features: Tensor) -> Tensor:
        return features.to(self.weights.dtype) @ self.weights


class ExactPrior:
    """The same to the second, for evaluation: only events before the query count, however close."""

    def __init__(self, popularity: LivePopularity, weights: Tensor) -> None:
        self.popularity, self.weights = popularity, weights

    def at(self, times: Tensor, items: Tensor | None = None) -> Tensor:
        features = self.features(times)
        return (features if items is None else features[:, items]) @ self.weights.detach()

    def features(self, times: Tensor) -> Tensor:
        """What is weighed, [n, I, S]."""
        return torch.from_numpy(self.popularity.features(times.cpu().numpy())).to(self.weights.device)


def of_candidates(prior: Tensor, candidates: Tensor) -> Tensor:
    """Prior [I] or [B, I] -> [B, C] of the candidate rows [B, C]."""
    return prior[candidates] if prior.ndim == 1 else prior.gather(1, candidates)
