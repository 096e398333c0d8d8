"""The training losses, all out of one forward pass over one padded batch:

    [instruction] [history of L items] [C candidates, isolated] [K titles] [two items of the history: which came first?]

With `packing`, segments stand side by side in rows without padding while the backbone runs (`packing.py`).

An item is one row, or two where its position prompt is a row of its own before it.

retrieve: cross-entropy over the catalogue after the instruction and after every item. rank: cross-entropy over the
candidates, each seeing the first `cut` items and itself. title: cross-entropy over the vocabulary (`title_loss.py`).
order (SPAE): binary cross-entropy at the pair's second row.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.config import PromptConfig
from speeder_engine.models.prior import Prior, of_candidates
from speeder_engine.models.recommender import Recommender
from speeder_engine.prompt import isolated_mask
from speeder_engine.training.batches import PAD, TrainingBatch
from speeder_engine.training.catalogue_loss import add_scaled, catalogue_loss
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.packing import Packing, packed_forward
from speeder_engine.training.title_loss import TitleRows, title_loss, title_rows


@dataclass(frozen=True)
class Losses:
    """Means over their own targets; zero where a loss has no weight."""

    retrieve: Tensor
    rank: Tensor
    order: Tensor
    title: Tensor
    total: Tensor
    num_targets: int  # of the leading loss
    leads: str = "retrieve"  # what a log shows; "title" in a run that trains no retrieve head
    num_rows: int = 0  # that the backbone has computed
    padding: int = 0  # how many of those are nobody's

    @property
    def leading(self) -> Tensor:
        value: Tensor = getattr(self, self.leads)
        return value


@dataclass(frozen=True)
class Layout:
    """Which of a pass's rows are what; the slices behind the history are empty where nothing stands there."""

    num_prompt: int  # rows of the instruction
    step: int  # rows of an item
    num_prefix: int  # instruction and history, padding in it
    candidates: slice
    titles: slice
    pair: slice

    @classmethod
    def of(cls, prompt: PromptConfig, batch: TrainingBatch, config: TrainingConfig, titles: TitleRows | None) -> Self:
        num_prompt, step = len(prompt.instruction_ids), prompt.rows_per_item
        num_prefix = num_prompt + step * batch.rows.shape[1]
        num_candidates = batch.candidates.shape[1] if config.rank_weight else 0
        num_titles = 0 if titles is None else titles.positions.shape[1]
        ends = [*accumulate((num_candidates, num_titles, 2 if config.order_weight else 0), initial=num_prefix)]
        return cls(num_prompt, step, num_prefix, *(slice(start, stop) for start, stop in pairwise(ends)))

    @property
    def read(self) -> slice:
        """After the instruction, then after each item."""
        return slice(self.num_prompt - 1, self.num_prefix, self.step)

    def rows_before(self, items: Tensor) -> Tensor:
        """How many rows stand before what follows so many items."""
        return self.num_prompt + self.step * items

    def real(self, lengths: Tensor) -> Tensor:
        """bool [B, T]: all rows but the history's padding."""
        columns = torch.arange(self.pair.stop, device=lengths.device)
        return (columns < self.rows_before(lengths).unsqueeze(1)) | (columns >= self.num_prefix)


def compute_losses(
    model: Recommender,
    tokens: Tensor,
    prior: Prior,
    batch: TrainingBatch,
    config: TrainingConfig,
    log_inclusion: Tensor | None = None,
    items: Tensor | None = None,
) -> Losses:
    """tokens [I, d]: the item-token table with its gradient. log_inclusion [I]: of items that stand for others too,
    infinite for those that stand for nobody. items [I]: the catalogue's rows that `tokens` and the batch are of, where
    they aren't all."""
    titles = title_rows(model, batch.title_cuts, batch.titles) if config.title_weight else None
    layout = Layout.of(model.config.prompt, batch, config, titles)
    inputs = _inputs(model, tokens, batch, config, layout, titles)
    real = layout.real(batch.lengths)
    packing = Packing.of(real) if config.packing else None
    hidden = model(*inputs) if packing is None else packed_forward(model, packing, *inputs)
    read = hidden[:, layout.read]
    retrieve = rank = order = title = hidden.new_zeros(())
    following = _following(model, batch, items)
    if config.retrieve_weight:
        scores = _scores(model, read[batch.trained], tokens, prior, batch, following, log_inclusion)
        retrieve = catalogue_loss(scores, batch.targets[batch.trained], config.label_smoothing)
    if config.rank_weight:
        last = read[torch.arange(len(batch), device=read.device), batch.cuts]
        rank = _rank_loss(model, hidden[:, layout.candidates], last, tokens, prior, batch, following)
    if titles is not None:
        title = title_loss(model, hidden[:, layout.titles], batch.titles)
    if config.order_weight:
        order = _order_loss(model, hidden[:, layout.pair][:, 1], batch)
    total = config.retrieve_weight * retrieve + config.rank_weight * rank + config.order_weight * order
    total = total + config.title_weight * title
    leads, counted = ("retrieve", batch.trained) if config.retrieve_weight else ("title", batch.titles != PAD)
    num_rows = real.numel() if packing is None else packing.num_places
    padding = num_rows - int(real.sum())
    return Losses(retrieve, rank, order, title, total, int(counted.sum()), leads, num_rows, padding)


