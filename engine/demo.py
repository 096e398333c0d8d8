"""`speeder demo`: the whole path on a small made catalogue or on a data folder, trained anew each time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from speeder_engine.data.candidates import CandidateLists, frozen_candidates
from speeder_engine.data.columns import Columns
from speeder_engine.data.dataset import Dataset, load_dataset
from speeder_engine.data.splits import Queries, Split, leave_one_out
from speeder_engine.engine import Engine
from speeder_engine.errors import ConfigError, name_some
from speeder_engine.evaluation.baselines import COUNTED, TIMED
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.report import Report
from speeder_engine.evaluation.report_table import report_table
from speeder_engine.export.engine_directory import export_engine
from speeder_engine.synthetic import write_synthetic_dataset
from speeder_engine.tables import latency_table, recommendation_table
from speeder_engine.training.fit import train
from speeder_engine.training.recipe import load_recipe

CATALOGUE = {"interactions.csv", "items.jsonl", "covers.zip"}
NUM_SHOWN = 3
NUM_TIMED = 200
NUM_CANDIDATES = 20


@dataclass
class Steps:
    """Names and times the demo's steps."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def table(self) -> Table:
        table = Table("step", "seconds")
        table.columns[1].justify = "right"
        for name, seconds in self.seconds.items():
            table.add_row(name, f"{seconds:.1f}")
        table.add_section()
        table.add_row("all", f"{sum(self.seconds.values()):.1f}")
        return table


def run_demo(data: Path | None, out: Path, recipe: str | None = None, columns: Columns | None = None) -> None:
    """Writes `out`/checkpoint, `out`/engine and, without `data`, `out`/catalogue; prints tables on stdout."""
    console = Console()
    steps = Steps(console)
    with steps.step("data"):
        dataset = load_dataset(data, columns=columns) if data else load_dataset(make_catalogue(out / "catalogue"))
        console.print(dataset.summary(), markup=False, highlight=False)
        split = leave_one_out(dataset)
    checkpoint, engine_dir = out / "checkpoint", out / "engine"
    with steps.step("training"):
        config = load_recipe(recipe or ("demo" if data is None else "demo-data"))
        train(split, config, checkpoint, cache_dir=out / "features")
    with steps.step("export"):
        parts = export_engine(checkpoint, engine_dir)
        found = f"engine {parts.revision} with {len(parts.catalogue):,} items in {engine_dir}"
        console.print(found, markup=False, highlight=False)
    with steps.step("recommendations"):
        engine = Engine.load(engine_dir)
        queries = split.queries("test")
        # named by the data, so that runs on other data can share the folder
        lists = frozen_candidates(out / f"candidates-{dataset.fingerprint()[:12]}.parquet", dataset, queries)
        show_users(console, engine, dataset, queries)
    with steps.step("latency"), one_thread():
        console.print(latency_table(time_requests(engine, dataset, queries)))
    with steps.step("accuracy on the test items"):
        console.print(report_table(measure(engine, split, queries, lists)))
    console.rule("[bold]time")
    console.print(steps.table())


def make_catalogue(folder: Path) -> Path:
    """Writes the made catalogue, over an earlier one; ConfigError where `folder` holds anything else."""
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in CATALOGUE) if folder.is_dir() else []
    if foreign:
        raise ConfigError(f"{folder}: holds {name_some(foreign)}, which no demo wrote; choose another --out")
    return write_synthetic_dataset(folder)


def show_users(console: Console, engine: Engine, dataset: Dataset, queries: Queries) -> None:
    """Three users with histories of middling length: what they took, what the engine recommends."""
    lengths = np.diff(queries.offsets)
    for q in np.argsort(np.abs(lengths - 10), kind="stable")[:NUM_SHOWN].tolist():
        history = [dataset.item_ids[row] for row in queries.history(q)]
        times = queries.history_times(q) if engine.parts.config.prompt.calendar is not None else None
        ranking = engine.recommend(history, k=10, times=None if times is None else times.tolist())
        target = dataset.items.titles[queries.targets[q]]
        console.print(
            recommendation_table(f"user {dataset.user_ids[queries.users[q]]}", history, ranking, engine.catalogue)
        )
        console.print(f"took next: {target}", markup=False, highlight=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small loses more by waking a second thread than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def time_requests(engine: Engine, dataset: Dataset, queries: Queries) -> dict[str, list[float]]:
    """Seconds a request, the kinds of request interleaved user by user."""
    rng = np.random.default_rng(0)
    timings: dict[str, list[float]] = {
        "cold user": [],
        "warm session, one new item": [],
        "warm session, nothing new": [],
        f"warm session, {NUM_CANDIDATES} candidates ranked": [],
    }
    cold, appended, repeated, ranked = timings.values()
    for q in rng.permutation(len(queries))[: NUM_TIMED + 10].tolist():
        history = [dataset.item_ids[row] for row in queries.history(q)]
        few = rng.choice(dataset.num_items, min(NUM_CANDIDATES, dataset.num_items), replace=False)
        candidates = [dataset.item_ids[row] for row in few]
        user = f"timed {q}"
        cold.append(_seconds(lambda h=history: engine.recommend(h)))  # type: ignore[misc]
        engine.recommend(history[:-1], user_id=user)
        appended.append(_seconds(lambda h=history, u=user: engine.recommend(h, user_id=u)))  # type: ignore[misc]
        repeated.append(_seconds(lambda h=history, u=user: engine.recommend(h, user_id=u)))  # type: ignore[misc]
        ranked.append(
            _seconds(lambda h=history, u=user, c=candidates: engine.recommend(h, user_id=u, candidates=c))  # type: ignore[misc]
        )
        engine.close_session(user)
    return {name: seconds[10:] or seconds for name, seconds in timings.items()}  # the first ones warm the machine up


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(engine: Engine, split: Split, queries: Queries, lists: CandidateLists) -> list[Report]:
    """The engine beside the baselines that take no training, on the same queries and lists."""
    systems = [EngineScorer(engine, split.dataset.item_ids)]
    counted = COUNTED if split.train.times is None else COUNTED | TIMED
    baselines = [fit(split) for fit in counted.values()]
    return [evaluate(system, queries, lists) for system in [*systems, *baselines]]
