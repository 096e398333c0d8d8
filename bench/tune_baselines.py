"""Searches the settings of the tuned baselines by NDCG@10 on the validation queries; the test queries are never asked.

    python bench/tune_baselines.py DATA itemknn sasrec gru4rec hstu --out runs.jsonl --best DATA.json

One setting after another over the values below, the best kept, until a round changes nothing or `--rounds` are over.
Every run is a line of `--out` as soon as it is done; a run whose line is there is not run again. As each system ends,
its best is told, and kept in `--best`, which `study.py --baselines` reads.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from baseline_settings import write_settings
from commands import listed, refuse_unknown, run_command

from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import Queries, Split, leave_one_out
from speeder_engine.errors import ConfigError
from speeder_engine.evaluation.baselines.item_knn import ItemKNN, ItemKNNConfig
from speeder_engine.evaluation.baselines.sequence import SEQUENCE_MODELS, SequenceBaseline
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.scorer import Scorer
from speeder_engine.training.heap import keep_freed_memory

METRIC = "ndcg@10"
TRAINED = {"dropout": (0.3, 0.5), "learning_rate": (1e-3, 3e-3), "dim": (64, 128)}
AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "itemknn": {
        "window": (1, 2, 3, 5, 7, 10, 20, 50, None),
        "decay": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
        "alpha": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        "beta": (0.0, 0.25, 0.5, 0.75, 1.0),
        "last": (5, 10, 20, 50),
        "forward": (True, False),
    },
    "sasrec": TRAINED | {"num_layers": (1, 2)},
    "gru4rec": TRAINED | {"hidden_size": (128, 256)},
    "hstu": TRAINED | {"num_layers": (2, 4)},
}


@dataclass
class Log:
    """Runs done on `data`, a JSON line each: data, system, settings, seconds, validation metrics.

    Lines of other data may stand beside them.
    """

    path: Path
    data: str

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.runs = [run for run in map(json.loads, lines) if run["data"] == self.data]

    def of(self, system: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        return next((run for run in self.runs if run["system"] == system and run["settings"] == settings), None)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps({"data": self.data, **run}) + "\n")

    def best(self) -> dict[str, dict[str, Any]]:
        """The best run of each system that has one, with the number of its runs and the seconds that they took."""
        found = {}
        for system in dict.fromkeys(run["system"] for run in self.runs):
            runs = [run for run in self.runs if run["system"] == system]
            best = max(runs, key=lambda run: run[METRIC])
            told = {name: best[name] for name in ("settings", METRIC, "hr@10", "mrr")}
            found[system] = told | {"runs": len(runs), "seconds": round(sum(run["seconds"] for run in runs), 1)}
        return found


@dataclass(frozen=True)
class Search:
    """Of one system's settings: where it starts and how a scorer is made of them."""

    system: str
    start: Any
    fit: Callable[[Split, Any], Scorer]

    def run(self, split: Split, queries: Queries, log: Log, rounds: int, axes: dict[str, tuple[Any, ...]]) -> None:
        best, reached = self.start, self.measured(split, queries, log, self.start)
        for _ in range(rounds):
            before = best
            for name, values in axes.items():
                for value in values:
                    tried = replace(best, **{name: value})
                    found = self.measured(split, queries, log, tried)
                    if found > reached:
                        best, reached = tried, found
            if best == before:
                break

    def measured(self, split: Split, queries: Queries, log: Log, config: Any) -> float:
        known = log.of(self.system, asdict(config))
        if known is None:
            started = time.perf_counter()
            report = evaluate(self.fit(split, config), queries, None, show_progress=False)
            seconds = round(time.perf_counter() - started, 1)
            known = {"system": self.system, "settings": asdict(config), "seconds": seconds}
            known |= {name: round(report.metrics[name], 5) for name in (METRIC, "hr@10", "mrr")}
            log.add(known)
            print(json.dumps(known), flush=True)
        return float(known[METRIC])


def search_of(system: str) -> Search:
    if system == "itemknn":
        cosine = ItemKNNConfig(window=None, forward=False, alpha=0.5, beta=0.5, last=10, decay=1.0)
        return Search(system, cosine, lambda split, config: ItemKNN.fit(split.train, split.dataset.num_items, config))
    if system not in SEQUENCE_MODELS:
        raise ConfigError(f"no tuned baseline {system!r}; choose {', '.join(AXES)}")
    start = SEQUENCE_MODELS[system][1]
    return Search(system, start, lambda split, config: SequenceBaseline.fit(system, split, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data folder")
    parser.add_argument("systems", nargs="+", choices=list(AXES), metavar="SYSTEM", help=", ".join(AXES))
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; runs in it are not repeated")
    parser.add_argument("--best", type=Path, help="JSON: the best settings of each system in --out")
    parser.add_argument("--rounds", type=int, default=3, help="at most so many times through all settings")
    parser.add_argument("--axes", help="names of the settings to search, separated by commas; without it all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of the trained systems, at most, instead of their own")
    parser.add_argument("--patience", type=int, help="epochs without a better one that end them, instead of their own")
    arguments = parser.parse_args()
    named = listed(arguments.axes or "", ",")
    refuse_unknown("--axes", named, (axis for system in arguments.systems for axis in AXES[system]))
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    split = leave_one_out(load_dataset(arguments.data))
    queries, log = split.queries("validation"), Log(arguments.out, split.dataset.name)
    longer = {name: value for name in ("epochs", "patience") if (value := getattr(arguments, name)) is not None}
    for system in arguments.systems:
        search = search_of(system)
        if system in SEQUENCE_MODELS:
            search = replace(search, start=replace(search.start, **longer))
        axes = {name: values for name, values in AXES[system].items() if not named or name in named}
        search.run(split, queries, log, arguments.rounds, axes)
        best = log.best()
        print(json.dumps({"best": {"system": system, **best[system]}}), flush=True)
        if arguments.best is not None:
            write_settings(arguments.best, split.dataset, best)


if __name__ == "__main__":
    run_command(main)
