"""Last of all, how much popularity and what followed count beside the model: by NDCG@10 on the validation users.

    z = v T' + sum over t of c_t g_t

g_t are the terms that the retrieve head adds to its product: beta prior, or beta w_s f_s of each half-life of a live
one, and gamma f. Training maximises a likelihood, in which the long tail of a catalogue weighs most; who is shown ten
items sees its head. A weighted sum of recommenders has its weights chosen so, too (evaluation/baselines/ensemble.py).
One factor after the other goes through FACTORS, until none gains anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from warnings import warn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.data.splits import Queries
from speeder_engine.errors import SpeederWarning
from speeder_engine.evaluation.metrics import mask_history, ndcg, stands_before
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.models.prior import ExactPrior
from speeder_engine.models.recommender import Recommender
from speeder_engine.progress import track

FACTORS = (0.0, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0)
ROUNDS = 5
TOP = 10
IN_REACH = 100  # items of a list from which a factor may lift one into the first ten
FEWEST_USERS = 100  # fewer would tell chance from gain too badly
AT_ONCE = 1 << 25  # scores
USERS_AT_ONCE = 512
SAME = 1e-9  # gains nearer than that differ by rounding
Floats = NDArray[np.float32]


def calibrate(scorer: ModelScorer, queries: Queries) -> dict[str, float]:
    """The factors by name that are best for these queries; none where the scorer's model adds no terms. All are 1, with
    a warning, where users are fewer than FEWEST_USERS."""
    names = list(weights_of(scorer.model))
    if not names:
        return {}
    if len(queries) < FEWEST_USERS:
        few = f"calibrate: {len(queries)} validation users are too few to choose weights by, {FEWEST_USERS} are needed"
        warn(f"{few}; left as they were learned", SpeederWarning, stacklevel=2)
        return dict.fromkeys(names, 1.0)
    return dict(zip(names, best_factors(Contenders.of(scorer, queries)), strict=True))


def scale(model: Recommender, factors: Mapping[str, float]) -> None:
    """Multiplies the terms' weights, in place."""
    weights = weights_of(model)
    for name, factor in factors.items():
        weights[name].mul_(factor)


def weights_of(model: Recommender) -> dict[str, Tensor]:
    """The learned weight of every term that a retrieve score adds, a view into the model."""
    weights = {}
    if (days := _half_lives(model)) and model.prior_weights is not None:
        weights = {f"prior of {day} days": model.prior_weights.data[place] for place, day in enumerate(days)}
    elif model.config.heads.prior:
        weights = {"prior": model.retrieve.beta.data}
    return weights if model.followers is None else weights | {"followers": model.followers.weights.data[0]}


def _half_lives(model: Recommender) -> tuple[float, ...]:
    """Those that are terms of their own: of a live prior, but where a rank head shares their weights; there the term is
    beta, which each head has."""
    live = model.config.live_prior
    return () if live is None or model.config.heads.rank else live.half_lives_days


@dataclass(frozen=True, eq=False)
class Contenders:
    """The items of each query that one factor may lift among the first ten, and the target.

    values float32 [N, 1 + T]: v T' and the terms; query int64 [N] ascending; earlier_row [N]: whether it comes before
    the target at equal scores; target int64 [Q]: its place among the N.
    """

    values: Floats
    query: NDArray[np.int64]
    earlier_row: NDArray[np.bool_]
    target: NDArray[np.int64]

    @classmethod
    def of(cls, scorer: ModelScorer, queries: Queries) -> "Contenders":
        users = max(1, min(USERS_AT_ONCE, AT_ONCE // len(scorer.tokens)))
        starts = track(range(0, len(queries), users), "calibrating")
        parts = [_of_some(scorer, queries.slice(at, at + users), at) for at in starts]
        values, query, earlier_row, is_target = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cls(values, query, earlier_row, np.flatnonzero(is_target))

    def gains(self, factors: Sequence[float]) -> NDArray[np.float64]:
        """NDCG@10 of each query [Q]."""
        scores = self.values @ np.array([1.0, *factors], np.float32)
        reached = scores[self.target][self.query]
        before = self.query[stands_before(scores, reached, self.earlier_row)]
        ranks = np.bincount(before, minlength=len(self.target))
        return ndcg(ranks.astype(np.int32), TOP)


def best_factors(contenders: Contenders) -> tuple[float, ...]:
    """One after the other, of equally good ones the nearest to 1."""
    factors = [1.0] * (contenders.values.shape[1] - 1)
    best = contenders.gains(factors).mean()
    nearest = sorted(FACTORS, key=lambda factor: abs(factor - 1))
    for _ in range(ROUNDS):
        before = best
        for place in range(len(factors)):
            for factor in nearest:
                tried = [*factors[:place], factor, *factors[place + 1 :]]
                found = contenders.gains(tried).mean()
                if found > best + SAME:
                    best, factors = found, tried
        if best == before:
            break
    return tuple(factors)


def _of_some(
    scorer: ModelScorer, queries: Queries, first: int
) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Values, queries counted from `first`, earlier_row and whether it is the target, of each contender."""
    terms = _terms(scorer, queries)
    base = mask_history(scorer.products(queries), queries.offsets, queries.rows, queries.targets)
    whole = base + sum(terms)
    in_reach = np.zeros(base.shape, np.bool_)
    extremes = min(FACTORS) - 1, max(FACTORS) - 1
    for probe in (whole, *(whole + change * term for term in terms for change in extremes)):
        kept = min(IN_REACH, probe.shape[1])
        in_reach |= probe >= np.partition(probe, -kept, axis=1)[:, -kept, None]
    in_reach &= np.isfinite(base)
    in_reach[np.arange(len(queries)), queries.targets] = True
    query, row = np.nonzero(in_reach)
    values = np.stack([part[query, row] for part in (base, *terms)], axis=1)
    target = queries.targets[query]
    return values, query + first, row < target, row == target


def _terms(scorer: ModelScorer, queries: Queries) -> list[Floats]:
    """Those of `weights_of`, each [Q, I]."""
    shape, model = (len(queries), len(scorer.tokens)), scorer.model
    terms: list[Tensor] = []
    if _half_lives(model) and isinstance(scorer.prior, ExactPrior):
        weighed = scorer.prior.features(scorer.times(queries)) * scorer.prior.weights.detach()
        terms = list((model.retrieve.beta.detach() * weighed).unbind(2))
    elif model.config.heads.prior:
        terms = [model.retrieve.beta.detach() * scorer.prior_at(queries)]
    found = [np.broadcast_to(term.float().cpu().numpy(), shape) for term in terms]
    if scorer.followers is None:
        return found
    return [*found, scorer.with_following(np.zeros(shape, np.float32), queries)]
