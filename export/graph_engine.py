"""GraphEngine: exported graphs with the face of `Engine`, whatever runs them."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.config import ModelConfig, check, parse_bytes
from speeder_engine.errors import EngineClosed, InvalidRequest, shown
from speeder_engine.export.graph_spec import cache_names
from speeder_engine.export.item_features import read_features
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.onnx_session import Array
from speeder_engine.export.user_cache import UserCache, UserState
from speeder_engine.kv_blocks import KVBlocks
from speeder_engine.prompt import PromptLayout
from speeder_engine.query import Query, Rows, resolve
from speeder_engine.recommends import Recommends
from speeder_engine.request import Ranking, Request, check_user, requests_of

MAX_BATCH = 64
NOTHING = np.full(1, -1, np.int64)
TOP = ("top_rows", "top_scores")


class GraphFiles(Protocol):
    """What an engine of exported graphs needs to know of their files."""

    @property
    def config(self) -> OnnxConfig: ...

    @property
    def model(self) -> ModelConfig: ...

    @property
    def table(self) -> ItemTable: ...

    @property
    def revision(self) -> str: ...


class Runner(Protocol):
    """One graph, ready to run: arrays in and out, some values kept on the device."""

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Any]]: ...

    def to_device(self, array: Array) -> Any: ...

    def shape(self, value: Any) -> tuple[int, ...]: ...


class GraphEngine(Recommends):
    """Exported graphs with the face of `Engine`; every method may be called from several threads.

    Requests with a user id go through `extend`, one by one, with keys and values kept: what is new is computed, or the
    last item again. The others go in batches. Availability and priors may change; new items need a new export.
    """

    def __init__(
        self, files: GraphFiles, sessions: Mapping[str, Runner], kv_budget: str, max_batch: int = MAX_BATCH
    ) -> None:
        config, model = files.config, files.model
        self.files, self.max_batch = files, max_batch
        self.layout = PromptLayout(model.prompt)
        # the tokens are in the graphs
        self.catalogue = Catalogue(files.table, torch.zeros(len(files.table), 0))
        self._sessions = dict(sessions)
        self._past = cache_names("past_key_values", model.decoder.num_layers)
        self._present = cache_names("present", model.decoder.num_layers)
        self._kv_shape = (model.decoder.num_kv_heads, model.decoder.head_dim)
        self._users = UserCache(parse_bytes(kv_budget), KVBlocks.position_bytes(model.decoder, config.torch_dtype))
        self._lock = threading.Lock()
        self._closed = False
        self.rows_computed = 0

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the memory back; every later call raises EngineClosed."""
        with self._lock:
            self._closed = True
            self._sessions.clear()
            self._users.clear()

    @property
    def revision(self) -> str:
        """That of the engine directory it was exported from."""
        return self.files.revision

    def recommend_many(self, requests: Iterable[Request]) -> list[Ranking]:
        """Answers in the order of the requests. All are checked before the first is computed."""
        asked = requests_of(requests, "recommend_many")
        with self._lock:
            self._check_open()
            queries = [self._resolve(request) for request in asked]
            answers: dict[int, Ranking] = {}
            for places, answer in self._parts(queries):
                answers |= zip(places, answer([queries[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(queries))]

    def close_session(self, user_id: str) -> bool:
        """Forgets a user's keys and values; true if there were any."""
        check_user(user_id)
        with self._lock:
            self._check_open()
            return self._users.close(user_id)

    def set_available(self, ids: Sequence[str], available: bool = True) -> None:
        """Whether these items may be recommended. Raises UnknownItem, none changed."""
        with self._lock:
            self._check_open()
            self.catalogue.set_available(ids, available)

    def set_prior(self, priors: Mapping[str, float]) -> None:
        """Priors by item id, for those named. Raises UnknownItem or DataError, none changed."""
        with self._lock:
            self._check_open()
            self.catalogue.set_prior(priors)

    def compress(self, features: Mapping[str, Array]) -> NDArray[np.float32]:
        """New items' features, modality -> [n, width], as item tokens [n, d].

        A row of NaN is a missing modality; an item without any has the token that an export gives to such items.
        Raises DataError for what is no features of this model.
        """
        inputs, present = read_features(features, self.files.model.compressor.modalities)
        arrays: dict[str, Array] = {"present": present, **inputs}
        tokens = [np.zeros((0, self.files.model.compressor.hidden_size), np.float32)]
        with self._lock:
            session = self._session("compress")
            for start in range(0, len(present), self.max_batch):
                part = {name: array[start : start + self.max_batch] for name, array in arrays.items()}
                tokens.append(session.run(part, ["tokens"])[0]["tokens"])
        return np.concatenate(tokens)

    def _resolve(self, request: Request) -> Query:
        query = resolve(request, self.catalogue, self.layout, self.files.model)
        if query.head == "title":
            raise InvalidRequest("head: titles are not exported; use 'rank' or 'retrieve'")
        return query

    def _parts(self, queries: Sequence[Query]) -> Iterator[tuple[list[int], Callable[[list[Query]], list[Ranking]]]]:
        """Which queries are answered together, and how."""
        known = [place for place, query in enumerate(queries) if self._is_known(query)]
        for place in known:
            yield [place], self._extend
        cold = [place for place in range(len(queries)) if place not in set(known)]
        for answer, named in ((self._recommend, False), (self._score, True)):
            places = [place for place in cold if (queries[place].candidates is not None) == named]
            for start in range(0, len(places), self.max_batch):
                yield places[start : start + self.max_batch], answer

    def _is_known(self, query: Query) -> bool:
        """Whether it goes through `extend`: a user with a history, and keys and values that numpy can hold."""
        return "extend" in self._sessions and query.request.user_id is not None and self._has_sessions

    @property
    def _has_sessions(self) -> bool:
        return self._users.budget > 0 and self.files.config.dtype != "bfloat16"

    def _recommend(self, queries: list[Query]) -> list[Ranking]:
        excluded = pad([self._closed_rows(query) for query in queries])
        inputs = {**self._histories(queries, "history"), **self._search_inputs(queries, excluded)}
        # what is excluded, the history or a part of it, has been settled with the query
        inputs["exclude_seen"] = np.array(False)
        found, _ = self._session("recommend").run(inputs, TOP)
        return [
            self._ranking(query, *row) for query, row in zip(queries, zip(*found.values(), strict=True), strict=True)
        ]

    def _score(self, queries: list[Query]) -> list[Ranking]:
        candidates = pad([_candidates(query) for query in queries])
        inputs = {**self._histories(queries, "history"), "candidates": candidates, **self._changes()}
        heads = sorted({_scores_of(query) for query in queries})
        found, _ = self._session("score").run(inputs, heads)
        return [self._named(query, found[_scores_of(query)][b]) for b, query in enumerate(queries)]

    def _extend(self, queries: list[Query]) -> list[Ranking]:
        """One user: what is new of the history goes in, the rest is known."""
        [query] = queries
        user_id = query.request.user_id
        assert user_id is not None
        keys = self.catalogue.keys(query.window, query.buckets)
        state, cached = self._known(self._users.take(user_id), keys)
        inputs = self._histories([query], "rows", cached) | self._search_of(query)
        inputs |= {"past_lengths": np.array([cached]), "candidates": _candidates(query)[None]}
        inputs |= dict(zip(self._past, state.values, strict=True)) | self._last_rows(query)
        kept = dict(zip(self._present, state.values if self._in_place else [None] * len(self._present), strict=True))
        outputs = TOP if query.candidates is None else (_scores_of(query),)
        found, values = self._session("extend").run(inputs, outputs, kept)
        self._users.put(user_id, self._state(keys, values))
        if query.candidates is None:
            return [self._ranking(query, found["top_rows"][0], found["top_scores"][0])]
        return [self._named(query, found[outputs[0]][0])]

    def _known(self, state: UserState, keys: NDArray[np.int32]) -> tuple[UserState, int]:
        """Keys and values to go on from, and how many positions of them count; the last position is computed again
        when there is nothing else to compute."""
        cached = min(state.common_len(keys), max(len(keys) - 1, 0))
        if self._in_place:
            return UserState(keys, state.values or self._new_buffers()), cached
        if not cached:
            return UserState(keys, self._no_past()), 0
        return state, cached

    def _state(self, keys: NDArray[np.int32], values: Sequence[Any]) -> UserState:
        """What is kept of a user after a run."""
        room = self._session("extend").shape(values[0])[2]
        # one position at least, or users without a history would cost nothing and never be forgotten
        real = max(1, len(keys))
        if self._in_place or room == real:
            return UserState(keys, values, room)
        # what was overtaken stands behind what is real, and would grow with every request, beyond any profile
        return UserState(keys, [self._first(value, real) for value in values], real)

    @property
    def _in_place(self) -> bool:
        """Whether keys and values are written into the buffers they are read from."""
        return False

    def _no_past(self) -> list[Any]:
        """Keys and values of every layer before anything was computed."""
        heads, size = self._kv_shape
        return [np.zeros((1, heads, 0, size), self.files.config.dtype)] * len(self._past)

    def _first(self, value: Any, count: int) -> Any:
        """The first positions of keys or values [1, H_kv, P, D] that were kept; here: as an array."""
        return np.ascontiguousarray(value[:, :, :count])

    def _new_buffers(self) -> list[Any]:
        """Keys and values of a whole window, behind the instruction's, on the device."""
        raise NotImplementedError("only engines that write in place have buffers")

    def _histories(self, queries: Sequence[Query], name: str, start: int = 0) -> dict[str, Array]:
        """Windows from `start` on, padded, as inputs."""
        windows = [query.window[start:] for query in queries]
        self.rows_computed += sum(map(len, windows)) + sum(query.num_ranked for query in queries)
        inputs: dict[str, Array] = {name: pad(windows, 0), "lengths": np.array([len(rows) for rows in windows])}
        if self.files.model.prompt.calendar is not None:
            inputs["buckets"] = pad([query.buckets[start:] for query in queries if query.buckets is not None], 0)
        return inputs

    def _last_rows(self, query: Query) -> dict[str, Array]:
        """What `extend` can't see of the past: the history's last rows, newest first, for a model with followers."""
        followers = self.files.model.followers
        return (
            {} if followers is None else {"last_rows": pad([query.window[::-1][: followers.last]], -1, followers.last)}
        )

    def _search_inputs(self, queries: Sequence[Query], excluded: Array) -> dict[str, Array]:
        depth = max(self._depth(query.request) for query in queries)
        return {"excluded": excluded, "k": np.array([depth]), **self._changes()}

    def _search_of(self, query: Query) -> dict[str, Array]:
        """Of one user; the least there is where candidates are named: what is found then is not read."""
        if query.candidates is not None:
            return {"excluded": NOTHING[None], "k": np.ones(1, np.int64), **self._changes()}
        return self._search_inputs([query], self._closed_rows(query)[None])

    def _depth(self, request: Request) -> int:
        """How many items to look for: k may be any whole number, the graph's is an int64."""
        return min(request.k, self.catalogue.num_rows)

    def _changes(self) -> dict[str, Array]:
        return {"available": self.catalogue.available.numpy(), "prior": self.catalogue.prior.numpy()}

    def _closed_rows(self, query: Query) -> NDArray[np.int64]:
        """Rows that may not be answered: excluded, or not among those allowed; never empty."""
        closed = query.excluded
        if query.allowed is not None:
            closed = np.union1d(closed, np.setdiff1d(np.arange(self.catalogue.num_rows), query.allowed))
        return closed.astype(np.int64) if len(closed) else NOTHING

    def _named(self, query: Query, scores: Array) -> Ranking:
        """The query's own candidates, padding cut off."""
        assert query.candidates is not None
        rows, scores = query.candidates, scores[: len(query.candidates)].copy()
        scores[np.isin(rows, self._closed_rows(query))] = -np.inf
        order = np.argsort(-scores, kind="stable")
        return self._ranking(query, rows[order], scores[order])

    def _ranking(self, query: Query, rows: Array, scores: Array) -> Ranking:
        kept = min(query.request.k, int(np.isfinite(scores).sum()))
        return Ranking(self.catalogue.ids(rows[:kept].tolist()), tuple(scores[:kept].tolist()), query.unknown)

    def _session(self, name: str) -> Runner:
        self._check_open()
        if name not in self._sessions:
            raise InvalidRequest(f"this export has no graph {name!r}; export it with --graphs {name}")
        return self._sessions[name]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(f"the engine is closed; load another with {type(self).__name__}.load")


def pad(rows: Sequence[Rows | NDArray[np.int64]], value: int = -1, width: int = 1) -> NDArray[np.int64]:
    """Rows of different lengths as one array [B, longest], at least `width` columns wide."""
    padded = np.full((len(rows), max([width, *map(len, rows)])), value, np.int64)
    for b, each in enumerate(rows):
        padded[b, : len(each)] = each
    return padded


def _candidates(query: Query) -> NDArray[np.int64]:
    return NOTHING if query.candidates is None else query.candidates.astype(np.int64)


def _scores_of(query: Query) -> str:
    return "scores" if query.head == "rank" else "retrieve_scores"


def read_whole(name: str, value: object, most: int) -> int:
    """A whole number from 0 to `most`."""
    number = int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else -1
    check(0 <= number <= most, f"{name}: expected a whole number within 0..{most}, got {shown(value)}")
    return number
