"""The training losses, all out of one forward pass over one padded batch:

    [instruction] [history of L items] [C candidates, isolated] [two items of the history: which came first?]

An item is one row, or two where its position prompt is a row of its own before it.

retrieve: cross-entropy over the catalogue after the instruction and after every item. rank: cross-entropy over the
candidates, each seeing the first `cut` items and itself. order (SPAE): binary cross-entropy at the pair's second row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.models.prior import Prior, of_candidates
from speeder_engine.models.recommender import Recommender
from speeder_engine.prompt import isolated_mask
from speeder_engine.training.batches import PAD, TrainingBatch
from speeder_engine.training.config import TrainingConfig


@dataclass(frozen=True)
class Losses:
    retrieve: Tensor
    rank: Tensor
    order: Tensor
    total: Tensor
    num_targets: int


def compute_losses(
    model: Recommender,
    tokens: Tensor,
    prior: Prior,
    batch: TrainingBatch,
    config: TrainingConfig,
    log_inclusion: Tensor | None = None,
) -> Losses:
    """tokens [I, d]: the item-token table with its gradient. log_inclusion [I]: of items that stand for others too."""
    batch_size = len(batch)
    prompt = model.config.prompt
    num_prompt, step = len(prompt.instruction_ids), prompt.rows_per_item
    num_history = step * batch.rows.shape[1]
    hidden = model(*_inputs(model, tokens, batch, config))
    read = hidden[:, num_prompt - 1 : num_prompt + num_history : step]  # after the instruction, then after each item
    keep = batch.targets != PAD
    vectors = model.retrieve(read[keep])
    logits = vectors @ tokens.T + model.retrieve.beta * prior.at(batch.times[keep])
    if log_inclusion is not None:
        logits = logits.float() - log_inclusion
    retrieve = F.cross_entropy(logits.float(), batch.targets[keep], label_smoothing=config.label_smoothing)
    zero = retrieve.new_zeros(())
    rank = order = zero
    if config.rank_weight:
        last = read[torch.arange(batch_size, device=read.device), batch.cuts]
        at = num_prompt + num_history
        rank = _rank_loss(model, hidden[:, at : at + batch.candidates.shape[1]], last, tokens, prior, batch)
    if config.order_weight:
        order = _order_loss(model, hidden[:, -1], batch)
    total = retrieve + config.rank_weight * rank + config.order_weight * order
    return Losses(retrieve, rank, order, total, int(keep.sum()))


def _rank_loss(
    model: Recommender, hidden: Tensor, last: Tensor, tokens: Tensor, prior: Prior, batch: TrainingBatch
) -> Tensor:
    retrieved = torch.einsum("bd,bcd->bc", model.retrieve(last), tokens[batch.candidates])
    priors = of_candidates(prior.at(batch.times.gather(1, batch.cuts.unsqueeze(1)).squeeze(1)), batch.candidates)
    logits = model.rank(hidden, retrieved) + model.rank.beta * priors
    trained = batch.targets.gather(1, batch.cuts.unsqueeze(1)).squeeze(1) != PAD
    target = torch.where(trained, 0, PAD)  # the positive is always the first of the candidates
    return F.cross_entropy(logits.float(), target, ignore_index=PAD)


def _order_loss(model: Recommender, hidden: Tensor, batch: TrainingBatch) -> Tensor:
    logits = model.order(hidden).float()
    trained = batch.pairs[:, 0] != batch.pairs[:, 1]
    losses = F.binary_cross_entropy_with_logits(logits, batch.first_is_earlier, reduction="none")
    return (losses * trained).sum() / trained.sum().clamp_min(1)


def _inputs(
    model: Recommender, tokens: Tensor, batch: TrainingBatch, config: TrainingConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings [B, T, d], positions [B, T] and mask [B, 1, T, T] of the layout above."""
    prompt, device = model.config.prompt, batch.rows.device
    num_prompt, step = len(prompt.instruction_ids), prompt.rows_per_item
    dropped = F.dropout(tokens[batch.rows], config.token_dropout, model.training)
    parts = [model.instruction(len(batch)), model.history(dropped, batch.buckets)]
    num_prefix = num_prompt + step * batch.rows.shape[1]
    positions = [torch.arange(num_prefix, device=device).expand(len(batch), -1)]
    if config.rank_weight:
        candidates = F.dropout(tokens[batch.candidates], config.token_dropout, model.training)
        parts.append(candidates + model.prompts(batch.cuts).unsqueeze(1) + model.rank.role)
        positions.append((num_prompt + step * batch.cuts).unsqueeze(1).expand(-1, candidates.shape[1]))
    if config.order_weight:
        parts.append(tokens[batch.rows.gather(1, batch.pairs)] + model.order.roles)
        positions.append(num_prompt + step * batch.lengths.unsqueeze(1) + torch.arange(2, device=device))
    mask = None if len(parts) == 2 else _mask(batch, num_prompt, step, config)
    return torch.cat(parts, dim=1), torch.cat(positions, dim=1), mask


def _mask(batch: TrainingBatch, num_prompt: int, step: int, config: TrainingConfig) -> Tensor:
    """Candidates see the history up to their cut; the pair sees all of it, and its second row the first."""
    visible = []
    if config.rank_weight:
        visible.append((num_prompt + step * batch.cuts).unsqueeze(1).expand_as(batch.candidates))
    if config.order_weight:
        visible.append((num_prompt + step * batch.lengths).unsqueeze(1).expand_as(batch.pairs))
    mask = isolated_mask(num_prompt + step * batch.rows.shape[1], torch.cat(visible, dim=1))
    if config.order_weight:
        mask[..., -1, -2] = True
    return mask
