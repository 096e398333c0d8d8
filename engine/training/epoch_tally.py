"""What an epoch adds up to: its mean loss, its gradient norms, how much of its batches was padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speeder_engine.training.batches import TrainingBatch
from speeder_engine.training.losses import Losses


@dataclass
class EpochTally:
    """Sums over the steps of one epoch."""

    loss: float = 0.0  # sum over targets
    num_targets: int = 0
    norm: float = 0.0
    largest_norm: float = 0.0
    num_steps: int = 0
    num_items: int = 0
    num_slots: int = 0

    @property
    def mean_loss(self) -> float:
        return self.loss / self.num_targets

    def add_step(self, group: Sequence[TrainingBatch], losses: Losses, norm: float) -> None:
        """The batches of one step, their losses and the norm of the whole gradient, before it was clipped."""
        self.loss += float(losses.leading.detach()) * losses.num_targets
        self.num_targets += losses.num_targets
        self.num_items += sum(int(batch.lengths.sum()) for batch in group)
        self.num_slots += sum(batch.rows.numel() for batch in group)
        self.norm += norm
        self.largest_norm = max(self.largest_norm, norm)
        self.num_steps += 1

    def record(self) -> dict[str, Any]:
        """For the log; `padding` is the share of history slots that hold no item."""
        return {
            "gradient_norm": self.norm / max(self.num_steps, 1),
            "largest_gradient_norm": self.largest_norm,
            "padding": round(1 - self.num_items / max(self.num_slots, 1), 4),
        }
