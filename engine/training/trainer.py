"""The staged training loop (MPO): each stage brings a modality in, keeps its best epoch and hands it to the next.

Between two epochs all state fits in a `TrainingState`: a run resumed from it goes on bit for bit as it would have.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from speeder_engine.checkpoint import TrainingState
from speeder_engine.models.prior import Prior
from speeder_engine.models.recommender import Recommender
from speeder_engine.progress import progress_bar
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.epoch_tally import EpochTally
from speeder_engine.training.finite import check_step
from speeder_engine.training.gradient import GradientMaker, groups
from speeder_engine.training.parallel import ALONE, Processes
from speeder_engine.training.run_log import RunLog
from speeder_engine.training.sampled import make_sampler
from speeder_engine.training.token_table import TokenTable
from speeder_engine.training.weights import Weights, load_moments, pack, unpack

COMPRESSED_AT_ONCE = 50_000  # items with all that the compressor computes between
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Validate = Callable[[Tensor], dict[str, float]]  # item tokens [I, d] -> metrics on the validation users


class Trainer:
    """Owns the optimizer and the loop; `model` and what learns in `table` are trained in place."""

    def __init__(
        self,
        model: Recommender,
        table: TokenTable,
        prior: Prior,
        batches: TrainingBatches,
        validate: Validate,
        config: TrainingConfig,
        log: RunLog,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.processes = config, processes
        self.device, self.model, self.table = DEVICE, model, table
        self.weights = Weights({"model": self.model, "table": self.table})
        counts = np.bincount(batches.histories.rows, minlength=batches.num_items)
        sampler = make_sampler(config, counts)
        cold = None if config.cold_negatives else torch.from_numpy(counts == 0)
        self.gradient = GradientMaker(self.model, self.table, prior, config, self.device, sampler, processes, cold)
        self.batches, self.validate, self.log = batches, validate, log
        self.history: list[dict[str, Any]] = []
        self.kept: dict[str, Any] = {}  # the record of the weights that are kept

    def run(self, state: TrainingState, save: Callable[[TrainingState], None]) -> list[dict[str, Any]]:
        """All stages from `state` on; `save` is called between epochs. Returns one record per epoch."""
        with progress_bar() as progress:
            while state.stage < len(self.config.stages):
                self._run_stage(self.config.stages[state.stage], state, save, progress)
                state.stage += 1
                state.epoch = state.step = state.bad_epochs = 0
                state.best, state.tensors = -1.0, {}
        return self.history

    def validate_untrained(self, state: TrainingState) -> None:
        """A record of epoch 0, for a model that has learned before: what the first stage must beat."""
        stage = self.config.stages[0]
        record = {"stage": stage.name, "epoch": 0, "step": 0}
        state.best = self._keep(record, state, self.tokens(self.share(stage, 1.0)))[self.config.metric]

    def validate_calibrated(self, state: TrainingState, tokens: Tensor, factors: dict[str, float]) -> None:
        """A record behind the last epoch's: of the model that is kept, its terms weighed anew by these factors."""
        record = {"stage": "calibration", "epoch": state.epochs_done, "step": 0, "factors": factors}
        self._keep(record, state, tokens, behind=1)

    def _keep(self, record: dict[str, Any], state: TrainingState, tokens: Tensor, behind: int = 0) -> dict[str, float]:
        """Validates the model as it is, between epochs, and keeps it with that record."""
        started = time.perf_counter()
        metrics = self.processes.agreed(self.validate(tokens), self.device)
        self._write(record | metrics | {"seconds": round(time.perf_counter() - started, 3)}, state, behind)
        self.kept = self.history[-1]
        return metrics

    def _run_stage(
        self, stage: Stage, state: TrainingState, save: Callable[[TrainingState], None], progress: Progress
    ) -> None:
        optimizer, schedule = self._optimizer(stage, state.step)
        best, averaged = self._restore(state, optimizer)
        task = progress.add_task(f"{stage.name} {' + '.join(stage.modalities)}", total=self._steps(stage), note="")
        progress.update(task, completed=state.step)
        while state.epoch < stage.epochs and state.bad_epochs < self.config.patience:
            started = time.perf_counter()
            tally = self._epoch(stage, state, optimizer, schedule, averaged, progress, task)
            with self.weights.replaced_by(averaged):
                metrics = self.processes.agreed(self.validate(self.tokens(self.share(stage, 1.0))), self.device)
                score = metrics[self.config.metric]
                better = score > state.best
                best = self.weights.copy() if better else best
            self._record(stage, state, tally, schedule.get_last_lr()[0], metrics, time.perf_counter() - started)
            self.kept = self.history[-1] if better else self.kept
            state.best, state.bad_epochs = (score, 0) if better else (state.best, state.bad_epochs + 1)
            progress.update(task, note=self._note(tally, score) + f" (best {state.best:.4f})")
            state.tensors = pack({"now": self.weights.copy(), "best": best, "averaged": averaged or {}}, optimizer)
            save(state)
        progress.update(task, completed=self._steps(stage))
        self.weights.load(best)

    def _epoch(
        self,
        stage: Stage,
        state: TrainingState,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        averaged: dict[str, Tensor] | None,
        progress: Progress,
        task: TaskID,
    ) -> EpochTally:
        """One pass over the training set."""
        self.model.train()
        self.table.train()
        # dropout, too, is resumed exactly
        seed = self.config.seed * 100_003 + state.epochs_done + 1_000_000_007 * self.processes.rank
        torch.manual_seed(seed % 2**63)
        tally = EpochTally()
        for group in groups(self.batches.epoch(state.epochs_done), self.config.accumulate):
            share = self.share(stage, state.step / max(self._steps(stage), 1))
            losses = self.gradient.backward(group, share, (state.epochs_done, state.step))
            norm = self.weights.gradient_norm()
            check_step(f"stage {stage.name}, step {state.step}", losses, float(norm), self.weights)
            self.weights.clip_gradients(self.config.max_grad_norm, norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if averaged is not None:
                self.weights.average_into(averaged, min(self.config.averaging, (1 + state.step) / (10 + state.step)))
            tally.add_step(losses, float(norm))
            state.step += 1
            progress.update(task, advance=1, note=self._note(tally, max(state.best, 0)))
        state.epoch += 1
        state.epochs_done += 1
        return tally

    def _note(self, tally: EpochTally, score: float) -> str:
        return f"loss {tally.mean_loss:.3f}  {self.config.metric} {score:.4f}"

    def tokens(self, share: Tensor) -> Tensor:
        """The item-token table [I, d], nothing dropped."""
        self.table.eval()
        if self.batches.num_items <= COMPRESSED_AT_ONCE:
            tokens: Tensor = self.table(share)
            return tokens
        parts = torch.split(torch.arange(self.batches.num_items, device=self.device), COMPRESSED_AT_ONCE)
        return torch.cat([self.table(share, part).detach() for part in parts])

    def share(self, stage: Stage, done: float) -> Tensor:
        """How far each modality has been brought in after `done` (0..1) of a stage: the newest one ramps up."""
        newest = 1.0 if not stage.ramp else min(1.0, done / stage.ramp)
        shares = dict.fromkeys(stage.modalities, 1.0) | {stage.modalities[-1]: newest}
        return torch.tensor([shares.get(name, 0.0) for name in self.model.compressor.modalities], device=self.device)

    def _steps(self, stage: Stage) -> int:
        return stage.epochs * -(-self.batches.batches_per_epoch // self.config.accumulate)

    def _optimizer(self, stage: Stage, step: int) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW and its cosine, `step` steps into the stage."""
        from transformers import get_cosine_schedule_with_warmup

        trained = list(self.weights.parameters.values())
        decayed = [p for p in trained if p.ndim >= 2]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        # sharded and whole parameters can't go through one kernel
        kernels = {"foreach": False} if self.weights.sharded else {"fused": True}
        optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), **kernels)
        for group in optimizer.param_groups:
            group["initial_lr"] = stage.learning_rate  # what a schedule that starts in the middle expects
        warmup, end = int(self.config.warmup * self._steps(stage)), int(1.05 * self._steps(stage))
        return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, end, last_epoch=step - 1)

    def _restore(
        self, state: TrainingState, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Puts a resumed stage's weights and moments in place; returns its best weights so far, and the averaged."""
        if state.tensors:
            self.weights.load(unpack(state.tensors, "now"))
            load_moments(optimizer, unpack(state.tensors, "optimizer"))
        known = unpack(state.tensors, "averaged")
        averaged = self.weights.placed(known) if known else self.weights.copy() if self.config.averaging else None
        return unpack(state.tensors, "best") or self.weights.copy(), averaged

    def _record(
        self,
        stage: Stage,
        state: TrainingState,
        tally: EpochTally,
        rate: float,
        metrics: dict[str, float],
        seconds: float,
    ) -> None:
        record = {"stage": stage.name, "epoch": state.epoch, "step": state.step, "loss": tally.mean_loss, **metrics}
        record |= {"learning_rate": rate, **tally.record(), "seconds": round(seconds, 3)}
        record["targets_per_second"] = round(tally.num_targets / seconds)
        self._write(record, state)

    def _write(self, record: dict[str, Any], state: TrainingState, behind: int = 0) -> None:
        self.history.append(record)
        self.log.write(record, state.epochs_done + behind)
