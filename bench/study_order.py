"""A made task whose answer lies in the order of early items: what position prompts and the order task are worth there.

    python bench/study_order.py --out docs/results/order.json [--fillers 20,80] [--seeds 0,1,2]

A history: two items of one pair in random order, two of another, `fillers` random items, then an item that says which
of the first pair came first (validation), and one that says it of the second pair (test). All else is alike: a model
blind to that order is right half the time. HR@1 over test users; shuffled: the same users, all items but the last in
random order.
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from commands import run_command
from study_runs import shuffled

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.items import Items
from speeder_engine.data.splits import Histories, Queries, Split
from speeder_engine.encoders.features import Features
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.evaluation.report import Report
from speeder_engine.evaluation.results import rows_of
from speeder_engine.files import write_json
from speeder_engine.runs import offsets_of
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.heap import keep_freed_memory
from speeder_engine.training.recipe import merged

PAIRS, FILLERS, WIDTH = 8, 40, 64
TRAINED_SHARE = 0.8
RECIPE: dict[str, Any] = {
    "instruction": "Next:",
    "window_step": 10,
    "backbone": {"vocab_size": 270, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 160},
    "stages": [{"name": "S1", "modalities": ["text"], "epochs": 12, "learning_rate": 2e-3}],
    "heads": {"rank": False},
    "rank_weight": 0,
    "order_weight": 0,
    "token_dropout": 0.0,
    "modality_dropout": 0.0,
    "batch_size": 64,
    "patience": 12,
}
VARIANTS: dict[str, Mapping[str, Any]] = {
    "no positions": {"positions": "none"},
    "added": {"positions": "added"},
    "token": {"positions": "token"},
    "order task alone": {"positions": "none", "order_weight": 0.1},
    "added + order task": {"positions": "added", "order_weight": 0.1},
}


def make_task(num_users: int, fillers: int, seed: int) -> Split:
    """Training users' histories whole; the others are asked. Items: pairs, fillers, two answers a pair."""
    rng = np.random.default_rng(seed)
    answers = 2 * PAIRS + FILLERS
    lines = []
    for _ in range(num_users):
        first, second = rng.choice(PAIRS, 2, replace=False)
        turned = rng.integers(0, 2, 2)
        keys = [
            2 * pair + (place ^ turn) for pair, turn in zip((first, second), turned, strict=True) for place in (0, 1)
        ]
        between = 2 * PAIRS + rng.integers(0, FILLERS, fillers)
        lines.append([*keys, *between, *(answers + 2 * np.array([first, second]) + turned)])
    num_items, length = answers + 2 * PAIRS, fillers + 6
    ids = tuple(f"{i:03d}" for i in range(num_items))
    vectors = {"text": Features(rng.normal(size=(num_items, WIDTH)).astype(np.float32), np.ones(num_items, np.bool_))}
    rows = np.array(lines, np.int32)
    users = tuple(f"u{user}" for user in range(num_users))
    lengths = np.full(num_users, length)
    data = Dataset("order", Items(ids, ids, ids, None, vectors), users, offsets_of(lengths), rows.ravel(), None)
    trained = round(TRAINED_SHARE * num_users)
    seen = offsets_of(np.where(np.arange(num_users) < trained, length, 0))
    return Split(data, Histories(seen, rows[:trained].ravel()), np.arange(trained, num_users, dtype=np.int32))


def measure(split: Split, overrides: Mapping[str, Any], seed: int) -> tuple[Report, Report]:
    """Test reports of the histories as they are, and shuffled."""
    window = int(split.dataset.lengths.max())
    config = TrainingConfig.from_json(merged({**RECIPE, "window": window, "seed": seed}, overrides))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = train(split, config, Path(folder) / "c")
    scorer = ModelScorer(checkpoint.model, checkpoint.item_tokens(), query_prior(checkpoint, split, "test"))
    asked = split.queries("test")
    answered: list[Queries] = [asked, shuffled(asked, seed)]
    as_is, mixed = (evaluate(scorer, each, None, show_progress=False) for each in answered)
    return as_is, mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--fillers", default="20,80", help="items between the pairs and the answers")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for fillers in map(int, arguments.fillers.split(",")):
        for name, overrides in VARIANTS.items():
            found = [
                measure(make_task(arguments.users, fillers, seed), overrides, seed)
                for seed in map(int, arguments.seeds.split(","))
            ]
            for what, reports in zip(("", ", shuffled"), zip(*found, strict=True), strict=True):
                made = rows_of(reports, "speeder", f"{name}, {fillers} between{what}")
                rows += [row for row in made if row["metric"] == "hr@1"]
                print(f"{name}, {fillers} between{what}: HR@1 {rows[-1]['mean']:.3f}", flush=True)
            write_json(arguments.out, {"data": "order", "rows": rows})


if __name__ == "__main__":
    run_command(main)
