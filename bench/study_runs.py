"""One run of the study: a system, a variant and a seed; trained, asked the test queries, its ranks kept in a file."""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline_settings import read_settings
from numpy.typing import NDArray
from study_variants import COLD_ITEMS, DECLARED, LONG_WINDOW, VARIANTS, WITH_TIME, cold_items, with_vectors

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import Queries, Split, leave_one_out
from speeder_engine.encoders.features import Features
from speeder_engine.evaluation.baselines import BASELINES, ENSEMBLES, fit_ensemble
from speeder_engine.evaluation.baselines.item_knn import ItemKNN
from speeder_engine.evaluation.baselines.sasrec_time import WEEK_MODELS
from speeder_engine.evaluation.baselines.sequence import SASREC, SEQUENCE_MODELS, SequenceBaseline
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.scorer import CatalogueScorer, Scorer
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.runs import offsets_of, ranges
from speeder_engine.training.features import make_features
from speeder_engine.training.fit import train
from speeder_engine.training.heap import keep_freed_memory
from speeder_engine.training.recipe import load_recipe

# of runs that are asked for the items held out of training alone
TARGETS, AMONG_THEMSELVES = "targets of ", "targets among themselves of "
CUT_SHORT = (DECLARED, LONG_WINDOW)  # asked with altered histories, too
SHUFFLED_TOO = ("itemknn",)  # a system that has no notion of order but how long ago an item was taken
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)  # of histories cut to their last items, up to the window


@dataclass(frozen=True)
class Run:
    system: str
    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.system}@{self.variant}@{self.seed}"

    def path(self, work: Path, extra: str = "") -> Path:
        return work / "reports" / f"{self}{extra and '@' + extra}.npz"


def prepare(data: Path, work: Path) -> Split:
    """The split, with the text and image vectors that all runs share."""
    split = leave_one_out(load_dataset(data))
    for name in ("text", "image"):
        path = work / f"{name}.safetensors"
        if not path.exists():
            config = load_recipe("study")
            alone = replace(config, stages=(replace(config.stages[0], modalities=(name,)),))
            work.mkdir(parents=True, exist_ok=True)
            make_features(split, alone, work / "cache").features[name].save(path)
        split = with_vectors(split, name, Features.load(path))
    return split


