"""What training adds to its scores: live counts of each target's hour, weighed by what the model has learned."""

import numpy as np
import pytest
import torch

from speeder_engine.config import LivePriorConfig
from speeder_engine.errors import ConfigError
from speeder_engine.live_prior import SECONDS_A_DAY, LivePopularity
from speeder_engine.models.prior import REFRESH, LivePrior

NUM_ITEMS, HALF_LIVES = 9, (0.25, 2.0)


@pytest.fixture
def popularity():
    rng = np.random.default_rng(1)
    times, rows = rng.integers(0, 3 * SECONDS_A_DAY, 200), rng.integers(0, NUM_ITEMS, 200).astype(np.int32)
    return LivePopularity.of_events(LivePriorConfig(HALF_LIVES), NUM_ITEMS, times, rows)


def exact(popularity, times):
    """Features at the full hour before each time, in fp64 [n, I, S]."""
    return torch.from_numpy(popularity.features(times // REFRESH * REFRESH)).double()


def test_every_target_has_its_hours_counts_and_the_weights_their_gradient(popularity):
    weights = torch.nn.Parameter(torch.tensor([0.3, -1.5]))
    prior = LivePrior(popularity, weights, torch.device("cpu"))
    # of some hours several, and not in their order
    times = np.concatenate([popularity.times[::-3], popularity.times[:40], popularity.times[:1]])
    features = exact(popularity, times)
    found = prior.at(torch.from_numpy(times))
    expected = features @ weights.detach().double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=3e-3)  # kept as fp16
    above = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    found.backward(above)
    torch.testing.assert_close(
        weights.grad.double(), torch.einsum("ni,nis->s", above.double(), features), rtol=2e-3, atol=0.05
    )
    items = torch.arange(NUM_ITEMS)[[4, 0, 7]]
    assert torch.equal(prior.at(torch.from_numpy(times), items), found[:, items])


def test_counts_beyond_the_memory_are_refused_before_they_are_made(popularity, monkeypatch):
    hours = len(np.unique(popularity.times // REFRESH))
    needed = hours * NUM_ITEMS * len(HALF_LIVES) * 2
    monkeypatch.setattr("speeder_engine.memory.host_memory", lambda: needed - 1)
    message = rf"^live_prior: counts of 9 items at {hours} hours with 2 half-lives would take {needed:,} bytes"
    with pytest.raises(ConfigError, match=message):
        LivePrior(popularity, torch.nn.Parameter(torch.ones(2)), torch.device("cpu"))
