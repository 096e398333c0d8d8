"""What a warm-up asks: a step for each head and each search that is another kernel, so that no request is the first."""

from collections.abc import Sequence
from itertools import islice

from speeder_engine.catalogue import Catalogue
from speeder_engine.config import EngineConfig, HeadsConfig
from speeder_engine.request import Head, Request
from speeder_engine.triton_kernels.top_scores import MAX_K, list_length

NUM_CANDIDATES = 20


def warm_depths(config: EngineConfig) -> list[int]:
    """A k for every length of the lists that searches of up to `warm_k` keep."""
    return sorted({list_length(k) for k in range(1, min(config.warm_k, MAX_K) + 1)})


def warm_searches(catalogue: Catalogue, config: EngineConfig) -> list[list[Request]]:
    """Of every depth, for one user and for many, with allow lists and without."""
    some = catalogue.item_ids[:NUM_CANDIDATES]
    many, few = config.max_batch_users, min(2, config.max_batch_users)
    steps: list[list[Request]] = []
    for k in warm_depths(config):
        alone, allowing = Request([], k), Request([], k, allow=some)
        steps += [[alone], [alone] * many, [allowing], [allowing] * few]
    return steps


def warm_rankings(catalogue: Catalogue, heads: HeadsConfig) -> list[list[Request]]:
    """Of named items, by each head that was trained."""
    some = catalogue.item_ids[:NUM_CANDIDATES]
    titled = (item_id for item_id in catalogue.item_ids if catalogue.title(item_id))
    named: dict[Head, Sequence[str]] = {"retrieve": some, "rank": some, "title": [*islice(titled, NUM_CANDIDATES)]}
    return [[Request([], candidates=ids, head=head)] for head, ids in named.items() if ids and head in heads.names]
