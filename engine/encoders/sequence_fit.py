"""Trains a sequence model on histories: full cross-entropy at every position, stopped by what validates best.

It sees rows only; which events are training events is the caller's matter.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.sequence import SCORED_AT_ONCE, SequenceConfig, SequenceModel
from speeder_engine.encoders.windows import Ints, check_histories, cut_windows, draw_batches, gather
from speeder_engine.errors import DataError
from speeder_engine.progress import progress_bar

Validation = tuple[Ints, Ints, Ints]  # offsets [U + 1], rows [N], the one target row of each history [U]
Model = TypeVar("Model", bound=SequenceModel)
Loss = Callable[[Tensor, Tensor], Tensor]  # of the windows with these first rows and numbers of steps, int64 [B] each
WARM_UP = 0.05


class BestEpoch:
    """Keeps the weights of the best validated epoch and says when `patience` epochs brought nothing better."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.model = model
        self.patience = patience
        self.metric = -1.0
        self.epochs_since = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def note(self) -> str:
        return f"  best NDCG@10 {self.metric:.4f}" if self.weights else ""

    @property
    def is_over(self) -> bool:
        return self.epochs_since >= self.patience

    def offer(self, metric: float) -> None:
        self.epochs_since += 1
        if metric > self.metric:
            self.metric, self.epochs_since = metric, 0
            self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        if self.weights:
            self.model.load_state_dict(self.weights)


def fit_sequence_model(
    kind: type[Model],
    config: SequenceConfig,
    offsets: Ints,
    rows: Ints,
    num_items: int,
    validation: Validation | None = None,
    title: str = "sequence model",
) -> Model:
    """A `kind(num_items, config)`, trained on the histories `rows[offsets[u]:offsets[u + 1]]`, oldest first.

    `offsets` int64 [U + 1], `rows` int32 [N]. `title` is what progress and errors call it.

    With `validation`, training stops after `patience` epochs without a better NDCG@10 over all items that the history
    has not, and the best epoch's weights are kept. Equal seeds give equal weights, whatever was drawn before.
    """
    check_histories(offsets, rows, num_items)
    starts, lengths = cut_windows(offsets, config.window)
    if not len(starts):
        raise DataError(f"{title}: no history has two events, so there is nothing to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = kind(num_items, config)
        events = torch.from_numpy(rows.astype(np.int64))
        validated = None if validation is None else partial(validated_ndcg, model, validation)
        optimise(model, config, partial(batch_loss, model, events), starts, lengths, validated, title)
    return model.eval()


def optimise(
    model: nn.Module,
    config: SequenceConfig,
    loss_of: Loss,
    starts: Ints,
    lengths: Ints,
    validated: Callable[[], float] | None,
    title: str,
) -> None:
    """AdamW under a warm-up and a cosine; leaves the weights that validated best, or the last, in the model."""
    generator = np.random.default_rng(config.seed)
    epochs = [draw_batches(lengths, config.tokens_per_batch, generator) for _ in range(config.epochs)]
    total = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total + 1, pct_start=WARM_UP, cycle_momentum=False
    )
    best = BestEpoch(model, config.patience)
    with progress_bar() as progress:
        task = progress.add_task(title, total=total, note="")
        for batches in epochs:
            model.train()
            for batch in batches:
                loss = loss_of(torch.from_numpy(starts[batch]), torch.from_numpy(lengths[batch]))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, note=f"loss {loss.item():.3f}{best.note}")
            if validated is not None:
                best.offer(validated())
                if best.is_over:
                    break
    best.restore()


def batch_loss(model: SequenceModel, rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross-entropy over the real positions; padding never reaches the item matrix."""
    inputs, real, targets = gather(rows, starts, lengths)
    return F.cross_entropy(model.logits(model(inputs)[real]), targets)


def validated_ndcg(model: SequenceModel, validation: Validation) -> float:
    """`ndcg_at_10` of the model's scores."""
    offsets, rows, _ = validation
    return ndcg_at_10(
        lambda users: model.scores([rows[offsets[user] : offsets[user + 1]] for user in users]).numpy(), validation
    )


def ndcg_at_10(scores_of: Callable[[range], NDArray[np.float32]], validation: Validation) -> float:
    """With one target each: 1 / log2(2 + number of unseen items before it), 0 from the tenth on; of equal scores the
    lower row comes first. A query whose scores are not numbers, as a model's that has diverged, gains nothing.

    `scores_of` gives those of some users, [n, num_items], and loses them: the history's are overwritten.
    """
    offsets, rows, targets = validation
    gains = np.zeros(len(targets))
    for start in range(0, len(targets), SCORED_AT_ONCE):
        chunk = range(start, min(start + SCORED_AT_ONCE, len(targets)))
        scores, asked = scores_of(chunk), targets[chunk.start : chunk.stop, None]
        wanted, sound = np.take_along_axis(scores, asked, axis=1), np.isfinite(scores).all(axis=1)
        for line, user in zip(scores, chunk, strict=True):
            line[rows[offsets[user] : offsets[user + 1]]] = -np.inf
        earlier = np.arange(scores.shape[1]) < asked
        before = ((scores > wanted) | ((scores == wanted) & earlier)).sum(axis=1)
        gains[chunk.start : chunk.stop] = np.where(sound & (before < 10), 1 / np.log2(2 + before), 0)
    return float(gains.mean())
