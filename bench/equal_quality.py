"""Time to equal quality: one token an item against titles in the prompt, both from scratch, on one thread each.

    python bench/equal_quality.py DATA --minutes 10 --out bench/results/equal_quality.json

The text run is LLaRA-style training: a prompt of the last ten titles, the next one as the answer, one target a prompt,
the same small decoder as the recipe's. Both are judged by VHR@1 on the same validation users' frozen lists: the text
run by its titles' likelihood, every few minutes of training time; Speeder after runs of growing length, each from
nothing, its encoders' and SASRec's fitting counted in. Judging is not counted.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from commands import run_command
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.data.candidates import CandidateLists, draw_candidates
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import Queries, Split, leave_one_out
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.files import write_json
from speeder_engine.title_text import TitleText, answer_text
from speeder_engine.training.backbone import instruction_ids, make_backbone, question_ids
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.fit import train
from speeder_engine.training.heap import keep_freed_memory
from speeder_engine.training.precision import autocast
from speeder_engine.training.recipe import load_recipe

HISTORY, BATCH, RATE = 10, 32, 2e-3
SORTED_TOGETHER = 16  # batches, so that prompts of like length stand together
CPU = torch.device("cpu")
Ids = tuple[int, ...]


class TextRun:
    """The recipe's decoder as a language model over titles."""

    def __init__(self, split: Split, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)
        self.split, self.precision = split, config.precision
        titles = [answer_text(title) for title in split.dataset.items.titles]
        body, tokenizer, _ = make_backbone(config.backbone, [config.instruction, config.question, *titles])
        self.body, text = body, TitleText(tokenizer.backend_tokenizer, cast(Any, body).config.vocab_size)
        self.answers = text.answers(titles)
        self.begin, self.question = (
            instruction_ids(tokenizer, config.instruction),
            question_ids(tokenizer, config.question),
        )
        self.optimizer = torch.optim.AdamW(self.body.parameters(), lr=RATE, weight_decay=0.05, fused=True)
        self.rng = np.random.default_rng(config.seed)
        self.targets = 0

    def prompt(self, history: NDArray[np.int32]) -> Ids:
        titles = [id_ for row in history[-HISTORY:].tolist() for id_ in self.answers[row]]
        return (*self.begin, *titles, *self.question)

    def train_for(self, seconds: float) -> float:
        """Trains until so many more seconds have passed; returns those that really did."""
        self.body.train()
        started = time.perf_counter()
        for batch in self.batches():
            with autocast(self.precision, CPU):
                loss = -self.log_likelihoods(*batch).sum() / sum(map(len, batch[1]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.body.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.targets += len(batch[0])
            if time.perf_counter() - started > seconds:
                break
        return time.perf_counter() - started

    def batches(self) -> Iterator[tuple[list[Ids], list[Ids]]]:
        """Prompts and answers of training events drawn at random, without an end."""
        train = self.split.train
        firsts = np.repeat(train.offsets[:-1], train.lengths)
        events = np.flatnonzero(np.arange(train.num_interactions) > firsts)
        while True:
            chosen = self.rng.choice(events, BATCH * SORTED_TOGETHER)
            pairs = [
                (self.prompt(train.rows[firsts[event] : event]), self.answers[train.rows[event]]) for event in chosen
            ]
            pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
            for start in self.rng.permutation(SORTED_TOGETHER) * BATCH:
                prompts, answers = zip(*pairs[start : start + BATCH], strict=True)
                yield list(prompts), list(answers)

    def log_likelihoods(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
        """[B]: of each answer after its prompt. Padding stands behind, where nothing sees it."""
        rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        asked = torch.zeros_like(ids, dtype=torch.bool)
        for b, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            ids[b, : len(row)] = torch.tensor(row)
            asked[b, len(row) - len(answer) : len(row)] = True
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        # the row before a token writes it
        read = hidden[:, :-1][asked[:, 1:]]
        logits = read @ self.body.get_input_embeddings().weight.T  # type: ignore[operator]
        found = -F.cross_entropy(logits.float(), ids[asked], reduction="none")
        return torch.zeros(len(rows)).index_add(0, torch.nonzero(asked)[:, 0], found)

    @torch.inference_mode()
    def vhr(self, queries: Queries, lists: CandidateLists) -> float:
        """The share of users whose target has the likeliest title of their list."""
        self.body.eval()
        right = 0
        for q in range(len(queries)):
            prompt = self.prompt(queries.history(q))
            answers = [self.answers[row] for row in lists.rows[q].tolist()]
            with autocast(self.precision, CPU):
                scores = self.log_likelihoods([prompt] * len(answers), answers)
            right += int(scores.argmax()) == int(lists.target_slot[q])
        return right / len(queries)


def text_curve(
    split: Split, config: TrainingConfig, asked: Queries, minutes: float, steps: int
) -> list[dict[str, float]]:
    run, lists, spent, curve = TextRun(split, config), draw_candidates(split.dataset, asked), 0.0, []
    for _ in range(steps):
        spent += run.train_for(60 * minutes / steps)
        curve.append({"seconds": round(spent, 1), "vhr@1": run.vhr(asked, lists), "targets": run.targets})
        print(json.dumps({"run": "titles in the prompt", **curve[-1]}), flush=True)
    return curve


def speeder_point(split: Split, config: TrainingConfig, asked: Queries) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        checkpoint = train(split, config, Path(folder) / "checkpoint")
        seconds = time.perf_counter() - started
        scorer = ModelScorer(checkpoint.model, checkpoint.item_tokens(), query_prior(checkpoint, split, "validation"))
        report = evaluate(scorer, asked, draw_candidates(split.dataset, asked), show_progress=False)
        epochs = sum(stage.epochs for stage in config.stages)
    return {
        "seconds": round(seconds, 1),
        "vhr@1": report.metrics["vhr@1"],
        "targets": epochs * split.train.num_interactions,
    }


def shorter(config: TrainingConfig, epochs: int) -> TrainingConfig:
    """All modalities at once for so many epochs."""
    stage = Stage("all", config.modalities, epochs, config.stages[-1].learning_rate)
    return replace(config, stages=(stage,), validation_users=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data folder")
    parser.add_argument("--minutes", type=float, default=10, help="of training with titles in the prompt")
    parser.add_argument("--steps", type=int, default=5, help="how often that is judged")
    parser.add_argument("--users", type=int, default=1000, help="validation users who judge")
    parser.add_argument("--recipe", default="study")
    parser.add_argument("--epochs", default="1,3", help="of Speeder's shorter runs; the recipe's own comes last")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    split = leave_one_out(load_dataset(arguments.data))
    config = load_recipe(arguments.recipe)
    users = np.random.default_rng(0).permutation(split.users)[: arguments.users]
    asked = split.queries("validation", np.sort(users))
    runs = [*(shorter(config, int(epochs)) for epochs in arguments.epochs.split(",")), config]
    speeder = []
    for each in runs:
        speeder.append(speeder_point(split, each, asked))
        print(json.dumps({"run": "one token an item", **speeder[-1]}), flush=True)
    text = text_curve(split, config, asked, arguments.minutes, arguments.steps)
    found = {"data": split.dataset.name, "users": len(asked), "speeder": speeder, "titles in the prompt": text}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, found)


if __name__ == "__main__":
    run_command(main)
