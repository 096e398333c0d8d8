"""The staged training loop (MPO): each stage brings a modality in, keeps its best epoch and hands it to the next.

Between two epochs all state fits in a `TrainingState`: a run resumed from it goes on bit for bit as it would have.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from speeder_engine.checkpoint import TrainingState
from speeder_engine.errors import MissingDependency, SpeederError
from speeder_engine.models.prior import Prior
from speeder_engine.models.recommender import Recommender
from speeder_engine.progress import progress_bar
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.losses import Losses, compute_losses
from speeder_engine.training.token_table import TokenTable
from speeder_engine.training.weights import Weights, load_moments, pack, unpack

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
        log: Path | None = None,
    ) -> None:
        try:
            from accelerate import Accelerator
        except ImportError:
            raise MissingDependency("accelerate", "train", "training") from None
        self.config = config
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device = self.accelerator.device
        self.model: Recommender = self.accelerator.prepare(model)
        self.table = table.to(self.device)
        self.weights = Weights({"model": self.model, "table": self.table})
        self.prior = prior
        self.batches, self.validate, self.log_path = batches, validate, log
        self.history: list[dict[str, Any]] = []

    def run(self, state: TrainingState, save: Callable[[TrainingState], None]) -> list[dict[str, Any]]:
        """All stages from `state` on; `save` is called between epochs. Returns one record per epoch."""
        with progress_bar() as progress:
            while state.stage < len(self.config.stages):
                self._run_stage(self.config.stages[state.stage], state, save, progress)
                state.stage += 1
                state.epoch = state.step = state.bad_epochs = 0
                state.best, state.tensors = -1.0, {}
        return self.history

    def _run_stage(
        self, stage: Stage, state: TrainingState, save: Callable[[TrainingState], None], progress: Progress
    ) -> None:
        optimizer, schedule = self._optimizer(stage, state.step)
        best, averaged = self._restore(state, optimizer)
        task = progress.add_task(f"{stage.name} {' + '.join(stage.modalities)}", total=self._steps(stage), note="")
        progress.update(task, completed=state.step)
        while state.epoch < stage.epochs and state.bad_epochs < self.config.patience:
            started = time.perf_counter()
            loss = self._epoch(stage, state, optimizer, schedule, averaged, progress, task)
            with self.weights.replaced_by(averaged):
                metrics = self.validate(self.tokens(self.share(stage, 1.0)))
                score = metrics[self.config.metric]
                better = score > state.best
                best = self.weights.copy() if better else best
            self._record(stage, state, loss, metrics, time.perf_counter() - started)
            state.best, state.bad_epochs = (score, 0) if better else (state.best, state.bad_epochs + 1)
            progress.update(task, note=f"loss {loss:.3f}  {self.config.metric} {score:.4f} (best {state.best:.4f})")
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
    ) -> float:
        """One pass over the training set; returns the mean of the leading loss."""
        self.model.train()
        self.table.train()
        torch.manual_seed(self.config.seed * 100_003 + state.epochs_done)  # dropout, too, is resumed exactly
        total = count = 0.0
        for batch in self.batches.epoch(state.epochs_done):
            share = self.share(stage, state.step / max(self._steps(stage), 1))
            losses = compute_losses(self.model, self.table(share), self.prior, batch.to(self.device), self.config)
            self._check_finite(losses, stage, state.step)
            self.accelerator.backward(losses.total)
            self.accelerator.clip_grad_norm_(self.weights.parameters.values(), self.config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if averaged is not None:
                self.weights.average_into(averaged, min(self.config.averaging, (1 + state.step) / (10 + state.step)))
            total += float(losses.leading.detach()) * losses.num_targets
            count += losses.num_targets
            state.step += 1
            progress.update(
                task, advance=1, note=f"loss {total / count:.3f}  {self.config.metric} {max(state.best, 0):.4f}"
            )
        state.epoch += 1
        state.epochs_done += 1
        return total / count

    def tokens(self, share: Tensor) -> Tensor:
        """The item-token table [I, d], nothing dropped."""
        self.table.eval()
        tokens: Tensor = self.table(share)
        return tokens

    def share(self, stage: Stage, done: float) -> Tensor:
        """How far each modality has been brought in after `done` (0..1) of a stage: the newest one ramps up."""
        newest = 1.0 if not stage.ramp else min(1.0, done / stage.ramp)
        shares = dict.fromkeys(stage.modalities, 1.0) | {stage.modalities[-1]: newest}
        return torch.tensor([shares.get(name, 0.0) for name in self.model.compressor.modalities], device=self.device)

    def _steps(self, stage: Stage) -> int:
        return stage.epochs * self.batches.batches_per_epoch

    def _optimizer(self, stage: Stage, step: int) -> tuple[torch.optim.Optimizer, Any]:
        """AdamW and its cosine, `step` steps into the stage."""
        from transformers import get_cosine_schedule_with_warmup

        trained = list(self.weights.parameters.values())
        decayed = [p for p in trained if p.ndim >= 2]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)
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
        averaged = unpack(state.tensors, "averaged") or (self.weights.copy() if self.config.averaging else None)
        return unpack(state.tensors, "best") or self.weights.copy(), averaged

    def _check_finite(self, losses: Losses, stage: Stage, step: int) -> None:
        for name in ("retrieve", "rank", "order", "title"):
            if not torch.isfinite(getattr(losses, name)):
                raise SpeederError(
                    f"stage {stage.name}, step {step}: the {name} loss is not finite; "
                    "lower the stage's learning_rate, or check the feature vectors for extreme values"
                )

    def _record(
        self, stage: Stage, state: TrainingState, loss: float, metrics: dict[str, float], seconds: float
    ) -> None:
        targets = self.batches.targets_per_epoch
        record = {"stage": stage.name, "epoch": state.epoch, "loss": loss, **metrics}
        record |= {"seconds": round(seconds, 3), "targets_per_second": round(targets / seconds)}
        self.history.append(record)
        if self.log_path is not None:
            with self.log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
