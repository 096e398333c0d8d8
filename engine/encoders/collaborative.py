"""The collaborative encoder: a SASRec fitted on training histories, whose item embeddings are the item vectors.

It sees rows only; which events are training events is the caller's matter.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.windows import Ints, check_histories, cut_windows, draw_batches, gather, pad_right
from speeder_engine.errors import ArtifactError, DataError
from speeder_engine.files import write_atomic, write_json
from speeder_engine.progress import progress_bar

Validation = tuple[Ints, Ints, Ints]  # offsets [U + 1], rows [N], the one target row of each history [U]
SCORED_AT_ONCE = 256
WARM_UP = 0.05


@dataclass(frozen=True)
class CollaborativeEncoder:
    """A trained SASRec and which items [num_items] had a training event."""

    model: SASRec
    seen: Flags

    @property
    def features(self) -> Features:
        """Item vectors float32 [num_items, dim]; items without any training event are not present."""
        vectors = self.model.items.weight.detach().numpy()
        return Features.of_present(vectors[self.seen], self.seen)

    @torch.inference_mode()
    def scores(self, histories: Sequence[Ints]) -> Tensor:
        """Rows oldest first, any length -> float32 [n, num_items]; an empty history scores by popularity alone."""
        self.model.eval()
        recent = [np.asarray(history, dtype=np.int64)[-self.model.config.window :] for history in histories]
        scores = self.model.bias.detach().repeat(len(recent), 1)
        by_length = np.argsort([len(history) for history in recent], kind="stable")
        order = [user for user in by_length.tolist() if len(recent[user])]
        for start in range(0, len(order), SCORED_AT_ONCE):
            users = order[start : start + SCORED_AT_ONCE]
            padded, lengths = pad_right([recent[user] for user in users])
            hidden = self.model(padded)[torch.arange(len(users)), lengths - 1]
            scores[users] = self.model.logits(hidden)
        return scores

    def save(self, folder: Path) -> None:
        """Writes collaborative.json and collaborative.safetensors into `folder`."""
        tensors = {**self.model.state_dict(), "seen": torch.from_numpy(self.seen)}
        described = {"num_items": self.model.num_items, "config": asdict(self.model.config)}
        write_atomic(folder / "collaborative.safetensors", safetensors.torch.save(tensors))
        write_json(folder / "collaborative.json", described)

    @classmethod
    def load(cls, folder: Path) -> "CollaborativeEncoder":
        try:
            described = json.loads((folder / "collaborative.json").read_text())
            tensors = safetensors.torch.load((folder / "collaborative.safetensors").read_bytes())
            model = SASRec(described["num_items"], SASRecConfig(**described["config"]))
            seen = tensors.pop("seen").numpy()
            model.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder}: not a readable collaborative encoder ({error}); fit it again") from error
        return cls(model.eval(), seen)


class BestEpoch:
    """Keeps the weights of the best validated epoch and says when `patience` epochs brought nothing better."""

    def __init__(self, model: SASRec) -> None:
        self.model = model
        self.metric = -1.0
        self.epochs_since = 0
        self.weights: dict[str, Tensor] = {}

    @property
    def note(self) -> str:
        return f"  best NDCG@10 {self.metric:.4f}" if self.weights else ""

    @property
    def is_over(self) -> bool:
        return self.epochs_since >= self.model.config.patience

    def offer(self, metric: float) -> None:
        self.epochs_since += 1
        if metric > self.metric:
            self.metric, self.epochs_since = metric, 0
            self.weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        if self.weights:
            self.model.load_state_dict(self.weights)


def fit_collaborative(
    offsets: Ints,
    rows: Ints,
    num_items: int,
    config: SASRecConfig | None = None,
    validation: Validation | None = None,
) -> CollaborativeEncoder:
    """Trains on the histories `rows[offsets[u]:offsets[u + 1]]` (int64 [U + 1], int32 [N], oldest first).

    Full cross-entropy at every position. With `validation`, training stops after `patience` epochs without a better
    NDCG@10 over all items that the history has not, and the best epoch's weights are kept.
    """
    config = config or SASRecConfig()
    check_histories(offsets, rows, num_items)
    starts, lengths = cut_windows(offsets, config.window)
    if not len(starts):
        raise DataError("collaborative encoder: no history has two events, so there is nothing to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = CollaborativeEncoder(SASRec(num_items, config), np.bincount(rows, minlength=num_items) > 0)
        optimise(encoder, torch.from_numpy(rows.astype(np.int64)), starts, lengths, validation)
    encoder.model.eval()
    return encoder


def optimise(
    encoder: CollaborativeEncoder, rows: Tensor, starts: Ints, lengths: Ints, validation: Validation | None
) -> None:
    """AdamW under a warm-up and a cosine; leaves the best validated weights, or the last, in the model."""
    model, config = encoder.model, encoder.model.config
    generator = np.random.default_rng(config.seed)
    epochs = [draw_batches(lengths, config.tokens_per_batch, generator) for _ in range(config.epochs)]
    total = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=total + 1, pct_start=WARM_UP, cycle_momentum=False
    )
    best = BestEpoch(model)
    with progress_bar() as progress:
        task = progress.add_task("collaborative encoder (SASRec)", total=total, note="")
        for batches in epochs:
            model.train()
            for batch in batches:
                loss = batch_loss(model, rows, torch.from_numpy(starts[batch]), torch.from_numpy(lengths[batch]))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update(task, advance=1, note=f"loss {loss.item():.3f}{best.note}")
            if validation is not None:
                best.offer(validated_ndcg(encoder, validation))
                if best.is_over:
                    break
    best.restore()


def batch_loss(model: SASRec, rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross-entropy over the real positions; padding never reaches the item matrix."""
    inputs, real, targets = gather(rows, starts, lengths)
    return F.cross_entropy(model.logits(model(inputs)[real]), targets)


def validated_ndcg(encoder: CollaborativeEncoder, validation: Validation) -> float:
    """NDCG@10 with one target each: 1 / log2(2 + number of unseen items scored above it), 0 from the tenth on."""
    offsets, rows, targets = validation
    gains = np.zeros(len(targets))
    for start in range(0, len(targets), SCORED_AT_ONCE):
        chunk = range(start, min(start + SCORED_AT_ONCE, len(targets)))
        histories = [rows[offsets[user] : offsets[user + 1]] for user in chunk]
        scores = encoder.scores(histories).numpy()
        wanted = scores[np.arange(len(chunk)), targets[chunk.start : chunk.stop]].copy()
        for line, history in zip(scores, histories, strict=True):
            line[history] = -np.inf
        above = (scores > wanted[:, None]).sum(axis=1)
        gains[chunk.start : chunk.stop] = np.where(above < 10, 1 / np.log2(2 + above), 0)
    return float(gains.mean())
