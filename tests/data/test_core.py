import networkx
import numpy as np
import pytest

from speeder_engine.data.core import k_core
from speeder_engine.errors import ConfigError


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_agrees_with_networkx(seed, k):
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers(0, [60, 50], (330, 2)), axis=0)
    pairs = pairs[rng.permutation(len(pairs))]
    graph = networkx.Graph([(("user", user), ("item", item)) for user, item in pairs.tolist()])
    core = networkx.k_core(graph, k)
    expected = [core.has_edge(("user", user), ("item", item)) for user, item in pairs.tolist()]
    assert k_core(pairs[:, 0], pairs[:, 1], k).tolist() == expected


def test_some_cases_above_lose_events_in_several_rounds():
    chain = np.array([[user, item] for user in range(6) for item in (user, user + 1)])
    assert not k_core(chain[:, 0], chain[:, 1], 2).any()


def test_repeated_events_count_each_and_zero_keeps_all():
    users, items = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1])
    assert k_core(users, items, 3).tolist() == [True, True, True, False]
    assert k_core(users, items, 0).all()
    for bad in (-1, 2.5, "2", None):
        with pytest.raises(ConfigError, match=f"min_interactions={bad!r}: a whole number"):
            k_core(users, items, bad)
