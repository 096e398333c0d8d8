"""Serving: one engine directory at work on a device. `step` reads as the way of the data.

It knows no threads and no queue: whoever calls holds `lock`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.batch import RowConstants, RowLayout, make_batch
from speeder_engine.cache import CachePlan, KVCache
from speeder_engine.config import ROW_TILE, EngineConfig, check
from speeder_engine.device import DeviceLock, pick_kv_dtype
from speeder_engine.embedder import ItemEmbedder
from speeder_engine.errors import InvalidRequest
from speeder_engine.generation import TitleGenerator
from speeder_engine.graphs import StepGraphs, pick_capture, transfer_words
from speeder_engine.models.recommender import ServingModel
from speeder_engine.native.decoder import NativeDecoder
from speeder_engine.native.support import advise_huge, pick_kernels
from speeder_engine.parts import EngineParts
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query, Rows, resolve
from speeder_engine.request import Generation, Head, Ranking, Request
from speeder_engine.runner import ModelRunner
from speeder_engine.scheduler import cut_into_steps
from speeder_engine.scorer import HeadScorer, Scored
from speeder_engine.step import Outcome, StepModel
from speeder_engine.text_rows import TextRows, make_text_rows
from speeder_engine.title import TitleTrie
from speeder_engine.title_text import TitleText, rows_by_answer
from speeder_engine.transfer import Transfer
from speeder_engine.triton_kernels.few_rows import MOST_ROWS
from speeder_engine.triton_kernels.language import overlapping
from speeder_engine.triton_kernels.quantize_rows import Kind
from speeder_engine.triton_kernels.top_scores import MAX_K, precompile_merges
from speeder_engine.warm_up import warm_depths, warm_rankings, warm_searches

Floats = NDArray[np.float32]
Counts = tuple[int, int, int, int]  # rows computed, graphs replayed, steps without one, users searched again


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was loaded or reloaded, steps that failed aside, and what it holds now."""

    requests: int
    steps: int
    rows_computed: int  # rows of forward passes, candidates included
    positions_reused: int  # history positions answered from sessions
    num_sessions: int  # on the device and in host memory
    num_host_sessions: int
    num_pinned: int
    session_bytes: int  # held by sessions on the device, of at most the KV budget
    host_bytes: int  # held by sessions in host memory
    kv_bytes: int  # allocated on the device for keys and values: budget, instruction and one step's own
    evictions: int  # sessions forgotten for want of room
    blocks_offloaded: int  # to host memory
    blocks_restored: int  # from there
    blocks_copied: int  # of corrected pasts
    num_waiting: int  # submitted requests
    num_refused: int  # submitted requests that met QueueFull since the engine was made
    num_expired: int  # submitted requests that met DeadlineExceeded since the engine was made
    graphs_captured: int  # at warm-up, and never after
    graph_replays: int  # steps whose pass was one of them
    eager_steps: int  # steps whose pass was not; those without a row to compute are neither
    searched_again: int  # users whose search in two stages was not certain and was repeated exactly


@dataclass(frozen=True)
class Pass:
    """What a step's forward pass leaves for its heads, on the device, until the next step."""

    vectors: Tensor  # [B, d] user vectors
    scores: Tensor | None  # [R] of read rows, as candidates of the rank head
    candidate_reads: tuple[slice, ...]  # [B] which of them are ranked candidates
    title_hidden: list[Tensor]  # [R, d] of each trie's rows from `first_read` on
    block_tables: Tensor  # [B, blocks] that hold the histories


