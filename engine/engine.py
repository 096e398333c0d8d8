"""Engine: catalogue, cache, runner and heads put together. `step` reads as the way of the data."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.batch import Batch, make_batch
from speeder_engine.cache import CachePlan, KVCache
from speeder_engine.config import EngineConfig
from speeder_engine.errors import ConfigError, InvalidRequest
from speeder_engine.generation import TitleGenerator
from speeder_engine.parts import EngineParts
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query, resolve
from speeder_engine.request import Generation, Head, OnUnknown, Ranking, Request, whole_number
from speeder_engine.runner import ModelRunner
from speeder_engine.scheduler import cut_into_steps
from speeder_engine.scorer import HeadScorer, Scored
from speeder_engine.title import TitleTrie
from speeder_engine.title_text import TitleText, rows_by_answer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was loaded."""

    requests: int
    rows_computed: int  # rows of forward passes, candidates included
    positions_reused: int  # history positions answered from sessions
    num_sessions: int
    evictions: int
    kv_bytes: int


class Engine:
    """Serves one engine directory. `Engine.load` makes one; every method may be called from several threads."""

    def __init__(self, parts: EngineParts, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        device = pick_device(self.config.device)
        dtype = pick_dtype(self.config.dtype, device)
        self.parts = parts
        self.layout = PromptLayout(parts.config.prompt)
        self.model = parts.model.to(device, dtype)
        self.catalogue = parts.catalogue.to(device, dtype)
        self.device = device
        self._cache = KVCache(self.config, parts.config.decoder, self.layout, device, dtype)
        self._runner = ModelRunner(self.model, self._cache)
        self._scorer = HeadScorer(self.model, self.catalogue)
        self._text: TitleText | None = None
        self._lock = threading.Lock()
        self._num_requests = 0

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", dtype: str = "auto", kv_budget: str = "1GiB") -> "Engine":
        """Reads and verifies an engine directory.

        device: "auto", "cpu", "cuda" or "cuda:1". dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32",
        "bfloat16", "float16". kv_budget: bytes that sessions may keep ("1GiB", "200MB"); "0" switches the cache off.
        Raises ArtifactError for a path that is no whole engine directory, ConfigError for settings that can't be.
        """
        config = EngineConfig(device=device, dtype=dtype, kv_budget=kv_budget)
        try:
            path = Path(path)
        except TypeError:
            raise ConfigError(f"Engine.load: expected the path of an engine directory, got {path!r}") from None
        return cls(EngineParts.load(path), config)

    def recommend(
        self,
        history: Sequence[str],
        k: int = 10,
        *,
        user_id: str | None = None,
        candidates: Sequence[str] | None = None,
        head: Head | None = None,
        exclude_seen: bool = True,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] | None = None,
        history_offset: int = 0,
        on_unknown: OnUnknown = "error",
    ) -> Ranking:
        """The k best next items after `history` (item ids, oldest first); `Request` describes every argument.

        Raises UnknownItem or InvalidRequest before anything is computed.
        """
        request = Request(
            history,
            k,
            user_id=user_id,
            candidates=candidates,
            head=head,
            exclude_seen=exclude_seen,
            allow=allow,
            deny=deny,
            history_offset=history_offset,
            on_unknown=on_unknown,
        )
        return self.recommend_many([request])[0]

    def recommend_many(self, requests: Iterable[Request]) -> list[Ranking]:
        """Answers in the order of the requests, in as few steps as the row budget allows.

        All requests are checked before the first is computed.
        """
        asked = _requests(requests, "recommend_many")
        with self._lock:
            queries = [self._resolve(request) for request in asked]
            rankings: list[Ranking] = []
            for part in cut_into_steps([query.num_rows for query in queries], self.config):
                rankings += self.step(queries[part])
            return rankings

    def step(self, queries: Sequence[Query]) -> list[Ranking]:
        """One forward pass over these queries; a failure leaves every session as it was."""
        with self._forward(queries) as (last_hidden, candidate_hidden, _):
            scored = self._scorer.score(queries, last_hidden, candidate_hidden)
        self._num_requests += len(queries)
        return [self._ranking(query, result) for query, result in zip(queries, scored, strict=True)]

    def generate(self, requests: Iterable[Request], max_tokens: int = 64) -> list[Generation]:
        """What the model writes, greedily, as the next item's title: up to a newline or `max_tokens` tokens.

        It is valid where it is the title of one of the request's candidates (of any item without them) that may be
        answered; of several such items the first of the catalogue is meant. Sessions are used and extended.
        Here to compare with: `recommend(head="title")` scores candidates' titles in one pass and is always valid.
        """
        asked, max_tokens = _requests(requests, "generate"), whole_number("max_tokens", max_tokens, 1)
        if not self.parts.config.heads.title:
            raise InvalidRequest("generate: this model was trained without a title head; use recommend")
        with self._lock:
            queries = [self._resolve(replace(request, head="retrieve")) for request in asked]
            generator = TitleGenerator(self._runner, self._title_text())
            titled, generations = rows_by_answer(self.catalogue.table.titles), list[Generation]()
            for part in cut_into_steps([query.num_rows for query in queries], self.config):
                lengths = [len(query.window) for query in queries[part]]
                with self._forward(queries[part]) as (_, _, block_tables):
                    texts = generator.generate(lengths, block_tables, max_tokens)
                generations += [self._generation(*each, titled) for each in zip(queries[part], texts, strict=True)]
            self._num_requests += len(queries)
            return generations

    def user_vector(self, history: Sequence[str]) -> NDArray[np.float32]:
        """[d]: its dot product with an item's vector is that item's retrieve score, prior aside."""
        vector: NDArray[np.float32] = self.user_vectors([Request(history)])[0]
        return vector

    def user_vectors(self, requests: Iterable[Request]) -> NDArray[np.float32]:
        """[B, d] in the order of the requests; their sessions are used and extended."""
        asked = _requests(requests, "user_vectors")
        with self._lock:
            plain = [replace(request, candidates=None, head=None) for request in asked]
            queries = [self._resolve(request) for request in plain]
            vectors = [np.zeros((0, self.catalogue.tokens.shape[1]), np.float32)]
            for part in cut_into_steps([query.num_rows for query in queries], self.config):
                with self._forward(queries[part]) as (last_hidden, _, _):
                    vectors.append(self._to_numpy(self._scorer.user_vectors(last_hidden)))
            return np.concatenate(vectors)

    def item_vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Item tokens [n, d] of these ids."""
        rows = self.catalogue.rows(Request(ids).history, "item_vectors")
        return self._to_numpy(self.catalogue.tokens[torch.from_numpy(rows.astype(np.int64)).to(self.device)])

    def similar_items(self, item_id: str, k: int = 10) -> Ranking:
        """The k items whose tokens are nearest by cosine, the item itself left out."""
        query = self._resolve(Request([item_id], k))
        return self._ranking(query, self._scorer.similar(query))

    def close_session(self, user_id: str) -> bool:
        """Forgets a user's keys and values; true if there were any."""
        return bool(self._cache.manager.close(user_id))

    def stats(self) -> EngineStats:
        counts = self._cache.manager.stats()
        return EngineStats(
            requests=self._num_requests,
            rows_computed=self._runner.rows_computed,
            positions_reused=counts["positions_reused"],
            num_sessions=counts["num_sessions"],
            evictions=counts["evictions"],
            kv_bytes=self._cache.num_bytes,
        )

    def check_integrity(self) -> None:
        """Raises if the cache's books disagree; for tests and debugging."""
        self._cache.manager.check_integrity()

    def _resolve(self, request: Request) -> Query:
        query = resolve(request, self.catalogue, self.layout, self.parts.config.heads)
        if query.head != "title" or query.candidates is None:
            return query
        answers = self._title_text().answers([self.catalogue.table.titles[row] for row in query.candidates])
        return replace(query, trie=TitleTrie.build(self.parts.config.prompt.question_ids, answers))

    def _title_text(self) -> TitleText:
        """Read when a title is first asked for: an engine without a title head needs no tokenizer."""
        if self._text is None:
            self._text = self.parts.title_text()
        return self._text

    @contextmanager
    def _forward(self, queries: Sequence[Query]) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
        """Plans and runs a step; yields h(last) [B, d], what each query's head of candidates reads (hidden states
        [C, d]), and the blocks [B, blocks] that hold the histories.

        The step is a transaction: sessions take it over when the body ends well, and are as they were if it raises.
        """
        keys = [self.catalogue.keys(query.window) for query in queries]
        plan = self._cache.plan([query.request.user_id for query in queries], keys)
        try:
            batch = make_batch(queries, plan, self.layout, self._cache.shared_blocks, self.device)
            self._cache.copy_blocks(plan.copies)
            hidden = self._runner.forward(batch, self.catalogue.tokens)
            last_hidden = self._last_hidden(queries, plan, batch, hidden)
            reads = [hidden[part] for part in batch.candidate_reads]
            yield last_hidden, reads, batch.attention.block_tables
        except BaseException:
            self._cache.release(plan)
            raise
        self._cache.keep_last_hidden(plan, last_hidden)
        self._cache.commit(plan)

    def _last_hidden(self, queries: Sequence[Query], plan: CachePlan, batch: Batch, hidden: Tensor) -> Tensor:
        """h(last) [B, d]: just computed, or kept with an unchanged session, or the instruction's own."""
        last = []
        for b, query in enumerate(queries):
            if batch.last_read[b] >= 0:
                last.append(hidden[int(batch.last_read[b])])
            elif len(query.window) == 0:
                last.append(self._runner.instruction_hidden[0])
            else:
                last.append(self._cache.last_hidden[int(plan.session_slots[b])])
        return torch.stack(last)

    def _ranking(self, query: Query, scored: Scored) -> Ranking:
        rows, scores = scored
        return Ranking(tuple(self.catalogue.item_ids[row] for row in rows), tuple(scores), query.unknown)

    def _generation(self, query: Query, text: str, titled: dict[str, list[int]]) -> Generation:
        mask, candidates = self._scorer.mask(query), query.candidates
        named = None if candidates is None else set(candidates.tolist())
        rows = [row for row in titled.get(text, ()) if not mask[row] and (named is None or row in named)]
        return Generation(text, self.catalogue.item_ids[rows[0]] if rows else None, bool(rows))

    @staticmethod
    def _to_numpy(tensor: Tensor) -> NDArray[Any]:
        return tensor.float().cpu().numpy()


def _requests(requests: object, where: str) -> list[Request]:
    if isinstance(requests, Request) or not isinstance(requests, Iterable):
        raise InvalidRequest(f"{where}: expected a list of Requests, got {type(requests).__name__}; write [request]")
    asked = list(requests)
    strange = [request for request in asked if not isinstance(request, Request)]
    if strange:
        raise InvalidRequest(f"{where}: expected Requests, got {type(strange[0]).__name__}; write Request(history)")
    return asked


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is no device; choose 'auto', 'cpu' or 'cuda'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; choose 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but no CUDA device is usable here; use device='cpu'")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
