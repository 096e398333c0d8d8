"""Cross-entropy over the whole catalogue, in the place of its scores.

    z = v T' + beta prior + gamma f;    loss = mean over rows of  log sum exp z - (1 - e) z_target - e mean z

One score matrix [N, I] is the largest thing that a training step holds, and on a CPU what it waits for: here it is
written once, turned into probabilities where it lies and into its own gradient in the backward pass, instead of being
copied at each of these steps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MOST_OF_DOT = 2**31 - 1  # elements that cuBLAS's inner product takes


def catalogue_loss(scores: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of `scores` float32 [N, I], which are overwritten, at `targets` int64 [N].

    As `F.cross_entropy(scores, targets, label_smoothing=smoothing)`, NaN for N = 0 too. A score may be -inf (an item
    that stands for nobody) where nothing is smoothed. Gradients of the first order only.
    """
    loss: Tensor = _CrossEntropy.apply(scores, targets, smoothing)  # type: ignore[no-untyped-call, unused-ignore]
    return loss


def add_scaled(scores: Tensor, factor: Tensor, values: Tensor) -> Tensor:
    """`scores` [N, I] += `factor` (a scalar that learns) times `values` [N, I] (which don't), in place."""
    added: Tensor = _AddScaled.apply(scores, factor, values)  # type: ignore[no-untyped-call, unused-ignore]
    return added


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        at = targets.unsqueeze(1)
        told = scores.gather(1, at).squeeze(1)
        if smoothing:
            told = (1 - smoothing) * told + smoothing * scores.mean(1)
        largest = scores.amax(1, keepdim=True)
        scores.sub_(largest).exp_()
        sums = scores.sum(1, keepdim=True)
        ctx.smoothing = smoothing
        # not through save_for_backward, which would find that the scores have changed: that is what is meant here
        ctx.kept = scores.detach(), sums, at
        return (sums.log() + largest).squeeze(1).sub_(told).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.kept is None:
            raise RuntimeError("catalogue_loss: its scores are its gradient now; compute the loss again")
        (found, sums, at), ctx.kept = ctx.kept, None
        each = gradient / len(at)
        found.mul_(each / sums)
        if ctx.smoothing:
            found.sub_(each * ctx.smoothing / found.shape[1])
        found.scatter_add_(1, at, (-each * (1 - ctx.smoothing)).expand_as(at))
        return found, None, None


class _AddScaled(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, factor: Tensor, values: Tensor) -> Tensor:
        ctx.mark_dirty(scores)
        ctx.save_for_backward(values)
        return scores.addcmul_(values, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (values,) = ctx.saved_tensors
        if gradient.numel() > MOST_OF_DOT:
            return gradient, torch.linalg.vecdot(gradient, values).sum(), None
        return gradient, torch.dot(gradient.flatten(), values.flatten()), None
