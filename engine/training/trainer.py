"""The staged training loop (MPO): each stage brings a modality in, keeps its best epoch and hands it to the next.

Between two epochs all state fits in a `TrainingState`: a run resumed from it goes on bit for bit as it would have.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID
from torch import Tensor

from speeder_engine.checkpoint import TrainingState
from speeder_engine.encoders.features import Features
from speeder_engine.errors import MissingDependency, SpeederError
from speeder_engine.models.recommender import Recommender
from speeder_engine.progress import progress_bar
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.config import Stage, TrainingConfig
from speeder_engine.training.losses import Losses, compute_losses

METRIC = "ndcg@10"
Validate = Callable[[Tensor], dict[str, float]]  # item tokens [I, d] -> metrics on the validation users


class Trainer:
    """Owns the optimizer and the loop; `model` is trained in place."""

    def __init__(
        self,
        model: Recommender,
        features: dict[str, Features],
        prior: Tensor,
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
        self.prior = prior.to(self.device)
        self.batches, self.validate, self.log_path = batches, validate, log
        names = model.compressor.modalities
        self.values = {name: torch.from_numpy(features[name].values).to(self.device) for name in names}
        present = [torch.from_numpy(features[name].present) for name in names]
        self.present = torch.stack(present, dim=1).to(self.device)
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
        best = self._restore(state, optimizer)
        task = progress.add_task(f"{stage.name} {' + '.join(stage.modalities)}", total=self._steps(stage), note="")
        progress.update(task, completed=state.step)
        while state.epoch < stage.epochs and state.bad_epochs < self.config.patience:
            started = time.perf_counter()
            loss = self._epoch(stage, state, optimizer, schedule, progress, task)
            metrics = self.validate(self.tokens(self.share(stage, 1.0)))
            self._record(stage, state, loss, metrics, time.perf_counter() - started)
            if metrics[METRIC] > state.best:
                state.best, state.bad_epochs, best = metrics[METRIC], 0, _snapshot(self.model)
            else:
                state.bad_epochs += 1
            progress.update(task, note=f"loss {loss:.3f}  {METRIC} {metrics[METRIC]:.4f} (best {state.best:.4f})")
            state.tensors = _pack(self.model, optimizer, best)
            save(state)
        progress.update(task, completed=self._steps(stage))
        self.model.load_state_dict(best, strict=False)

    def _epoch(
        self,
        stage: Stage,
        state: TrainingState,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        progress: Progress,
        task: TaskID,
    ) -> float:
        """One pass over the training set; returns the mean retrieve loss."""
        self.model.train()
        torch.manual_seed(self.config.seed * 100_003 + state.epochs_done)  # dropout, too, is resumed exactly
        total = count = 0.0
        for batch in self.batches.epoch(state.epochs_done):
            share = self.share(stage, state.step / max(self._steps(stage), 1))
            losses = compute_losses(
                self.model, self.tokens(share, drop=True), self.prior, batch.to(self.device), self.config
            )
            self._check_finite(losses, stage, state.step)
            self.accelerator.backward(losses.total)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += float(losses.retrieve.detach()) * losses.num_targets
            count += losses.num_targets
            state.step += 1
            progress.update(task, advance=1, note=f"loss {total / count:.3f}  {METRIC} {max(state.best, 0):.4f}")
        state.epoch += 1
        state.epochs_done += 1
        return total / count

    def tokens(self, share: Tensor, drop: bool = False) -> Tensor:
        """The item-token table [I, d], with modality dropout where `drop`."""
        present = self.present
        if drop and self.config.modality_dropout:
            present = present & (torch.rand(present.shape, device=present.device) >= self.config.modality_dropout)
        tokens: Tensor = self.model.compressor(self.values, present, share)
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

        trained = [p for p in self.model.parameters() if p.requires_grad]
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

    def _restore(self, state: TrainingState, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Puts a resumed stage's weights and moments in place; returns its best weights so far."""
        if not state.tensors:
            return _snapshot(self.model)
        self.model.load_state_dict(_part(state.tensors, "model."), strict=False)
        load_moments(optimizer, _part(state.tensors, "optimizer."))
        return _part(state.tensors, "best.")

    def _check_finite(self, losses: Losses, stage: Stage, step: int) -> None:
        for name in ("retrieve", "rank", "order"):
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


def _trained(model: Recommender) -> Iterable[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _snapshot(model: Recommender) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _trained(model)}


def _pack(model: Recommender, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = {f"model.{name}": p.detach() for name, p in _trained(model)}
    packed |= {f"best.{name}": value for name, value in best.items()}
    moments = optimizer.state_dict()["state"]
    packed |= {f"optimizer.{index}.{name}": value for index, each in moments.items() for name, value in each.items()}
    return packed


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_moments(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    """The inverse of how `_pack` flattens an optimizer's state."""
    nested: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        nested.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": nested})
