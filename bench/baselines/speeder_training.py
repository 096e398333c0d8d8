"""The package's own training step: a target at every position of a history of one-token items."""

import numpy as np
import torch
from baselines.training_run import Stepper, causal_lm, cycle, with_lora
from subject import Subject
from workload import make_users

from speeder_engine.data.splits import Histories
from speeder_engine.models.prior import ConstantPrior
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.losses import compute_losses

USERS = 256


class SpeederTraining:
    """`compute_losses` as the trainer runs it, all losses and the compressor over the whole catalogue included."""

    key, label = "speeder_training", "one token an item, a target at every position, LoRA"

    def __init__(self, subject: Subject, batch_size: int = 8) -> None:
        torch.manual_seed(subject.seed)
        workload, prompt = subject.workload, subject.config.prompt
        self.config = TrainingConfig(window=prompt.window, window_step=prompt.window_step, batch_size=batch_size)
        body = with_lora(causal_lm(subject).model, "FEATURE_EXTRACTION")
        self.model = Recommender(subject.config, body).to(subject.device).train()
        self.stepper = Stepper(self.model, subject)
        size, widths = subject.num_items, subject.config.compressor.modalities
        self.values = {name: torch.randn(size, width, device=subject.device) for name, width in widths.items()}
        self.present = torch.ones(size, len(widths), dtype=torch.bool, device=subject.device)
        self.prior = ConstantPrior(subject.catalogue.prior[:size].float())
        rows = [user.grown for user in make_users(USERS, size, workload, subject.seed)]
        offsets = np.arange(USERS + 1, dtype=np.int64) * (workload.history_len + 1)
        batches = TrainingBatches(Histories(offsets, np.concatenate(rows).astype(np.int32)), size, self.config)
        self.batches, self.device = cycle(batches.epoch), subject.device

    def step(self) -> int:
        """A target at every position of every history."""
        batch = next(self.batches).to(self.device)
        with self.stepper.autocast:
            tokens = self.model.compressor(self.values, self.present)
            losses = compute_losses(self.model, tokens, self.prior, batch, self.config)
        self.stepper.step(losses.total)
        return losses.num_targets