def do(run: Run, data: Path, work: Path, recipe: str, baselines: Path | None = None) -> dict[str, float]:
    """Leaves the run's reports in `work`; returns the test metrics. `baselines`: a file of their settings."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    split = prepare(data, work)
    (work / "reports").mkdir(exist_ok=True)
    if run.system == "speeder":
        return _speeder(run, split, work, recipe)
    settings = {} if baselines is None else read_settings(baselines, split.dataset)
    scorer = _baseline(run.system, split, run.seed, settings)
    neighbours = _baseline("itemknn", split, run.seed, settings)
    for name in (each for each in ENSEMBLES if each.split("+")[0] == run.system):
        fitted = {run.system: scorer, "itemknn": neighbours}
        _keep(Run(name, name, run.seed), fit_ensemble(name, split, fitted=fitted), split, work)
    if run.system in SHUFFLED_TOO:
        evaluate(scorer, shuffled(split.queries("test"), run.seed), None, show_progress=False).save(
            run.path(work, "shuffled")
        )
    return _keep(run, scorer, split, work)


def _baseline(system: str, split: Split, seed: int, settings: Mapping[str, Any]) -> Scorer:
    """With its settings of the search, where there are some; those of SASRec are also those of SASRec with weeks."""
    if system == "itemknn":
        return ItemKNN.fit(split.train, split.dataset.num_items, settings.get(system))
    if system in WEEK_MODELS:
        return WEEK_MODELS[system].fit(split, replace(settings.get("sasrec", SASREC), seed=seed))
    if system in SEQUENCE_MODELS:
        config = settings.get(system, SEQUENCE_MODELS[system][1])
        return SequenceBaseline.fit(system, split, replace(config, seed=seed))
    return BASELINES[system](split)


def _speeder(run: Run, split: Split, work: Path, recipe: str) -> dict[str, float]:
    variant = VARIANTS[run.variant]
    config = variant.config(recipe, run.seed)
    folder = work / "checkpoints" / str(run)
    trained_on = split if variant.alter is None else variant.alter(split, run.seed)
    train(trained_on, config, folder, cache_dir=work / "cache", resume=(folder / "checkpoint.json").exists())
    checkpoint = Checkpoint.load(folder)
    scorer = partial(ModelScorer, checkpoint.model, checkpoint.item_tokens())
    tested = scorer(query_prior(checkpoint, split, "test"))
    if run.variant in CUT_SHORT:
        asked = split.queries("test")
        for name, queries in _altered_queries(asked, run.seed, config.window):
            evaluate(tested, queries, None, show_progress=False).save(run.path(work, name))
        moved = shuffled(asked, run.seed, with_times=True)
        told = FollowingTold(scorer(query_prior(checkpoint, split, "test")), asked)
        evaluate(told, moved, None, show_progress=False).save(run.path(work, "shuffled for the decoder"))
    if run.variant in COLD_ITEMS:
        _keep_cold(run, scorer(ConstantPrior(torch.zeros(split.dataset.num_items))), split, work)
    validation = scorer(query_prior(checkpoint, split, "validation"))
    evaluate(validation, split.queries("validation"), None, show_progress=False).save(run.path(work, "validation"))
    found = _keep(run, tested, split, work)
    if run.variant not in (DECLARED, WITH_TIME):
        shutil.rmtree(folder)
    return found


def _keep_cold(run: Run, scorer: ModelScorer, split: Split, work: Path) -> None:
    """Targets held out of training by their tokens alone: prior and followers know that nobody has taken them yet."""
    scorer.followers = None
    cold, queries = cold_items(split.dataset.num_items), split.queries("test")
    asked = split.queries("test", queries.users[np.isin(queries.targets, cold)])
    _keep(Run(run.system, TARGETS + run.variant, run.seed), scorer, split, work, asked)
    among = evaluate(Among(scorer, cold), asked, None, show_progress=False)
    among.save(Run(run.system, AMONG_THEMSELVES + run.variant, run.seed).path(work))


@dataclass(frozen=True, eq=False)
class Among(CatalogueScorer):
    """A system's answers out of some items alone, rows [n]."""

    scorer: ModelScorer
    items: NDArray[np.int64]
    name = "speeder (some items)"

    @property
    def uses_time(self) -> bool:
        return self.scorer.uses_time

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = self.scorer.scores(queries)
        others = np.delete(np.arange(scores.shape[1]), self.items)
        scores[:, others] = -np.inf
        return scores


class FollowingTold(CatalogueScorer):
    """A model whose decoder is asked altered histories, while what followed is looked up for the true ones."""

    name = "speeder (altered for the decoder alone)"

    def __init__(self, scorer: ModelScorer, truth: Queries) -> None:
        self.scorer, self.decoder, self.truth = scorer, copy(scorer), truth
        self.decoder.followers = None

    @property
    def uses_time(self) -> bool:
        return self.scorer.uses_time

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """Of consecutive ones of the true queries, altered."""
        start = int(np.flatnonzero(self.truth.users == queries.users[0])[0])
        return self.scorer.with_following(self.decoder.scores(queries), self.truth.slice(start, start + len(queries)))


def _keep(run: Run, scorer: Scorer, split: Split, work: Path, queries: Queries | None = None) -> dict[str, float]:
    asked = queries or split.queries("test")
    report = evaluate(scorer, asked, draw_candidates(split.dataset, asked), show_progress=False)
    report.save(run.path(work), {"variant": run.variant, "seed": run.seed})
    return report.metrics


def _altered_queries(queries: Queries, seed: int, window: int) -> Iterator[tuple[str, Queries]]:
    """Histories shuffled but for their last item, and cut to their last few."""
    yield "shuffled", shuffled(queries, seed)
    for length in (length for length in LENGTHS if length <= window):
        starts = np.maximum(queries.offsets[1:] - length, queries.offsets[:-1])
        events = ranges(starts, queries.offsets[1:])
        times = None if queries.times is None else queries.times[events]
        offsets = offsets_of(queries.offsets[1:] - starts)
        yield f"last {length}", replace(queries, offsets=offsets, rows=queries.rows[events], times=times)


def shuffled(queries: Queries, seed: int, with_times: bool = False) -> Queries:
    """All items of a history but the last in another order. Their times stay, so that an item came at another's, or go
    with them."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(queries.rows))
    for start, end in pairwise(queries.offsets.tolist()):
        order[start : end - 1] = start + rng.permutation(max(end - start - 1, 0))
    moved = replace(queries, rows=queries.rows[order])
    return replace(moved, times=queries.times[order]) if with_times and queries.times is not None else moved
