"""Scores with the training model itself: full prompts in padded batches, explicit masks, no cache.

Slower than the engine and simpler: what the engine's answers are held against.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.data.splits import Part, Queries, Split
from speeder_engine.encoders.windows import by_length
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.live_prior import LivePopularity
from speeder_engine.models.prior import ConstantPrior, ExactPrior, Prior, of_candidates
from speeder_engine.models.recommender import Recommender
from speeder_engine.prompt import PromptLayout, isolated_mask

PADDED_TOGETHER = 128  # users in one padded batch
Rows = NDArray[np.int32]
Seconds = NDArray[np.int64]


class ModelScorer:
    """The `Scorer` of a Recommender with its item tokens [I, d] and its prior; a live one knows the query's time.

    head: what scores candidates, "retrieve" or "rank"; none: the rank head where the model has one. ConfigError for one
    that wasn't trained, and for titles, which an engine scores.
    """

    def __init__(
        self, model: Recommender, tokens: Tensor, prior: Prior, name: str = "speeder (model)", head: str | None = None
    ) -> None:
        trained = [each for each in model.config.heads.names if each != "title"]
        if head is not None and head not in trained:
            known = f"it scores candidates by {' or '.join(trained)}" if trained else "it has titles alone"
            raise ConfigError(f"{name}: head {head!r} of a model as trained; {known}, titles take an exported engine")
        self.name, self.head = name, head or ("rank" if "rank" in trained else "retrieve")
        self.model, self.tokens, self.prior = model, tokens, prior
        self.layout = PromptLayout(model.config.prompt)
        self.followers = None if model.followers is None else model.followers.weighed()

    @property
    def uses_time(self) -> bool:
        return self.model.config.live_prior is not None

    @torch.inference_mode()
    def scores(self, queries: Queries) -> NDArray[np.float32]:
        """By the retrieve head; -inf, which is no answer, where that wasn't trained."""
        if not self.model.config.heads.retrieve:
            return np.full((len(queries), len(self.tokens)), -np.inf, np.float32)
        vectors, _ = self._forward(_histories(queries), _times(queries), None)
        scores = _to_numpy(vectors @ self.tokens.T + self.model.retrieve.beta * self.prior_at(queries))
        return self.with_following(scores, queries)

    @torch.inference_mode()
    def products(self, queries: Queries) -> NDArray[np.float32]:
        """[Q, I]: the retrieve scores without the prior and without what followed."""
        return _to_numpy(self.user_vectors(_histories(queries), _times(queries)) @ self.tokens.T)

    @torch.inference_mode()
    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        if self.head not in self.model.config.heads.names:
            raise ConfigError(
                f"{self.name}: was trained for titles alone; export an engine, which scores candidates by them"
            )
        rows = torch.from_numpy(candidates.astype(np.int64)).to(self.tokens.device)
        prior = of_candidates(self.prior_at(queries), rows)
        if self.head == "retrieve":
            vectors, _ = self._forward(_histories(queries), _times(queries), None)
            scores = _to_numpy(self._products(vectors, rows) + self.model.retrieve.beta * prior)
        else:
            vectors, hidden = self._forward(_histories(queries), _times(queries), rows)
            scores = _to_numpy(self.model.rank(hidden, self._products(vectors, rows)) + self.model.rank.beta * prior)
        return self.with_following(scores, queries, self.head, candidates)

    def user_vectors(self, histories: Sequence[Rows], times: Sequence[Seconds] | None = None) -> Tensor:
        """[B, d]: their product with the item tokens is the retrieve score, prior aside."""
        return self._forward(histories, times, None)[0]

    def prior_at(self, queries: Queries) -> Tensor:
        """Of the queries' times: [Q, I], or [I] where it is the same for all."""
        return self.prior.at(self.times(queries))

    def times(self, queries: Queries) -> Tensor:
        """int64 [Q], zeros where the data has no times."""
        times = queries.query_times if queries.query_times is not None else np.zeros(len(queries), np.int64)
        return torch.from_numpy(times).to(self.tokens.device)

    def with_following(
        self,
        scores: NDArray[np.float32],
        queries: Queries,
        head: str = "retrieve",
        rows: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.float32]:
        """scores [Q, n] of `rows` [Q, n], none: of all items, with what followed each query's history, in place."""
        if self.followers is not None:
            rows = np.broadcast_to(np.arange(len(self.tokens)), scores.shape) if rows is None else rows
            for line, history, asked in zip(scores, _histories(queries), rows, strict=True):
                following = self.followers.of(head, history[self.layout.start(len(history)) :])
                line += 0 if following is None else following.of(asked)
        return scores

    def _products(self, vectors: Tensor, candidates: Tensor) -> Tensor:
        return torch.einsum("bd,bcd->bc", vectors, self.tokens[candidates])

    def _forward(
        self, histories: Sequence[Rows], times: Sequence[Seconds] | None, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """User vectors [B, d] and the candidates' final hidden states [B, C, d] (empty without candidates)."""
        self.model.eval()
        batches, parts = by_length([len(history) for history in histories], PADDED_TOGETHER), []
        for users in batches:
            asked = None if times is None else [times[u] for u in users]
            parts.append(
                self._padded([histories[u] for u in users], asked, None if candidates is None else candidates[users])
            )
        vectors, hidden = (torch.cat(part) for part in zip(*parts, strict=True))
        places = torch.from_numpy(np.argsort(np.concatenate(batches))).to(vectors.device)
        return vectors[places], hidden[places]

    def _padded(
        self, histories: Sequence[Rows], times: Sequence[Seconds] | None, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, lengths, buckets = self.window(histories, times)
        batch_size, step = len(rows), self.layout.config.rows_per_item
        num_prompt, device = self.layout.instruction_len, self.tokens.device
        num_prefix = num_prompt + step * rows.shape[1]
        parts = [self.model.instruction(batch_size), self.model.history(self.tokens[rows], buckets)]
        positions = torch.arange(num_prefix, device=device).expand(batch_size, -1)
        mask = None
        if candidates is not None:
            role = self.model.prompts(lengths).unsqueeze(1) + self.model.rank.role
            parts.append(self.tokens[candidates] + role)
            at = (num_prompt + step * lengths).unsqueeze(1).expand(-1, candidates.shape[1])
            positions = torch.cat([positions, at], dim=1)
            mask = isolated_mask(num_prefix, at)
        hidden = self.model(torch.cat(parts, dim=1), positions, mask)
        last = hidden[torch.arange(batch_size, device=device), num_prompt - 1 + step * lengths]
        return self.model.retrieve(last), hidden[:, num_prefix:]

    def window(self, histories: Sequence[Rows], times: Sequence[Seconds] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, L], lengths [B] and calendar buckets [B, L], zeros where times aren't known or not read."""
        starts = [self.layout.start(len(history)) for history in histories]
        lengths = torch.tensor([len(h) - start for h, start in zip(histories, starts, strict=True)])
        rows = torch.zeros(len(histories), int(lengths.max()), dtype=torch.int64)
        buckets = torch.zeros_like(rows)
        calendar = self.layout.config.calendar
        for i, (history, start) in enumerate(zip(histories, starts, strict=True)):
            count = len(history) - start
            rows[i, :count] = torch.from_numpy(history[start:].astype(np.int64))
            if calendar is not None and times is not None:
                buckets[i, :count] = torch.from_numpy(calendar.buckets(times[i][start:]))
        device = self.tokens.device
        return rows.to(device), lengths.to(device), buckets.to(device)


def query_prior(checkpoint: Checkpoint, split: Split, part: Part) -> Prior:
    """The prior at the time of a part's queries: of a live one, every event before the query that a service would have
    seen by then, other users' held-out ones included; those of the test are hidden from validation."""
    model, dataset = checkpoint.model, split.dataset
    if model.prior_weights is None or model.config.live_prior is None:
        return ConstantPrior(torch.from_numpy(checkpoint.table.prior).to(model.prompts.weight.device))
    if dataset.times is None:
        raise DataError(f"{dataset.name}: this model's prior is live and needs times; give a time column")
    known = split.known(part)
    popularity = LivePopularity.of_events(model.config.live_prior, dataset.num_items, known.times, known.rows)
    return ExactPrior(popularity, model.prior_weights)


def _to_numpy(scores: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = scores.float().cpu().numpy()
    return array


def _histories(queries: Queries) -> list[Rows]:
    return [queries.history(q) for q in range(len(queries))]


def _times(queries: Queries) -> list[Seconds] | None:
    times, offsets = queries.times, queries.offsets
    return None if times is None else [times[offsets[q] : offsets[q + 1]] for q in range(len(queries))]
