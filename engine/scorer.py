"""The heads at inference: hidden states -> scored rows. Knows no cache and no users."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.batch import Reads, pad_to_tile
from speeder_engine.catalogue import Catalogue
from speeder_engine.following import merged
from speeder_engine.models.recommender import ServingModel
from speeder_engine.native.search import search_catalogue
from speeder_engine.query import Query, Rows
from speeder_engine.title_scorer import title_scores
from speeder_engine.transfer import Transfer
from speeder_engine.triton_kernels.candidate_scores import CandidateTable, RankedRows, candidate_scores
from speeder_engine.triton_kernels.top_scores import (
    MAX_K,
    WIDENED_AT_ONCE,
    Answerable,
    RowLists,
    stable_top,
)
from speeder_engine.triton_kernels.top_scores_two_stage import top_scores_two_stage

Scored = tuple[Rows, list[float]]  # rows, best first, and their scores
Floats = NDArray[np.float32]
MINUS_INFINITY = np.float32("-inf")
TWO_STAGE_K = MAX_K // 4  # deeper answers are searched exactly: the first stage hands on MAX_K rows


class HeadScorer:
    """Scores queries with the model's heads over one catalogue."""

    def __init__(
        self,
        model: ServingModel,
        catalogue: Catalogue,
        transfer: Transfer,
        kernels: str | None = None,
        counters: Tensor | None = None,
    ) -> None:
        """kernels: native ones that search the catalogue, as `pick_kernels` found; None: torch, or kernels on a GPU.
        counters: the runner's."""
        self.model = model
        self.catalogue = catalogue
        self.transfer = transfer
        self.kernels = kernels
        self.counters = counters
        self.searched_again = 0  # users
        self._nothing = catalogue.tokens.new_zeros(0, dtype=torch.float32)

    @torch.inference_mode()
    def user_vectors(self, last_hidden: Tensor) -> Tensor:
        """h(last) [B, d] -> [B, d]; padded to the row tile, so that one user's vector doesn't depend on the others."""
        return self.model.user_vectors(pad_to_tile(last_hidden), self.counters)[: last_hidden.shape[0]]

    @torch.inference_mode()
    def rank_scores(self, hidden: Tensor, vectors: Tensor, reads: Reads) -> Tensor | None:
        """fp32 [R]: hidden [R, d] of the rows read as candidates of the rank head, -inf where unavailable; None
        without such a head."""
        if not self.model.config.heads.rank:
            return None
        head = self.model.rank
        ranked = RankedRows(hidden, head.weight, head.bias, head.alpha)
        return candidate_scores(vectors, reads.sequence, reads.items, self._table(head.beta), ranked)

    @torch.inference_mode()
    def score(
        self,
        queries: Sequence[Query],
        vectors: Tensor,
        rank_scores: Tensor | None,
        candidate_reads: Sequence[slice],
        title_hidden: Sequence[Tensor],
    ) -> list[Scored]:
        """vectors [B, d] of the queries; rank_scores [R] of the rows read, of which `candidate_reads[b]` are query b's
        ranked candidates; title_hidden [R, d] of each trie's rows from `first_read` on.

        Everything is launched, then fetched at once, then cut into answers. Searches that were not certain follow.
        """
        searching = [b for b, query in enumerate(queries) if query.candidates is None]
        # what is too deep for two stages, or for a kernel, is searched exactly, like what they leave uncertain: by
        # itself, so that nobody's answer depends on how many items another asks for, or takes as long
        shallow = [b for b in searching if not self._is_deep(queries[b])]
        searches = shallow or searching  # none is: all are searched exactly, at once
        # most models have none, and no request should pay for it
        following = [queries[b].followers for b in searching if queries[b].following is not None]
        retrieved = [b for b, query in enumerate(queries) if query.head == "retrieve" and query.candidates is not None]
        titled = [b for b, query in enumerate(queries) if query.trie is not None]
        ranked = [b for b, query in enumerate(queries) if query.head == "rank"]
        launched = (
            *self._search([queries[b] for b in searches], searches, vectors, exact=not shallow),
            self._retrieve(following, searching if following else (), vectors),
            self._retrieve([_named(queries[b]) for b in retrieved], retrieved, vectors),
            self._titles([queries[b] for b in titled], title_hidden),
            rank_scores if rank_scores is not None and ranked else self._nothing,
        )
        top, rows, certain, by_follower, by_retrieve, by_title, by_rank = self.transfer.fetch(launched)
        unsure = [b for b, sure in zip(searches, certain, strict=False) if not sure]
        self.searched_again += len(unsure)
        followed = dict(zip(searching, _parts(following, by_follower), strict=False))
        found = {b: _search_answer(queries[b], top[i], rows[i], followed.get(b)) for i, b in enumerate(searches)}
        for members, scores in ((retrieved, by_retrieve), (titled, by_title)):
            parts = _parts([_named(queries[b]) for b in members], scores)
            found |= {b: _best(queries[b], part) for b, part in zip(members, parts, strict=True)}
        found |= {b: _best(queries[b], by_rank[candidate_reads[b]]) for b in ranked}
        # what was fetched is overwritten by the next fetch
        exactly = [b for b in searching if b not in found or b in unsure]
        if exactly:
            again = {b: followed[b].copy() for b in exactly if b in followed}
            for b, (best, best_rows) in self.search_exactly(queries, exactly, vectors).items():
                found[b] = _search_answer(queries[b], best, best_rows, again.get(b))
        return [found[b] for b in range(len(queries))]

    @torch.inference_mode()
    def similar(self, query: Query) -> Scored:
        """The items nearest by cosine to the one item of the query's history."""
        tokens = self.catalogue.tokens
        wanted = F.normalize(tokens[int(query.window[0])].float(), dim=0)
        # a part at a time: a whole copy in fp32 may not fit
        parts = torch.split(tokens, WIDENED_AT_ONCE)
        cosines = [F.normalize(part.float(), dim=1) @ wanted for part in parts]
        answerable = Answerable.build(self.catalogue.available, [query.excluded], [query.allowed])
        scores = answerable.hide(torch.cat(cosines)[None])
        values, rows = stable_top(scores, min(query.request.k, scores.shape[1]))
        return _cut(query, values[0].cpu().numpy(), rows[0].cpu().numpy())

    def may_answer(self, query: Query, rows: Rows) -> NDArray[np.bool_]:
        """bool [n]: which of these rows of the catalogue."""
        available = self.catalogue.available
        there: NDArray[np.bool_] = available[torch.from_numpy(rows.astype(np.int64)).to(available.device)].cpu().numpy()
        return there & query.may_answer(rows)

    @torch.inference_mode()
    def search_exactly(
        self, queries: Sequence[Query], members: Sequence[int], vectors: Tensor
    ) -> dict[int, tuple[Floats, NDArray[np.int64]]]:
        """The best scores and rows [k] of `members` among the queries, for whom two stages didn't suffice; waited for
        once more."""
        asked = [queries[b] for b in members]
        top, rows, _ = self.transfer.fetch(self._search(asked, members, vectors, exact=True))
        return {b: (top[i], rows[i]) for i, b in enumerate(members)}

    def _search(
        self, queries: Sequence[Query], members: Sequence[int], vectors: Tensor, exact: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best of the whole catalogue: scores and rows [S, k] of the deepest, each valid up to its own k; and bool
        [S]: whose is certain, in two stages."""
        if not queries:
            return self._nothing, self._nothing, self._nothing
        answerable = self._answerable(queries)
        coarse = None if exact else self.catalogue.coarse
        places = np.array([query.request.k for query in queries]) - 1
        last = None if coarse is None else self.transfer.put(places.clip(max=self.catalogue.searched_rows - 1))
        # most often everybody searches
        chosen = None if [*members] == [*range(len(members))] else self.transfer.put(np.array(members))
        self.transfer.send()
        vectors = vectors[: len(members)] if chosen is None else vectors[chosen]
        num_items, depths = self.catalogue.searched_rows, [query.request.k for query in queries]
        prior = self.model.retrieve.beta * self.catalogue.prior[:num_items]
        tokens = self.catalogue.tokens[:num_items]
        if coarse is None:
            found = search_catalogue(vectors, tokens, prior, answerable, depths, self.kernels)
            return *found, self._nothing
        first = coarse.first(num_items)
        return top_scores_two_stage(vectors, tokens, prior, answerable, max(depths), first, MAX_K, last)

    def _is_deep(self, query: Query) -> bool:
        """Native kernels find everybody's own k in one walk."""
        return self.kernels is None and query.request.k > (MAX_K if self.catalogue.coarse is None else TWO_STAGE_K)

    def _answerable(self, queries: Sequence[Query]) -> Answerable:
        """Of all items; on the device once it is sent."""
        available = self.catalogue.available[: self.catalogue.searched_rows]
        excluded = self._lists([query.excluded for query in queries])
        limited = np.array([query.allowed is not None for query in queries])
        if not limited.any():
            return Answerable(available, excluded)
        allowed = self._lists([query.excluded[:0] if query.allowed is None else query.allowed for query in queries])
        return Answerable(available, excluded, allowed, self.transfer.put(limited))

    def _lists(self, lists: Sequence[Rows]) -> RowLists:
        starts = np.zeros(len(lists) + 1, np.int32)
        np.cumsum([len(each) for each in lists], out=starts[1:])
        return RowLists(self.transfer.put_int32(np.concatenate(lists)), self.transfer.put_int32(starts))

    def _retrieve(self, named: Sequence[Rows], members: Sequence[int], vectors: Tensor) -> Tensor:
        """fp32 [C] of each member's named rows, by the retrieve head."""
        if not sum(map(len, named)):
            return self._nothing
        rows = self.transfer.put(np.concatenate(named))
        users = self.transfer.put(np.repeat(members, [len(each) for each in named]))
        self.transfer.send()
        return candidate_scores(vectors, users, rows, self._table(self.model.retrieve.beta))

    def _table(self, beta: Tensor) -> CandidateTable:
        catalogue = self.catalogue
        return CandidateTable(catalogue.tokens, catalogue.prior, catalogue.available, beta)

    def _titles(self, queries: Sequence[Query], hidden: Sequence[Tensor]) -> Tensor:
        """fp32 [C] of all named candidates, by their titles' likelihood: no prior, which is learned with the other
        heads."""
        if not queries:
            return self._nothing
        rows = self.transfer.put(np.concatenate([_named(query) for query in queries]))
        self.transfer.send()
        scores = torch.cat(title_scores(self.model, [q.trie for q in queries if q.trie is not None], hidden))
        return scores.masked_fill(~self.catalogue.available[rows], float("-inf"))


def _named(query: Query) -> Rows:
    assert query.candidates is not None
    return query.candidates


def _parts(rows: Sequence[Rows], scores: Floats) -> Iterator[Floats]:
    """`scores` of all `rows`, one list behind the other, cut into those of each list."""
    start = 0
    for each in rows:
        yield scores[start : start + len(each)]
        start += len(each)


def _search_answer(query: Query, top: Floats, rows: NDArray[np.int64], followed: Floats | None) -> Scored:
    """Of a search: its best scores and rows, and what it gave the query's followers [n]; None without any."""
    # somebody beside this one may have asked for more, and what stands there means nothing. Where it was searched so
    # deep, an item right behind one that followed, which is summed in another order here, might overtake that by it
    top, rows = top[: query.request.k], rows[: query.request.k]
    if query.following is not None and followed is not None:
        top, rows = merged(query.following, top, rows, query.followers, followed)
    return _cut(query, top, rows)


def _best(query: Query, scores: Floats) -> Scored:
    """The named candidates in order, equal scores by row."""
    rows = _named(query)
    if query.following is not None:
        scores = scores + query.following.of(rows)
    if len(query.excluded) or query.allowed is not None:
        scores = np.where(query.may_answer(rows), scores, MINUS_INFINITY)
    order = (-scores).argsort(kind="stable")
    return _cut(query, scores[order], rows[order])


def _cut(query: Query, scores: Floats, rows: NDArray[np.int64] | Rows) -> Scored:
    kept = min(query.request.k, int(np.count_nonzero(scores > MINUS_INFINITY)))
    return rows[:kept].astype(np.int32, copy=False), scores[:kept].tolist()
