"""Ranks and what is computed from them. Knows no system and no data set.

One rule for ties everywhere, the engine's: of equal scores the item of the lower row comes first. A system that can't
tell items apart is thus ranked by an order that has nothing to do with the target. Ranks count from 0.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import ConfigError, DataError

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]
Values = NDArray[np.float64]

UNRANKED = np.iinfo(np.int32).max


def check_scores(scores: Floats, shape: tuple[int, int], what: str) -> None:
    """DataError unless `scores` has this shape and holds neither NaN nor +inf (-inf means: no answer)."""
    if scores.shape != shape:
        raise DataError(f"{what}: scores have shape {scores.shape}, not {shape}; a scorer answers every query")
    broken = np.isnan(scores) | np.isposinf(scores)
    if broken.any():
        query = int(broken.any(axis=1).argmax())
        count = int(broken.sum())
        raise DataError(f"{what}: {count} scores are NaN or +inf, first in query {query} of a batch; check the model")


def mask_history(scores: Floats, offsets: NDArray[np.int64], rows: Rows, targets: Rows) -> Floats:
    """A copy of `scores` [Q, I] with -inf at the items of history q, `rows[offsets[q]:offsets[q + 1]]`.

    A target that the user has consumed before keeps its score: the question was which item came next, and it did.
    """
    masked = np.array(scores, dtype=np.float32)
    queries = np.arange(len(targets))
    masked[np.repeat(queries, np.diff(offsets)), rows] = -np.inf
    masked[queries, targets] = scores[queries, targets]
    return masked


def target_ranks(scores: Floats, targets: Rows) -> Rows:
    """int32 [Q]: how many items of `scores` [Q, I] stand before the target; UNRANKED where its score is -inf."""
    reached = np.take_along_axis(scores, targets[:, None], axis=1)  # [Q, 1]
    earlier_row = np.arange(scores.shape[1], dtype=np.int32) < targets[:, None]
    return _count_before(scores, reached, earlier_row)


def candidate_ranks(scores: Floats, candidates: Rows, target_slot: Rows) -> Rows:
    """int32 [Q]: how many of the candidates [Q, C] stand before that in `target_slot`; UNRANKED as above."""
    reached = np.take_along_axis(scores, target_slot[:, None], axis=1)
    earlier_row = candidates < np.take_along_axis(candidates, target_slot[:, None], axis=1)
    return _count_before(scores, reached, earlier_row)


def stands_before(scores: Floats, reached: Floats, earlier_row: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether an item of this score stands before a target that reached that one: the rule for ties."""
    before: NDArray[np.bool_] = (scores > reached) | ((scores == reached) & earlier_row)
    return before


def _count_before(scores: Floats, reached: Floats, earlier_row: NDArray[np.bool_]) -> Rows:
    ranks = np.count_nonzero(stands_before(scores, reached, earlier_row), axis=1).astype(np.int32)
    return np.where(np.isneginf(reached[:, 0]), np.int32(UNRANKED), ranks)


def top_k(scores: Floats, k: int) -> Rows:
    """int32 [Q, min(k, I)]: the best rows of `scores` [Q, I] in order, -1 where fewer have a finite score."""
    num_queries, num_items = scores.shape
    k = min(k, num_items)
    threshold = np.partition(scores, num_items - k, axis=1)[:, num_items - k, None]
    query, row = np.nonzero((scores >= threshold) & ~np.isneginf(scores))
    order = np.lexsort((row, -scores[query, row], query))
    query, row = query[order], row[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)  # within its query
    kept = place < k
    best = np.full((num_queries, k), -1, dtype=np.int32)
    best[query[kept], place[kept]] = row[kept]
    return best


def hit(ranks: Rows, k: int) -> Values:
    """HR@k of each query, its target being the one relevant item: 1 where rank < k."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: Rows, k: int) -> Values:
    """NDCG@k of each query: 1 / log2(rank + 2) where rank < k, else 0; the ideal gain is 1."""
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def reciprocal_rank(ranks: Rows) -> Values:
    """1 / (rank + 1), 0 for an unranked target; no cut-off."""
    return np.where(ranks == UNRANKED, 0.0, 1.0 / (ranks + 1.0))


def per_user(metric: str, ranks: Rows) -> Values:
    """float64 [Q] of a metric over the full catalogue by its name: `hr@K`, `ndcg@K` or `mrr`."""
    if metric == "mrr":
        return reciprocal_rank(ranks)
    name, _, cutoff = metric.partition("@")
    formulas = {"hr": hit, "ndcg": ndcg}
    if name not in formulas or not cutoff.isdigit() or int(cutoff) < 1:
        raise ConfigError(f"metric {metric!r} has no value per user; take hr@K, ndcg@K, mrr, vhr@1 or valid_ratio")
    return formulas[name](ranks, int(cutoff))


def full_metrics(ranks: Rows, ks: Sequence[int]) -> dict[str, float]:
    """`hr@K` for every K, `ndcg@K` for K > 1 (at 1 they are the same), `mrr`: means over the queries."""
    hits = {f"hr@{k}": float(hit(ranks, k).mean()) for k in ks}
    gains = {f"ndcg@{k}": float(ndcg(ranks, k).mean()) for k in ks if k > 1}
    return hits | gains | {"mrr": float(reciprocal_rank(ranks).mean())}


def candidate_metrics(ranks: Rows, valid: NDArray[np.bool_]) -> dict[str, float]:
    """`vhr@1` = valid_ratio x hr@1_valid: valid and correct / all, valid / all, correct / valid (0 if none is)."""
    correct = int(np.count_nonzero(valid & (ranks == 0)))
    answered = int(np.count_nonzero(valid))
    return {
        "vhr@1": correct / len(ranks),
        "valid_ratio": answered / len(ranks),
        "hr@1_valid": correct / answered if answered else 0.0,
    }
