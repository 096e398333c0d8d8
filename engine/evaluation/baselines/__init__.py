"""Classical systems that anything learned must beat. Each is fitted as `factory(train, num_items)`."""

from collections.abc import Callable

from speeder_engine.data.splits import Histories
from speeder_engine.evaluation.baselines.markov import LastItemMarkov
from speeder_engine.evaluation.baselines.popularity import Popularity
from speeder_engine.evaluation.baselines.recent_popularity import RecentPopularity
from speeder_engine.evaluation.scorer import Scorer

BASELINES: dict[str, Callable[[Histories, int], Scorer]] = {
    "popularity": Popularity.fit,
    "markov": LastItemMarkov.fit,
    "recent_popularity": RecentPopularity.fit,
}