def _scores(
    model: Recommender,
    read: Tensor,
    tokens: Tensor,
    prior: Prior,
    batch: TrainingBatch,
    following: Tensor | None,
    log_inclusion: Tensor | None,
) -> Tensor:
    """[N, I] of the items of `tokens` after each of the N rows `read` [N, d]."""
    scores: Tensor = (model.retrieve(read) @ tokens.T).float()
    scores = scores.add_(model.retrieve.beta * prior.at(batch.times[batch.trained]))
    if model.followers is not None and following is not None:
        scores = add_scaled(scores, model.followers.retrieve, following)
    return scores if log_inclusion is None else scores - log_inclusion


def _following(model: Recommender, batch: TrainingBatch, items: Tensor | None) -> Tensor | None:
    """f [N, I] of the batch's targets without the segments' own pairs; of some segments nothing."""
    if model.followers is None:
        return None
    found = model.followers.along(batch.rows, batch.targets, items)
    dropout = model.followers.config.dropout if model.training else 0.0
    if not dropout:
        return found
    segments = batch.trained.nonzero()[:, 0]
    return found * (torch.rand(len(batch), 1, device=found.device) >= dropout)[segments]


def _rank_loss(
    model: Recommender,
    hidden: Tensor,
    last: Tensor,
    tokens: Tensor,
    prior: Prior,
    batch: TrainingBatch,
    following: Tensor | None,
) -> Tensor:
    retrieved = torch.einsum("bd,bcd->bc", model.retrieve(last), tokens[batch.candidates])
    priors = of_candidates(prior.at(batch.times.gather(1, batch.cuts.unsqueeze(1)).squeeze(1)), batch.candidates)
    logits = model.rank(hidden, retrieved) + model.rank.beta * priors
    trained = batch.trained.gather(1, batch.cuts.unsqueeze(1)).squeeze(1)
    if model.followers is not None and following is not None:
        places = batch.trained.flatten().cumsum(0).view_as(batch.targets) - 1
        at_cuts = following[places.gather(1, batch.cuts.unsqueeze(1)).clamp_min(0)]  # [B, 1, I]; any, if not trained
        logits = logits + model.followers.rank * at_cuts.squeeze(1).gather(1, batch.candidates)
    target = torch.where(trained, 0, PAD)  # the positive is always the first of the candidates
    return F.cross_entropy(logits.float(), target, ignore_index=PAD)


def _order_loss(model: Recommender, hidden: Tensor, batch: TrainingBatch) -> Tensor:
    logits = model.order(hidden).float()
    trained = batch.pairs[:, 0] != batch.pairs[:, 1]
    losses = F.binary_cross_entropy_with_logits(logits, batch.first_is_earlier, reduction="none")
    return (losses * trained).sum() / trained.sum().clamp_min(1)


def _inputs(
    model: Recommender,
    tokens: Tensor,
    batch: TrainingBatch,
    config: TrainingConfig,
    layout: Layout,
    titles: TitleRows | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings [B, T, d], positions [B, T] and mask [B, 1, T, T]."""
    device = batch.rows.device
    dropped = F.dropout(tokens[batch.rows], config.token_dropout, model.training)
    parts = [model.instruction(len(batch)), model.history(dropped, batch.buckets)]
    positions = [torch.arange(layout.num_prefix, device=device).expand(len(batch), -1)]
    visible = []  # of the prefix, by what stands behind it
    if config.rank_weight:
        candidates = F.dropout(tokens[batch.candidates], config.token_dropout, model.training)
        parts.append(candidates + model.prompts(batch.cuts).unsqueeze(1) + model.rank.role)
        positions.append(layout.rows_before(batch.cuts).unsqueeze(1).expand_as(batch.candidates))
        visible.append(positions[-1])
    if titles is not None:
        parts.append(titles.embeddings)
        positions.append(titles.positions)
        visible.append(titles.visible)
    if config.order_weight:
        parts.append(tokens[batch.rows.gather(1, batch.pairs)] + model.order.roles)
        after = layout.rows_before(batch.lengths).unsqueeze(1)
        positions.append(after + torch.arange(2, device=device))
        visible.append(after.expand_as(batch.pairs))
    mask = _mask(layout, torch.cat(visible, dim=1), titles) if visible else None
    return torch.cat(parts, dim=1), torch.cat(positions, dim=1), mask


def _mask(layout: Layout, visible: Tensor, titles: TitleRows | None) -> Tensor:
    """Candidates see the history up to their cut, and so do titles, beside their own text; the pair sees all of it,
    and its second row the first."""
    mask = isolated_mask(layout.num_prefix, visible)
    if titles is not None:
        mask[..., layout.titles, layout.titles] = titles.inner
    if layout.pair.stop > layout.pair.start:
        mask[..., layout.pair.stop - 1, layout.pair.start] = True
    return mask
