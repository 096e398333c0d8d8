"""Systems that a model must beat. `BASELINES[name](split)` fits one.

Those of `COUNTED` and `TIMED` only count, in seconds; those of `TRAINED` and `ENSEMBLES` take minutes. `TIMED` ones,
`sasrec_weeks` and `sasrec_time` need the interactions' times, of these all but `popularity_at_last` and `sasrec_weeks`
the query's, too.
"""

from collections.abc import Callable, Mapping
from functools import partial

from speeder_engine.data.splits import Histories, Split
from speeder_engine.evaluation.baselines.ensemble import Ensemble, Member
from speeder_engine.evaluation.baselines.item_knn import ItemKNN
from speeder_engine.evaluation.baselines.markov import LastItemMarkov
from speeder_engine.evaluation.baselines.popularity import Popularity
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
from speeder_engine.evaluation.baselines.sasrec_time import WEEK_MODELS
from speeder_engine.evaluation.baselines.sequence import SEQUENCE_MODELS, SequenceBaseline
from speeder_engine.evaluation.scorer import Scorer

Factory = Callable[[Split], Scorer]


def _counted(fit: Callable[[Histories, int], Scorer]) -> Factory:
    return lambda split: fit(split.train, split.dataset.num_items)


COUNTED: dict[str, Factory] = {
    "popularity": _counted(Popularity.fit),
    "markov": _counted(LastItemMarkov.fit),
    "itemknn": _counted(ItemKNN.fit),
}
TIMED: dict[str, Factory] = {
    "popularity_at_last": _counted(partial(RecentPopularity.fit, name="popularity_at_last", until="last")),
    "recent_popularity": _counted(RecentPopularity.fit),
    "recent_popularity_7": _counted(partial(RecentPopularity.fit, days=7, name="recent_popularity_7")),
    "live_popularity": RecentPopularity.fit_live,
    "live_popularity_2": partial(RecentPopularity.fit_live, days=2, name="live_popularity_2"),
}
TRAINED: dict[str, Factory] = {name: partial(SequenceBaseline.fit, name) for name in SEQUENCE_MODELS}
TRAINED |= {name: kind.fit for name, kind in WEEK_MODELS.items()}
SINGLE = COUNTED | TIMED | TRAINED


def fit_ensemble(name: str, split: Split, fitted: Mapping[str, Scorer] | None = None) -> Ensemble:
    """Of the systems between plus signs; those of `fitted` are not fitted again."""
    known = fitted or {}
    scorers = {each: known[each] if each in known else SINGLE[each](split) for each in name.split("+")}
    members = [Member(scorer, each not in TRAINED) for each, scorer in scorers.items()]
    return Ensemble.fit(name, members, split.queries("validation"))


ENSEMBLES: dict[str, Factory] = {
    name: partial(fit_ensemble, name)
    for name in (
        "sasrec+itemknn",
        "sasrec_weeks+itemknn",
        "sasrec+live_popularity+itemknn",
        "sasrec_time+live_popularity+itemknn",
    )
}
BASELINES = SINGLE | ENSEMBLES
