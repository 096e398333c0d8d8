"""Systems side by side on one data folder: checkpoints, engine directories and baselines, by name."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from speeder_engine.artifact import MANIFEST as ENGINE_MANIFEST
from speeder_engine.checkpoint import MANIFEST as CHECKPOINT_MANIFEST
from speeder_engine.checkpoint import Checkpoint
from speeder_engine.checks import given_path
from speeder_engine.data.candidates import draw_candidates, frozen_candidates
from speeder_engine.data.columns import Columns
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import FROM_END, Part, Split, leave_one_out
from speeder_engine.engine import Engine
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines import BASELINES
from speeder_engine.evaluation.comparison import Comparison
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.generation_scorer import GenerationScorer
from speeder_engine.evaluation.groups import GROUPINGS, check_groupings
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.scorer import Scorer
from speeder_engine.forks import claim_threads

GENERATE = "generate"  # the literature's way: a title is written, and the candidate that has it is the answer
HEADS = ("retrieve", "rank", "title", GENERATE)
CHECKPOINT_HEADS = ("retrieve", "rank")


def compare(
    systems: Sequence[str],
    data: Path,
    *,
    part: str = "test",
    candidates: Path | None = None,
    min_interactions: int = 5,
    columns: Columns | None = None,
    head: str | None = None,
    by: Sequence[str] = (),
    against: str | None = None,
    num_negatives: int = 19,
) -> Comparison:
    """One report a system, all on the same queries and candidate lists.

    candidates: a file of frozen lists, drawn and written if it isn't there; None draws the same lists without keeping
    them. head: how checkpoints and engine directories answer those lists, one of `HEADS`, of `CHECKPOINT_HEADS` where
    there are checkpoints; None leaves it to them. by: names of GROUPINGS. against: the system that others are paired
    with, evaluated too where it isn't among `systems`. num_negatives: of a list; 0 leaves the lists out. Raises
    ConfigError for a system that is neither a folder of ours nor a baseline, and for a head that it hasn't.
    """
    claim_threads("evaluate")
    if head is not None and head not in HEADS:
        raise ConfigError(f"head: {head!r} is no way to answer; choose one of {', '.join(HEADS)}")
    if part not in FROM_END:
        raise ConfigError(f"part: {part!r}; choose {' or '.join(FROM_END)}")
    if num_negatives == 0 and (candidates is not None or head is not None):
        raise ConfigError("negatives: 0 leaves candidate lists out; leave out `candidates` and `head`, too")
    check_groupings(by)
    systems = list(dict.fromkeys([*systems, *([] if against is None else [against])]))
    for system in systems:
        _check_system(system, head)
    split = leave_one_out(load_dataset(data, columns=columns, min_interactions=min_interactions))
    asked: Part = "test" if part == "test" else "validation"
    queries = split.queries(asked)
    lists = None
    if candidates is not None:
        lists = frozen_candidates(candidates, split.dataset, queries, num_negatives=num_negatives)
    elif num_negatives:
        lists = draw_candidates(split.dataset, queries, num_negatives=num_negatives)
    # a scorer goes before the next is made: only one model is in memory at a time
    reports = [evaluate(make_scorer(system, split, asked, head), queries, lists) for system in systems]
    return Comparison.of(reports, [GROUPINGS[name](split, queries) for name in by], against)


def print_comparison(comparison: Comparison) -> None:
    Console().print(*comparison.tables(), sep="\n")


def _check_system(system: str, head: str | None) -> None:
    path = given_path(system, "system", "a checkpoint or an engine directory")
    if system not in BASELINES and not any((path / name).is_file() for name in (ENGINE_MANIFEST, CHECKPOINT_MANIFEST)):
        known = ", ".join(BASELINES)
        raise ConfigError(f"{system}: neither a checkpoint nor an engine directory nor a baseline ({known})")
    if head not in (None, *CHECKPOINT_HEADS) and (path / CHECKPOINT_MANIFEST).is_file() and system not in BASELINES:
        instead = f"a checkpoint answers by {' or '.join(CHECKPOINT_HEADS)}; export it with 'speeder export engine'"
        raise ConfigError(f"{system}: head {head!r} takes an engine directory, {instead}")


def make_scorer(system: str, split: Split, part: Part, head: str | None = None) -> Scorer:
    """Loaded, or fitted."""
    dataset, path = split.dataset, Path(system)
    if system in BASELINES:
        return BASELINES[system](split, part)
    if (path / ENGINE_MANIFEST).is_file():
        # lists are as long as they are asked for: there is nobody else whom one could keep waiting
        engine = Engine.load(path, kv_budget="0", max_candidates=dataset.num_items)
        if head == GENERATE:
            return GenerationScorer(engine, dataset.item_ids, name=system)
        return EngineScorer(engine, dataset.item_ids, name=system, head=head)  # type: ignore[arg-type]
    checkpoint = Checkpoint.load(path)
    if checkpoint.table.item_ids != dataset.item_ids:
        raise DataError(f"{path}: was trained on other items than {dataset.name} has; evaluate on its own data")
    prior = query_prior(checkpoint, split, part)
    return ModelScorer(checkpoint.model, checkpoint.item_tokens(), prior, name=system, head=head)
