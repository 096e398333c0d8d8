"""Systems that a model must beat. `BASELINES[name](split)` fits one, to be asked the test's queries.

Those of `COUNTED` and `TIMED` only count, in seconds; those of `TRAINED` take minutes, and so do `ENSEMBLES`. `TIMED`
ones, `sasrec_weeks` and `sasrec_time` need the interactions' times, of these all but `popularity_at_last` and
`sasrec_weeks` the query's, too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from speeder_engine.data.splits import Histories, Part, Split
from speeder_engine.evaluation.baselines.ensemble import Ensemble, Member
from speeder_engine.evaluation.baselines.item_knn import ItemKNN
from speeder_engine.evaluation.baselines.markov import LastItemMarkov
from speeder_engine.evaluation.baselines.popularity import Popularity
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
from speeder_engine.evaluation.baselines.sasrec_time import WEEK_MODELS
from speeder_engine.evaluation.baselines.sequence import SEQUENCE_MODELS, SequenceBaseline
from speeder_engine.evaluation.scorer import Scorer


class Factory(Protocol):
    """`part`: whose queries it will be asked; of validation, live counts hide the test's events."""

    def __call__(self, split: Split, part: Part = "test") -> Scorer: ...


def _counted(fit: Callable[[Histories, int], Scorer]) -> Factory:
    return lambda split, part="test": fit(split.train, split.dataset.num_items)


def _trained(fit: Callable[[Split], Scorer]) -> Factory:
    return lambda split, part="test": fit(split)


def _live(days: float, name: str) -> Factory:
    return lambda split, part="test": RecentPopularity.fit_live(split, days, name, part)


COUNTED: dict[str, Factory] = {
    "popularity": _counted(Popularity.fit),
    "markov": _counted(LastItemMarkov.fit),
    "itemknn": _counted(ItemKNN.fit),
}
TIMED: dict[str, Factory] = {
    "popularity_at_last": _counted(partial(RecentPopularity.fit, name="popularity_at_last", until="last")),
    "recent_popularity": _counted(RecentPopularity.fit),
    "recent_popularity_7": _counted(partial(RecentPopularity.fit, days=7, name="recent_popularity_7")),
    "live_popularity": _live(14, "live_popularity"),
    "live_popularity_2": _live(2, "live_popularity_2"),
}
TRAINED: dict[str, Factory] = {name: _trained(partial(SequenceBaseline.fit, name)) for name in SEQUENCE_MODELS}
TRAINED |= {name: _trained(kind.fit) for name, kind in WEEK_MODELS.items()}
SINGLE = COUNTED | TIMED | TRAINED
# days that are tried for live popularity in an ensemble
LIVE_DAYS = (0.5, 1, 2, 4, 7, 14)


def fit_ensemble(name: str, split: Split, part: Part = "test", fitted: Mapping[str, Scorer] | None = None) -> Ensemble:
    """Of the systems between plus signs; those of `fitted` are not fitted again.

    Weights, and the days that live popularity looks back, are those with the best NDCG@10 on the validation queries,
    where it has not seen the test's events.
    """
    known, names = dict(fitted or {}), name.split("+")
    known |= {each: SINGLE[each](split, part) for each in names if each not in (*known, "live_popularity")}
    validation = split.queries("validation")
    choices = LIVE_DAYS if "live_popularity" in names else (None,)
    tried = {
        days: Ensemble.fit(name, _members(names, known, split, "validation", days), validation) for days in choices
    }
    chosen = max(tried, key=lambda days: tried[days].validated)
    return replace(tried[chosen], members=_members(names, known, split, part, chosen))


def _members(
    names: Sequence[str], known: Mapping[str, Scorer], split: Split, part: Part, days: float | None
) -> list[Member]:
    """`days`: how far live popularity looks back, where it is among them."""
    live = {} if days is None else {"live_popularity": _live(days, "live_popularity")(split, part)}
    scorers = {**known, **live}
    return [Member(scorers[each], each not in TRAINED) for each in names]


ENSEMBLES: dict[str, Factory] = {
    name: partial(fit_ensemble, name)
    for name in (
        "itemknn+live_popularity",
        "sasrec+itemknn",
        "sasrec_weeks+itemknn",
        "sasrec+live_popularity+itemknn",
        "sasrec_time+live_popularity+itemknn",
    )
}
BASELINES = SINGLE | ENSEMBLES
