"""The gradient of one optimizer step: of one batch, or of several together as if they were one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from speeder_engine.models.prior import Prior
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.batches import PAD, TrainingBatch
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.losses import Losses, compute_losses
from speeder_engine.training.parallel import ALONE, Processes
from speeder_engine.training.precision import autocast
from speeder_engine.training.sampled import ItemSampler, SampledItems, SampledPrior
from speeder_engine.training.token_table import TokenTable


class GradientMaker:
    """Runs forward and backward; gradients add up in the parameters of `model` and `table`."""

    def __init__(
        self,
        model: Recommender,
        table: TokenTable,
        prior: Prior,
        config: TrainingConfig,
        device: torch.device,
        sampler: ItemSampler | None = None,
        processes: Processes = ALONE,
        cold: Tensor | None = None,
    ) -> None:
        """cold: bool [I], items that the full softmax leaves out; None: it has all."""
        self.out = None if cold is None else torch.where(cold, torch.inf, 0.0).to(device)
        self.model, self.table, self.prior = model, table, prior
        self.config, self.device, self.sampler, self.processes = config, device, sampler, processes

    def backward(self, group: Sequence[TrainingBatch], share: Tensor, number: tuple[int, ...] = ()) -> Losses:
        """The losses of all batches of `group` as one, each a mean over all its targets; `share` [M]. What is drawn
        beside the batches depends on `number`."""
        if len(group) == 1 and self.processes.size == 1:
            losses = self._losses(group[0], share, self._drawn(group[0], number))
            losses.total.backward()
            return losses
        size, parts = self.processes.size, []
        counts = [count_targets(batch) for batch in group]
        whole = {name: max(sum(each[name] for each in counts), 1) for name in counts[0]}
        for index, batch in enumerate(group):
            # of the whole batch: all parts are scored against the same items
            sampled = self._drawn(batch, number if len(group) == 1 else (*number, index))
            mine = self.processes.part(batch)
            given = self.processes.has_part(batch)
            shares = {name: given * count / whole[name] for name, count in count_targets(mine).items()}
            parts.append(weighed(self._losses(mine, share, sampled), shares, self.config))
            (parts[-1].total * size).backward()
        self.processes.sum_gradients([*self.model.parameters(), *self.table.tuned.parameters()])
        return self._over_processes(added(parts), whole[parts[0].leads])

    def _over_processes(self, losses: Losses, num_targets: int) -> Losses:
        """What every process has of weighed losses, together."""
        values = {name: value for name, value in vars(losses).items() if isinstance(value, Tensor)}
        sums: dict[str, Any] = dict(zip(values, self.processes.sums([*values.values()]), strict=True))
        return replace(losses, **sums, num_targets=num_targets)

    def _drawn(self, batch: TrainingBatch, number: tuple[int, ...]) -> SampledItems | None:
        return None if self.sampler is None else self.sampler.draw(batch, number)

    def _losses(self, batch: TrainingBatch, share: Tensor, sampled: SampledItems | None) -> Losses:
        with autocast(self.config.precision, self.device):
            if sampled is None:
                batch, tokens = batch.to(self.device), self.table(share)
                return compute_losses(self.model, tokens, self.prior, batch, self.config, self.out)
            items = sampled.rows.to(self.device)
            batch, tokens = sampled.renumber(batch).to(self.device), self.table(share, items)
            prior, log_inclusion = SampledPrior(self.prior, items), sampled.log_inclusion.to(self.device)
            return compute_losses(self.model, tokens, prior, batch, self.config, log_inclusion, items)


def count_targets(batch: TrainingBatch) -> dict[str, int]:
    """How many targets each loss is a mean over."""
    ranked = batch.trained.gather(1, batch.cuts.unsqueeze(1))
    return {
        "retrieve": int(batch.trained.sum()),
        "rank": int(ranked.sum()),
        "title": int((batch.titles != PAD).sum()),
        "order": int((batch.pairs[:, 0] != batch.pairs[:, 1]).sum()),
    }


def weighed(losses: Losses, shares: Mapping[str, float], config: TrainingConfig) -> Losses:
    """Each loss times its share of the targets, and their total by the weights of `config`."""
    each: dict[str, Any] = {name: value * shares[name] for name, value in loss_terms(losses).items()}
    total = torch.stack([value.float() * getattr(config, f"{name}_weight") for name, value in each.items()]).sum()
    return replace(losses, **each, total=total)


def added(parts: Sequence[Losses]) -> Losses:
    """Weighed losses summed up, without their graphs."""
    names = loss_terms(parts[0])
    sums: dict[str, Any] = {n: torch.stack([getattr(part, n).detach() for part in parts]).sum() for n in names}
    total = torch.stack([part.total.detach() for part in parts]).sum()
    counts: dict[str, Any] = {
        n: sum(getattr(part, n) for part in parts) for n in ("num_targets", "num_rows", "padding")
    }
    return replace(parts[0], **sums, total=total, **counts)


def loss_terms(losses: Losses) -> dict[str, Any]:
    """The single losses by name."""
    return {name: value for name, value in vars(losses).items() if isinstance(value, Tensor) and name != "total"}


def groups(batches: Iterable[TrainingBatch], size: int) -> Iterator[list[TrainingBatch]]:
    """`size` batches at a time; the last group may be smaller."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group
