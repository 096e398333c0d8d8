"""A step whose loss or gradient isn't finite stops the run; which tensor it began with is searched for only then."""

import math

from torch import Tensor

from speeder_engine.errors import SpeederError
from speeder_engine.training.losses import Losses
from speeder_engine.training.weights import Weights

REMEDY = "lower the stage's learning_rate, or check the feature vectors for extreme values"


def check_step(where: str, losses: Losses, norm: float, weights: Weights) -> None:
    """After `backward`, before clipping and the step; `norm`: of the whole gradient; `where`: stage and step.

    SpeederError names the parameter, else the loss, else the gradient that holds NaN or infinity.
    """
    total = float(losses.total.detach())
    if math.isfinite(total) and math.isfinite(norm):
        return
    # a bad parameter spoils every loss, a bad loss every gradient: causes come first
    found = weights.parameter_not_finite() or _loss_not_finite(losses) or weights.gradient_not_finite()
    raise SpeederError(f"{where}: {found or 'the norm of the gradient'} is not finite; {REMEDY}")


def _loss_not_finite(losses: Losses) -> str | None:
    each = {name: value for name, value in vars(losses).items() if isinstance(value, Tensor)}
    for name, value in each.items():
        if not math.isfinite(float(value.detach())):
            return f"the {name} loss"
    return None
