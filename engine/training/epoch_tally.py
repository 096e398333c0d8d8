"""What an epoch adds up to: its mean loss, its gradient norms, how much of its batches was padding."""

from dataclasses import dataclass
from typing import Any

from speeder_engine.training.batches import TrainingBatch


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

    def add_batch(self, batch: TrainingBatch, loss: float, num_targets: int) -> None:
        """`loss`: the mean over `num_targets` of `batch`."""
        self.loss += loss * num_targets
        self.num_targets += num_targets
        self.num_items += int(batch.lengths.sum())
        self.num_slots += batch.rows.numel()

    def add_step(self, norm: float) -> None:
        """`norm`: of the whole gradient, before it was clipped."""
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
