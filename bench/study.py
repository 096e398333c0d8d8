"""The study of docs/results.md: trains, evaluates and writes docs/results/DATA.json.

    python bench/study.py DATA --work DIR systems            the models and all baselines, three seeds
    python bench/study.py DATA --work DIR ablations          one change of the declared model each
    python bench/study.py DATA --work DIR controls           images, order and length of histories, cold items
    python bench/study.py DATA --work DIR report --out docs/results/NAME.json

Baselines have the settings that were chosen on movietweetings-mm, or with `--baselines FILE.json` those that
tune_baselines.py has found on DATA.

Every run leaves its ranks in DIR as soon as it is done and is not done again: a stopped study goes on. The report takes
what is there. Two runs at a time, a thread each, unless told otherwise.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from baseline_settings import read_settings
from commands import end_with_parent, listed, refuse_unknown, run_command
from study_report import write_report
from study_runs import Run, do, prepare
from study_variants import COLD_ITEMS, DECLARED, VARIANTS, WITH_TIME

SINGLE = ("popularity", "popularity_at_last", "markov", "itemknn")
TIMED = ("recent_popularity", "recent_popularity_7", "live_popularity", "live_popularity_2")
TRAINED = ("sasrec", "gru4rec", "hstu", "sasrec_weeks", "sasrec_time")
CONTROLS = ("shuffled images", "noise images", *COLD_ITEMS)
MODELS = (DECLARED, WITH_TIME)


@dataclass(frozen=True)
class Plan:
    """What is run for a table, the most telling first."""

    table: str
    seeds: tuple[int, ...]
    only: tuple[str, ...] = ()  # systems and variants; none: all

    def wanted(self, recipe: str) -> Iterator[Run]:
        """Without changes that `recipe` has already."""
        for run in self.runs():
            named = not self.only or {run.system, run.variant} & {*self.only}
            if named and (self.table != "ablations" or VARIANTS[run.variant].changes(recipe)):
                yield run

    def runs(self) -> Iterator[Run]:
        if self.table == "systems":
            yield from (Run(name, name, 0) for name in (*SINGLE, *TIMED))
            for seed in self.seeds:
                yield from (Run("speeder", name, seed) for name in MODELS)
                yield from (Run(name, name, seed) for name in TRAINED)
        elif self.table == "ablations":
            changed = [name for name in VARIANTS if name not in (*MODELS, *CONTROLS)]
            yield from (Run("speeder", name, seed) for seed in self.seeds for name in changed)
        elif self.table == "controls":
            yield from (Run("speeder", name, seed) for seed in self.seeds for name in CONTROLS)


def study(data: Path, work: Path, plan: Plan, recipe: str, workers: int, baselines: Path | None) -> None:
    split = prepare(data, work)
    if baselines is not None:
        read_settings(baselines, split.dataset)  # what is wrong with it is said before anything is trained
    waiting = [run for run in plan.wanted(recipe) if not run.path(work).exists()]
    print(f"{plan.table}: {len(waiting)} runs to do", flush=True)
    spawned = get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, initializer=end_with_parent, max_tasks_per_child=1) as pool:
        started = {pool.submit(do, run, data, work, recipe, baselines): (run, time.perf_counter()) for run in waiting}
        for done in as_completed(started):
            run, since = started[done]
            found = {name: round(value, 4) for name, value in done.result().items()}
            print(json.dumps({"run": str(run), **found, "after_s": round(time.perf_counter() - since)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data folder")
    parser.add_argument("table", choices=("systems", "ablations", "controls", "report"))
    parser.add_argument("--work", type=Path, required=True, help="where runs leave their results")
    parser.add_argument("--out", type=Path, help="the JSON file of `report`")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--only", default="", help="systems and variants, separated by semicolons; without it all")
    parser.add_argument(
        "--recipe", default="study", help="of the declared model; its twin that knows the time: NAME-time"
    )
    parser.add_argument("--baselines", type=Path, help="settings of baselines, for the runs still to do")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.table == "report":
        if arguments.out is None:
            parser.error("report: name the file to write with --out")
        write_report(arguments.data, arguments.work, arguments.out)
        return
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    plan = Plan(arguments.table, seeds, tuple(listed(arguments.only)))
    refuse_unknown("--only", plan.only, (name for run in plan.runs() for name in (run.system, run.variant)))
    study(arguments.data, arguments.work, plan, arguments.recipe, arguments.workers, arguments.baselines)


if __name__ == "__main__":
    run_command(main)
