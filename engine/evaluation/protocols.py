"""The two protocols on one pass over the queries: full ranking, and frozen candidate lists. Knows no system.

Full ranking: all items compete, those of the history are masked; a target that is in its own history (consumed again)
competes too. Candidates: the target and its negatives compete, nothing is masked. Ties as `metrics` has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from warnings import warn

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.candidates import CandidateLists
from speeder_engine.data.splits import Queries
from speeder_engine.errors import ConfigError, DataError, SpeederWarning
from speeder_engine.evaluation.metrics import (
    Floats,
    Rows,
    candidate_metrics,
    candidate_ranks,
    check_scores,
    full_metrics,
    mask_history,
    target_ranks,
    top_k,
)
from speeder_engine.evaluation.report import CandidateOutcome, Report
from speeder_engine.evaluation.scorer import CatalogueScorer, Scorer
from speeder_engine.progress import track

COVERAGE_K = 10


def evaluate(
    scorer: Scorer,
    queries: Queries,
    candidates: CandidateLists | None,
    *,
    ks: Sequence[int] = (1, 5, 10, 20),
    batch_size: int = 512,
    show_progress: bool = True,
) -> Report:
    """Ranks every target over the full catalogue, and in its candidate list where lists are given.

    Holds the scores of one batch, a few times [batch_size, num_items] floats. DataError for scores that are NaN, +inf
    or of a wrong shape and for lists of other queries; a counted SpeederWarning where a system gave all items the
    same score (its ranks are then the catalogue's order) or none.
    """
    _check(queries, candidates, ks, batch_size)
    tally = _Tally()
    starts = range(0, len(queries), batch_size)
    for start in track(starts, f"evaluating {scorer.name}") if show_progress else starts:
        batch = queries.slice(start, start + batch_size)
        scores = scorer.scores(batch)
        tally.add_full(scorer.name, batch, scores)
        if candidates is not None:
            rows = candidates.rows[start : start + batch_size]
            slots = candidates.target_slot[start : start + batch_size]
            tally.add_candidates(scorer.name, _candidate_scores(scorer, batch, rows, scores), rows, slots)
    if tally.num_silent:
        message = (
            f"{scorer.name}: answered nothing out of the whole catalogue in {tally.num_silent:,} of {len(queries):,}"
        )
        warn(f"{message} queries; these count as missed in the full ranking", SpeederWarning, stacklevel=2)
    if tally.num_constant:
        message = f"{scorer.name}: gave all items the same score in {tally.num_constant:,} of {len(queries):,} queries"
        warn(f"{message}; they are ranked in the catalogue's order", SpeederWarning, stacklevel=2)
    return tally.report(scorer, queries, ks)


@dataclass
class _Tally:
    ranks: list[Rows] = field(default_factory=list)
    candidate_ranks: list[Rows] = field(default_factory=list)
    valid: list[NDArray[np.bool_]] = field(default_factory=list)
    recommended: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    num_constant: int = 0
    num_silent: int = 0

    def add_full(self, name: str, batch: Queries, scores: Floats) -> None:
        num_items = len(self.recommended) or (scores.shape[1] if scores.ndim == 2 else 0)
        check_scores(scores, (len(batch), num_items), name)
        if len(self.recommended) == 0:
            self.recommended = np.zeros(num_items, dtype=np.bool_)
        if max(batch.targets.max(), batch.rows.max(initial=0)) >= num_items:
            raise DataError(f"{name}: scores {num_items} items, but the queries know more; fit it on the same data")
        best, worst = scores.max(axis=1), scores.min(axis=1)
        self.num_silent += int(np.count_nonzero(np.isneginf(best)))
        self.num_constant += int(np.count_nonzero((best == worst) & np.isfinite(best)))
        masked = mask_history(scores, batch.offsets, batch.rows, batch.targets)
        self.ranks.append(target_ranks(masked, batch.targets))
        top = top_k(masked, COVERAGE_K)
        self.recommended[top[top >= 0]] = True

    def add_candidates(self, name: str, scores: Floats, rows: Rows, slots: Rows) -> None:
        check_scores(scores, (rows.shape[0], rows.shape[1]), f"{name}, candidates")
        self.candidate_ranks.append(candidate_ranks(scores, rows, slots))
        self.valid.append(np.asarray(np.isfinite(scores).any(axis=1)))

    def report(self, scorer: Scorer, queries: Queries, ks: Sequence[int]) -> Report:
        ranks = np.concatenate(self.ranks)
        metrics = full_metrics(ranks, ks) | {f"coverage@{COVERAGE_K}": float(self.recommended.mean())}
        outcome = None
        if self.valid:
            outcome = CandidateOutcome(np.concatenate(self.candidate_ranks), np.concatenate(self.valid))
            metrics |= candidate_metrics(outcome.ranks, outcome.valid)
        return Report(scorer.name, scorer.uses_time, queries.users, ranks, metrics, outcome)


def _candidate_scores(scorer: Scorer, batch: Queries, rows: Rows, scores: Floats) -> Floats:
    # what a CatalogueScorer would compute again is at hand
    if isinstance(scorer, CatalogueScorer):
        return np.take_along_axis(scores, rows, axis=1)
    return scorer.candidate_scores(batch, rows)


def _check(queries: Queries, candidates: CandidateLists | None, ks: Sequence[int], batch_size: int) -> None:
    if batch_size < 1 or not ks or min(ks) < 1:
        raise ConfigError(f"evaluation: batch_size {batch_size} and each of ks {tuple(ks)} must be at least 1")
    if len(queries) == 0:
        raise DataError("evaluation: no queries; a user needs three interactions to have one")
    if len(np.unique(queries.users)) < len(queries):
        raise DataError("evaluation: a user has several queries; intervals over users need one query a user")
    if candidates is None:
        return
    same = np.array_equal(candidates.users, queries.users) and np.array_equal(candidates.targets, queries.targets)
    if not same:
        raise DataError("evaluation: the candidate lists belong to other queries; load them with frozen_candidates")
