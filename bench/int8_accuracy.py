"""What bf16 and int8 cost in accuracy, on a trained engine and the data it was trained on.

python bench/int8_accuracy.py demo/engine DATA

Agreement: part of the ten best items, fp32's, that are among the ten best. Up to ties: an item that is missing counts
as agreed where fp32 has it no further above its tenth than twice what the other arithmetic moves scores by (root mean
square over that user's hundred best): between those two no order was right in the first place.
"""

import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy as np
import typer
from commands import run_command
from numpy.typing import NDArray
from report import Report

from speeder_engine import Engine
from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import Queries, leave_one_out
from speeder_engine.evaluation.engine_scorer import EngineScorer
from speeder_engine.evaluation.protocols import evaluate

Floats = NDArray[np.float32]
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32": {"dtype": "float32", "weights": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "weights": "int8"},
}
K, NEAR = 10, 100


def agreement(exact: Floats, other: Floats) -> tuple[float, float]:
    """Of one user's scores [I]: part of the ten best that both have, and the same up to ties."""
    best = np.argsort(-exact, kind="stable")[:NEAR]
    ours, theirs = best[:K], np.argsort(-other, kind="stable")[:K]
    moved = 2 * float(np.sqrt(np.mean((exact[best] - other[best]) ** 2)))
    missing = np.setdiff1d(ours, theirs)
    apart = missing[exact[missing] - exact[ours[-1]] > moved]
    return 1 - len(missing) / K, 1 - len(apart) / K


class KeptScorer(EngineScorer):
    """Keeps the scores that it gives, histories at the bottom."""

    def __init__(self, engine: Engine, item_ids: tuple[str, ...], name: str) -> None:
        super().__init__(engine, item_ids, name)
        self.kept: list[Floats] = []

    def scores(self, queries: Queries) -> Floats:
        found = super().scores(queries)
        hidden = found.copy()
        for q in range(len(queries)):
            hidden[q, queries.history(q)] = np.finfo(np.float32).min
        self.kept.append(hidden)
        return found


def main(
    engine: Annotated[Path, typer.Argument(help="an engine directory")],
    data: Annotated[Path, typer.Argument(help="the data folder it was trained on")],
) -> None:
    """A table, and one line of JSON last."""
    split = leave_one_out(load_dataset(data))
    queries = split.queries("test")
    lists = draw_candidates(split.dataset, queries)
    report, rows, exact = Report(), [], None
    for kind, settings in KINDS.items():
        with Engine.load(engine, device="cpu", **settings) as made:
            scorer = KeptScorer(made, split.dataset.item_ids, kind)
            metrics = evaluate(scorer, queries, lists).metrics
        scores = np.concatenate(scorer.kept)
        exact = scores if exact is None else exact
        raw, tied = np.mean([agreement(ours, theirs) for ours, theirs in zip(exact, scores, strict=True)], axis=0)
        figures = {"agreement": raw, "agreement_up_to_ties": tied}
        figures |= {name: metrics[name] for name in ("ndcg@10", "hr@10", "vhr@1")}
        for name, value in figures.items():
            report.put(f"{kind.replace(', ', '_')}_{name}", float(value))
        rows.append([kind, *(f"{value:.4f}" for value in figures.values())])
    columns = ("", "top 10 as fp32's", "up to ties", "NDCG@10", "HR@10", "VHR@1")
    report.table(f"{len(queries):,} test users, {split.dataset.num_items:,} items", columns, rows)
    report.show()


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
