"""The heads at inference: hidden states -> scored rows. Knows no cache and no users."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.batch import pad_to_tile
from speeder_engine.catalogue import Catalogue
from speeder_engine.models.recommender import ServingModel
from speeder_engine.query import Query, Rows
from speeder_engine.title_scorer import title_scores
from speeder_engine.triton_kernels.top_scores import Answerable, stable_top, top_scores

Scored = tuple[Rows, list[float]]  # rows, best first, and their scores


class HeadScorer:
    """Scores queries with the model's heads over one catalogue."""

    def __init__(self, model: ServingModel, catalogue: Catalogue) -> None:
        self.model = model
        self.catalogue = catalogue

    @torch.inference_mode()
    def score(self, queries: Sequence[Query], last_hidden: Tensor, candidate_hidden: Sequence[Tensor]) -> list[Scored]:
        """last_hidden [B, d] is h(last) of every query; candidate_hidden[b] what its head reads besides: [C, d] of the
        candidates where they are ranked, [R, d] of the trie's rows from `first_read` on where titles are scored."""
        vectors = self.user_vectors(last_hidden)
        searches = [b for b, query in enumerate(queries) if query.candidates is None]
        found = dict(zip(searches, self._search([queries[b] for b in searches], vectors[searches]), strict=True))
        titled = [b for b, query in enumerate(queries) if query.trie is not None]
        tries = [query.trie for query in queries if query.trie is not None]
        likelihoods = title_scores(self.model, tries, [candidate_hidden[b] for b in titled])
        found |= {b: self._titles(queries[b], scores) for b, scores in zip(titled, likelihoods, strict=True)}
        return [
            found[b] if b in found else self._candidates(query, vectors[b], candidate_hidden[b])
            for b, query in enumerate(queries)
        ]

    @torch.inference_mode()
    def user_vectors(self, last_hidden: Tensor) -> Tensor:
        """h(last) [B, d] -> [B, d]; padded to the row tile, so that one user's vector doesn't depend on the others."""
        vectors: Tensor = self.model.retrieve(pad_to_tile(last_hidden))
        return vectors[: last_hidden.shape[0]]

    @torch.inference_mode()
    def similar(self, query: Query) -> Scored:
        """The items nearest by cosine to the one item of the query's history."""
        tokens = F.normalize(self.catalogue.tokens.float(), dim=1)
        scores = self._answerable([query]).hide((tokens @ tokens[int(query.window[0])])[None])
        values, rows = stable_top(scores, min(query.request.k, scores.shape[1]))
        return self._cut(query, values[0], rows[0])

    def _search(self, queries: Sequence[Query], vectors: Tensor) -> list[Scored]:
        """The best of the whole catalogue."""
        if not queries:
            return []
        prior = self.model.retrieve.beta * self.catalogue.prior
        deepest = max(query.request.k for query in queries)
        scores, rows = top_scores(vectors, self.catalogue.tokens, prior, self._answerable(queries), deepest)
        return [self._cut(query, scores[b], rows[b]) for b, query in enumerate(queries)]

    def _answerable(self, queries: Sequence[Query]) -> Answerable:
        """Of the whole catalogue."""
        excluded, allowed = [query.excluded for query in queries], [query.allowed for query in queries]
        return Answerable.build(self.catalogue.available, excluded, allowed)

    def may_answer(self, query: Query, rows: Rows) -> Tensor:
        """bool [n]: which of these rows of the catalogue."""
        named = ~np.isin(rows, query.excluded)
        if query.allowed is not None:
            named &= np.isin(rows, query.allowed)
        available = self.catalogue.available
        return torch.from_numpy(named).to(available.device) & available[_indices(rows, available.device)]

    def _candidates(self, query: Query, vector: Tensor, hidden: Tensor) -> Scored:
        """The named candidates, by the query's head."""
        assert query.candidates is not None
        rows = _indices(query.candidates, vector.device)
        # summed per candidate: its score must not depend on which others were named
        retrieved = (vector * self.catalogue.tokens[rows]).sum(dim=-1)
        head = self.model.rank if query.head == "rank" else self.model.retrieve
        scores = self.model.rank(hidden, retrieved) if query.head == "rank" else retrieved
        return self._best(query, rows, scores.float() + head.beta.float() * self.catalogue.prior[rows].float())

    def _titles(self, query: Query, scores: Tensor) -> Scored:
        """The named candidates by their titles' likelihood: no prior, which is learned with the other heads."""
        assert query.candidates is not None
        return self._best(query, _indices(query.candidates, scores.device), scores)

    def _best(self, query: Query, rows: Tensor, scores: Tensor) -> Scored:
        assert query.candidates is not None
        scores = scores.masked_fill(~self.may_answer(query, query.candidates), float("-inf"))
        values, order = stable_top(scores[None], len(rows))
        return self._cut(query, values[0], rows[order[0]])

    @staticmethod
    def _cut(query: Query, scores: Tensor, rows: Tensor) -> Scored:
        kept = min(query.request.k, int((scores > float("-inf")).sum()))
        return rows[:kept].cpu().numpy().astype(np.int32), scores[:kept].tolist()


def _indices(rows: Rows, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.astype(np.int64)).to(device)