class Serving:
    """Model, catalogue, cache and heads that belong together; a reloaded engine gets a new one."""

    def __init__(self, parts: EngineParts, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        self.lock = DeviceLock(device)
        self.layout = PromptLayout(parts.config.prompt)
        self.kernels = pick_kernels(config, device, dtype)
        kv_dtype = pick_kv_dtype(config.kv, device, dtype)
        check_weights(parts.model, config.weights, self.kernels)
        check_placed(parts, device, dtype)
        native = None
        if self.kernels is not None:
            # packed from the weights as they are: those of a directory stay where the file is mapped
            native = NativeDecoder(parts.model.decoder, dtype, config.weights, self.kernels, 2 * config.max_batch_rows)
            self.model = parts.model.beside_packed(dtype)
        else:
            self.model = parts.model if parts.artifact is None else unmapped(parts.model, device)
        self.followers = self.model.followers.weighed() if self.model.followers is not None else None
        if native is None:
            self.model = place(self.model, config, device, dtype)
        room, two_stage = config.capacity_for(len(parts.catalogue)), config.search == "two_stage"
        self.catalogue = parts.catalogue.to(device, dtype, room, coarse=two_stage)
        self.catalogue.placed = device, dtype
        self.parts = replace(parts, catalogue=self.catalogue)  # or the tokens would be held twice
        self.cache = KVCache(config, parts.config.decoder, self.layout, device, dtype, kv_dtype)
        self.row_constants = RowConstants.of(self.cache, self.layout)
        self.runner = ModelRunner(self.model, self.cache, native, config.launches)
        capture = pick_capture(config.graphs, device)
        staged = capture is not None or device.type == "cuda"
        self.transfer = Transfer(device, transfer_words(config, self.cache.size) if staged else 0)
        if self.kernels is not None:
            advise_huge(self.catalogue.tokens)
        self.scorer = HeadScorer(self.model, self.catalogue, self.transfer, self.kernels, self.runner.counters)
        self.model_step = StepModel(self.runner, self.scorer, self.cache, self.catalogue)
        self.graphs = StepGraphs(capture, self.model_step, self.layout, self.transfer, config)
        self.embedder = ItemEmbedder(parts.config.compressor, parts.compressor, self.parts.find_encoder, device)
        self._title_text: TitleText | None = None
        self.num_requests = 0
        self.num_steps = 0
        self.eager_steps = 0
        self._counted: Counts = (0, 0, 0, 0)
        self.to_pin: set[str] = set()  # users who were pinned before a reload, when a step commits their sessions

    def warm_up(self) -> None:
        """Captures the graphs and answers once with each head, so that nothing is compiled or allocated later."""
        heads = self.parts.config.heads
        self.graphs.warm_up()
        if self.device.type == "cuda":
            self._precompile()
        searches = warm_searches(self.catalogue, self.config) if heads.retrieve else []
        # steps without a row to compute, or beyond the largest bucket, find the vectors of any number of users
        with overlapping(self.runner.overlap):
            for users in range(1, min(self.config.max_batch_users, MOST_ROWS) + 1, ROW_TILE):
                self.scorer.user_vectors(self.cache.last_hidden[:1].expand(users, -1).contiguous())
        counted = self.num_requests, self.num_steps, self._counted
        for requests in (*searches, *warm_rankings(self.catalogue, heads)):
            self.step([self.resolve(request) for request in requests])
        if self.catalogue.coarse is not None:
            for searching in searches:
                queries = [self.resolve(request) for request in searching]
                with self.forward(queries) as done:
                    self.scorer.search_exactly(queries, range(len(queries)), done.vectors)
        self.num_requests, self.num_steps, self._counted = counted
        self._uncount()

    def _precompile(self) -> None:
        """Those that the steps of the warm-up may not meet: of other numbers of rows, of a catalogue that has grown."""
        self.graphs.precompile_passes()
        if self.parts.config.heads.retrieve:
            for k in (*warm_depths(self.config), *(() if self.catalogue.coarse is None else (MAX_K,))):
                precompile_merges(k, self.catalogue.capacity, self.device)

    def resolve(self, request: Request, head: Head | None = None) -> Query:
        if head is None:
            self._check_candidates(request)
        query = resolve(request, self.catalogue, self.layout, self.parts.config, head)
        if self.followers is not None:
            query = replace(query, following=self.followers.of(query.head, query.window))
        if query.head != "title" or query.candidates is None:
            return query
        changes = self.catalogue.changes  # read before the titles: a change meanwhile must be seen
        answers = self.title_text.answers([self.catalogue.row_title(row) for row in query.candidates.tolist()])
        return replace(query, trie=TitleTrie.build(self.layout.config.question_ids, answers), titles_of=changes)

    def _check_candidates(self, request: Request) -> None:
        named, most = len(request.candidates or ()), self.config.max_candidates
        if named > most:
            raise InvalidRequest(
                f"candidates: {named:,} are more than max_candidates={most}; name fewer, ask the retrieve head with "
                "allow=[...] instead, or load the engine with more"
            )

    def is_stale(self, query: Query) -> bool:
        """Whether a query of this serving has read titles that may have changed."""
        return query.trie is not None and query.titles_of != self.catalogue.changes

    @property
    def title_text(self) -> TitleText:
        """Read when a title is first asked for: an engine without a title head needs no tokenizer."""
        if self._title_text is None:
            self._title_text = self.parts.title_text()
        return self._title_text

    def num_rows(self, queries: Sequence[Query]) -> list[int]:
        """Rows of the forward pass each query would need now, its session counted in."""
        counts: list[int] = []
        for start in range(0, len(queries), self.config.max_batch_users):
            part = queries[start : start + self.config.max_batch_users]
            cached = self.cache.cached_len([query.request.user_id for query in part], self._keys(part))
            counts += [query.num_rows - known for query, known in zip(part, cached, strict=True)]
        return counts

    def steps(self, queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
        """Consecutive parts of the queries, each one step."""

        def count_rows(queries: Sequence[Query]) -> list[int]:
            with self.lock:
                return self.num_rows(queries)

        for part in cut_into_steps(queries, count_rows, self.config):
            yield queries[part]

    def step(self, queries: Sequence[Query]) -> list[Ranking]:
        """One forward pass over these queries; a failure leaves every session as it was."""
        with self.forward(queries) as done:
            scored = self.scorer.score(queries, done.vectors, done.scores, done.candidate_reads, done.title_hidden)
        self.num_requests += len(queries)
        return [self.ranking(query, result) for query, result in zip(queries, scored, strict=True)]

    def generate(self, queries: Sequence[Query], max_tokens: int) -> list[Generation]:
        """Greedily written titles, one step and a decode loop behind it."""
        generator = TitleGenerator(self.runner, self.title_text)
        with self.forward(queries) as done:
            texts = generator.generate([len(query.window) for query in queries], done.block_tables, max_tokens)
        self.num_requests += len(queries)
        titled = rows_by_answer(self.catalogue.titles)
        return [self._generation(query, text, titled) for query, text in zip(queries, texts, strict=True)]

    def user_vectors(self, queries: Sequence[Query]) -> Floats:
        """[B, d], one step."""
        with self.forward(queries) as done:
            return to_numpy(done.vectors)

    def retrieve_scores(self, vectors: Floats, rows: Rows) -> Floats:
        """User vectors [B, d] -> [B, n] of these rows of the catalogue, prior in them, followers not."""
        chosen = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        tokens, prior = (to_numpy(each[chosen]) for each in (self.catalogue.tokens, self.catalogue.prior))
        # one precision above, rounded away again: a score must not depend on who and what else is asked for
        scores = vectors.astype(np.float64) @ tokens.astype(np.float64).T + float(self.model.retrieve.beta) * prior
        return scores.astype(np.float32)

    def item_vectors(self, ids: Sequence[str]) -> Floats:
        rows = torch.from_numpy(self.catalogue.rows(ids, "item_vectors").astype(np.int64))
        return to_numpy(self.catalogue.tokens[rows.to(self.device)])

    @contextmanager
    def forward(self, queries: Sequence[Query]) -> Iterator[Pass]:
        """Plans and runs a step.

        The step is a transaction: sessions take it over when the body ends well, and are as they were if it raises; so
        are the counters. If moving others to host memory fails behind it, those are forgotten, and this step's stay.
        """
        plan = self.cache.plan([query.request.user_id for query in queries], self._keys(queries))
        try:
            yield self._run(queries, plan)
        except BaseException:
            self._uncount()
            self.cache.release(plan)
            raise
        try:
            self.cache.commit(plan)
        except BaseException:
            self._uncount()
            raise
        self._pin_again(queries)
        self.num_steps += 1
        self._counted = self.runner.rows_computed, self.graphs.replays, self.eager_steps, self.scorer.searched_again

    def _pin_again(self, queries: Sequence[Query]) -> None:
        if self.to_pin:
            for user in {query.request.user_id for query in queries} & self.to_pin:
                if user is not None and self.cache.manager.pin(user):
                    self.to_pin.discard(user)

    def _uncount(self) -> None:
        """What steps have counted that are not to count."""
        self.runner.rows_computed, self.graphs.replays, self.eager_steps, self.scorer.searched_again = self._counted

    def _run(self, queries: Sequence[Query], plan: CachePlan) -> Pass:
        rows = RowLayout(queries, plan, self.row_constants)
        text = make_text_rows(queries, plan, self.layout, self.cache.shared_blocks, self.device)
        self.cache.prepare(plan)
        graph = self.graphs.find(rows) if text is None else None
        if graph is not None:
            self.runner.rows_computed += rows.num_rows
            return _pass(graph.run(rows), rows, graph.block_tables)
        self.eager_steps += rows.num_rows > 0 or text is not None
        self.transfer.begin()
        batch, reads = make_batch(rows, self.cache.shared_blocks, self.transfer.put)
        self.transfer.send()
        outcome = self.model_step.run(batch if text is None else batch.with_text(text), reads)
        return _pass(outcome, rows, batch.attention.block_tables, text)

    def _keys(self, queries: Sequence[Query]) -> list[NDArray[np.int32]]:
        return [self.catalogue.keys(query.window, query.buckets) for query in queries]

    def ranking(self, query: Query, scored: Scored) -> Ranking:
        rows, scores = scored
        return Ranking(self.catalogue.ids(rows.tolist()), tuple(scores), query.unknown)

    def _generation(self, query: Query, text: str, titled: dict[str, list[int]]) -> Generation:
        found = np.array(titled.get(text, ()), np.int32)
        named = found if query.candidates is None else found[np.isin(found, query.candidates)]
        rows = named[self.scorer.may_answer(query, named)].tolist()
        return Generation(text, self.catalogue.ids(rows)[0] if rows else None, bool(rows))

    def stats(self, num_waiting: int, num_refused: int, num_expired: int) -> EngineStats:
        counts, size = self.cache.manager.stats(), self.cache.size
        rows_computed, graph_replays, eager_steps, searched_again = self._counted
        return EngineStats(
            requests=self.num_requests,
            steps=self.num_steps,
            rows_computed=rows_computed,
            positions_reused=counts["positions_reused"],
            num_sessions=counts["num_sessions"],
            num_host_sessions=counts["num_host_sessions"],
            num_pinned=counts["num_pinned"],
            session_bytes=counts["session_blocks"] * size.block_bytes,
            host_bytes=counts["host_blocks_used"] * size.block_bytes,
            kv_bytes=self.cache.num_bytes,
            evictions=counts["evictions"],
            blocks_offloaded=counts["offloads"],
            blocks_restored=counts["restores"],
            blocks_copied=counts["copies"],
            num_waiting=num_waiting,
            num_refused=num_refused,
            num_expired=num_expired,
            graphs_captured=self.graphs.captured,
            graph_replays=graph_replays,
            eager_steps=eager_steps,
            searched_again=searched_again,
        )


def check_weights(model: ServingModel, weights: str, kernels: str | None) -> None:
    """Raises ConfigError for a model that another engine has quantized otherwise: what it was made from is gone."""
    held = model.decoder.weight_kind
    same = held is None or (held == weights and kernels is None)
    check(same, f"EngineParts: an engine with weights={held!r} has quantized this model; read its directory again")


def check_placed(parts: EngineParts, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError for a model or a catalogue that is another engine's own, on another device or rounded to
    another type."""
    for what, held in (("model", parts.model.placed), ("catalogue", parts.catalogue.placed)):
        where = "" if held is None else f"an engine on {held[0]} in {held[1]}".replace("torch.", "")
        check(
            held is None or held == (device, dtype),
            f"EngineParts: {where} has taken this {what}; read its directory again",
        )


def unmapped(model: ServingModel, device: torch.device) -> ServingModel:
    """The model, with what the host goes on reading taken into memory: files of a directory may be written over while
    it is served. What goes to another device is copied there anyway."""
    read = model if device.type == "cpu" else model.followers
    for tensor in () if read is None else (*read.parameters(), *read.buffers()):
        tensor.data = tensor.data.clone()
    return model


def place(model: ServingModel, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> ServingModel:
    """The model on the device in dtype, its linear layers in 8 bits where that is asked for: quantized from the weights
    as they are held, matrix by matrix, before anything is rounded to dtype."""
    if config.weights != "auto" and model.decoder.weight_kind is None:
        # fused layers leave rows as they are, and larger passes must not answer otherwise than small ones
        model.decoder.quantize(cast(Kind, config.weights), device, with_rows=config.launches == "apart")
    model.placed = device, dtype
    return model.to(device, dtype)


def _pass(outcome: Outcome, rows: RowLayout, block_tables: Tensor, text: TextRows | None = None) -> Pass:
    titles = []
    if text is not None and outcome.hidden is not None:
        behind = outcome.hidden[rows.num_reads :]
        titles = [behind[part] for part in text.reads if part.stop > part.start]
    num_users = rows.num_users
    return Pass(outcome.vectors[:num_users], outcome.scores, rows.candidate_reads, titles, block_tables[:num_users])


def to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
