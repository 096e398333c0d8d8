"""Systems that a model must beat. `BASELINES[name](split)` fits one.

Those of `COUNTED` and `TIMED` only count, in seconds; `TIMED` ones need the interactions' times, and of these all but
`popularity_at_last` the query's.
"""

from collections.abc import Callable
from functools import partial

from speeder_engine.data.splits import Histories, Split
from speeder_engine.evaluation.baselines.item_knn import ItemKNN
from speeder_engine.evaluation.baselines.markov import LastItemMarkov
from speeder_engine.evaluation.baselines.popularity import Popularity
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
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
BASELINES = COUNTED | TIMED | TRAINED
