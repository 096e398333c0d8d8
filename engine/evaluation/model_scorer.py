"""Scores with the training model itself: full prompts in padded batches, explicit masks, no cache.

Slower than the engine and simpler: what the engine's answers are held against.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.data.splits import Queries
from speeder_engine.models.recommender import Recommender
from speeder_engine.prompt import PromptLayout, isolated_mask


class ModelScorer:
    """The `Scorer` of a Recommender with its item tokens [I, d] and prior [I]."""

    uses_time = False

    def __init__(self, model: Recommender, tokens: Tensor, prior: Tensor, name: str = "speeder (model)") -> None:
        self.name = name
        self.model, self.tokens, self.prior = model, tokens, prior
        self.layout = PromptLayout(model.config.prompt)

    @torch.inference_mode()
    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores = self.user_vectors(_histories(queries)) @ self.tokens.T + self.model.retrieve.beta * self.prior
        return _to_numpy(scores)

    @torch.inference_mode()
    def candidate_scores(self, queries: Queries, candidates: NDArray[np.int32]) -> NDArray[np.float32]:
        """By the rank head where the model has one, else by the retrieve head."""
        rows = torch.from_numpy(candidates.astype(np.int64)).to(self.tokens.device)
        vectors, hidden = self._forward(_histories(queries), rows)
        retrieved = torch.einsum("bd,bcd->bc", vectors, self.tokens[rows])
        if not self.model.config.heads.rank:
            return _to_numpy(retrieved + self.model.retrieve.beta * self.prior[rows])
        return _to_numpy(self.model.rank(hidden, retrieved) + self.model.rank.beta * self.prior[rows])

    def user_vectors(self, histories: Sequence[NDArray[np.int32]]) -> Tensor:
        """[B, d]: their product with the item tokens is the retrieve score, prior aside."""
        return self._forward(histories, None)[0]

    def _forward(self, histories: Sequence[NDArray[np.int32]], candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        """User vectors [B, d] and the candidates' final hidden states [B, C, d] (empty without candidates)."""
        self.model.eval()
        rows, lengths = self._window(histories)
        batch_size, length = rows.shape
        num_prompt, device = self.layout.instruction_len, self.tokens.device
        slots = torch.arange(length, device=device)
        parts = [self.model.instruction(batch_size), self.tokens[rows] + self.model.prompts(slots)]
        positions = torch.arange(num_prompt + length, device=device).expand(batch_size, -1)
        mask = None
        if candidates is not None:
            role = self.model.prompts(lengths).unsqueeze(1) + self.model.rank.role
            parts.append(self.tokens[candidates] + role)
            at = (num_prompt + lengths).unsqueeze(1).expand(-1, candidates.shape[1])
            positions = torch.cat([positions, at], dim=1)
            mask = isolated_mask(num_prompt + length, at)
        hidden = self.model(torch.cat(parts, dim=1), positions, mask)
        last = hidden[torch.arange(batch_size, device=device), num_prompt - 1 + lengths]
        return self.model.retrieve(last), hidden[:, num_prompt + length :]

    def _window(self, histories: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
        windows = [history[self.layout.start(len(history)) :] for history in histories]
        lengths = torch.tensor([len(window) for window in windows])
        rows = torch.zeros(len(windows), int(lengths.max()), dtype=torch.int64)
        for i, window in enumerate(windows):
            rows[i, : len(window)] = torch.from_numpy(window.astype(np.int64))
        return rows.to(self.tokens.device), lengths.to(self.tokens.device)


def _to_numpy(scores: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = scores.float().cpu().numpy()
    return array


def _histories(queries: Queries) -> list[NDArray[np.int32]]:
    return [queries.history(q) for q in range(len(queries))]
