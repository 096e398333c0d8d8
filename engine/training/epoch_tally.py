"""What an epoch adds up to: its mean loss, its gradient norms, how much of its batches was padding."""

from dataclasses import dataclass
from typing import Any

from speeder_engine.training.losses import Losses


@dataclass
class EpochTally:
    """Sums over the steps of one epoch."""

    loss: float = 0.0  # sum over targets
    num_targets: int = 0
    norm: float = 0.0
    largest_norm: float = 0.0
    num_steps: int = 0
    num_rows: int = 0
    padding: int = 0

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.num_targets, 1)

    def add_step(self, losses: Losses, norm: float) -> None:
        """The losses of one step and the norm of its whole gradient, before it was clipped."""
        self.loss += float(losses.leading.detach()) * losses.num_targets
        self.num_targets += losses.num_targets
        self.num_rows += losses.num_rows
        self.padding += losses.padding
        self.norm += norm
        self.largest_norm = max(self.largest_norm, norm)
        self.num_steps += 1

    def record(self) -> dict[str, Any]:
        """For the log; `padding` is the share of the backbone's rows that nobody reads."""
        return {
            "gradient_norm": self.norm / max(self.num_steps, 1),
            "largest_gradient_norm": self.largest_norm,
            "padding": round(self.padding / max(self.num_rows, 1), 4),
        }
