"""Engine: what users hold: one serving at work, the queue before it, histories of sessions, changes between steps."""

import asyncio
import gc
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speeder_engine.catalogue import Catalogue, Change, ItemUpdate
from speeder_engine.checks import given_path
from speeder_engine.config import MAX_TITLE_TOKENS, MOST_ANSWER_IDS, EngineConfig
from speeder_engine.device import in_one_order, pick_device, pick_dtype
from speeder_engine.errors import CacheExhausted, DataError, DeadlineExceeded, EngineClosed, InvalidRequest, shown
from speeder_engine.forks import claim_threads
from speeder_engine.item import Item
from speeder_engine.models.recommender import ServingModel
from speeder_engine.parts import EngineParts
from speeder_engine.query import Query
from speeder_engine.recommends import Recommends
from speeder_engine.request import (
    Generation,
    OnUnknown,
    Ranking,
    Request,
    all_of,
    check_user,
    item_ids,
    requests_of,
    true_or_false,
    whole_number,
)
from speeder_engine.scheduler import Scheduler, Waiting, deadline_error
from speeder_engine.serving import EngineStats, Serving
from speeder_engine.session import History, Session
from speeder_engine.worker import Worker

SCORED_AT_ONCE = 16_384  # items


class Engine(Recommends):
    """Serves one engine directory. `Engine.load` makes one; every method may be called from several threads.

    A context manager: `close` forgets sessions and gives the memory back.
    """

    def __init__(self, parts: EngineParts, config: EngineConfig | None = None) -> None:
        claim_threads("Engine")
        self.config = config or EngineConfig()
        self.device = pick_device(self.config.device)
        self._dtype = pick_dtype(self.config.dtype, self.device)
        self._serving: Serving | None = self._make_serving(parts)
        self._is_warm = False
        self._pinning = threading.Lock()  # a reload takes all pins along, and nobody's changes meanwhile
        self._histories: dict[str, History] = {}  # of sessions, until they are closed
        self._scheduler = Scheduler(self.config)
        self._worker = Worker(self._scheduler, _serving_of(weakref.ref(self)))
        self._changing = threading.RLock()  # one upsert, reload or close at a time
        self._process = os.getpid()
        # an engine that nobody holds any more lets its worker end
        weakref.finalize(self, _close_queue, self._scheduler, self._process)

    @classmethod
    def load(
        cls, path: str | Path, device: str = "auto", dtype: str = "auto", kv_budget: str | int = "1GiB", **more: object
    ) -> "Engine":
        """Reads and verifies an engine directory.

        device: "auto", "cpu", "cuda" or "cuda:1". dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32",
        "bfloat16", "float16". kv_budget: bytes that sessions may keep ("1GiB", "200MB"); "0" switches the cache off.
        more: any other field of `EngineConfig`.
        Raises ArtifactError for a path that is no whole engine directory, ConfigError for settings that can't be.
        """
        claim_threads("Engine.load")
        config = EngineConfig.from_json({"device": device, "dtype": dtype, "kv_budget": kv_budget, **more})
        engine = cls(EngineParts.load(given_path(path, "Engine.load", "an engine directory")), config)
        if engine.device.type == "cuda":
            engine.warm_up()
        return engine

    def _make_serving(self, parts: EngineParts) -> Serving:
        with in_one_order(self.device):
            return Serving(parts, self.config, self.device, self._dtype)

    def warm_up(self) -> None:
        """Captures the CUDA graphs, compiles what is compiled when first used and, unless `freeze_gc` is off, takes all
        that stands by now out of the garbage collector's sight, whose pauses would be a step's. `load` does it on a
        GPU, `reload` wherever it has been done. A second time is harmless."""
        with self._changing:  # a reload that is under way serves what it has read from now on, and that is warmed
            serving = self._now()
            with serving.lock:
                serving.warm_up()
            self._is_warm = True
        self._freeze()

    def _freeze(self) -> None:
        if self.config.freeze_gc:
            gc.unfreeze()  # what has become garbage since the last time is found once more
            gc.collect()
            gc.freeze()

    def __enter__(self) -> "Engine":
        self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what waits with EngineClosed and gives the memory back; every later call raises EngineClosed. A second
        `close` is harmless. A step that is running ends as it would have."""
        if self._process != os.getpid():
            return  # a fork copies no thread, and locks as they stood: nothing here is this process's to end
        self._worker.stop()
        with self._changing:
            self._serving = None
            self._histories.clear()

    @property
    def catalogue(self) -> Catalogue:
        return self._now().catalogue

    @property
    def model(self) -> ServingModel:
        return self._now().model

    @property
    def parts(self) -> EngineParts:
        """What is served; its catalogue is the engine's own, in its dtype and as it stands now. `save` writes it."""
        return self._now().parts

    @property
    def revision(self) -> str:
        """Twelve hex digits that name the weights and tokens the directory was exported with."""
        return self._now().parts.revision

    def recommend_many(self, requests: Iterable[Request]) -> list[Ranking]:
        """Answers in the order of the requests, in as few steps as the row budget allows.

        All requests are checked before the first is computed; all are answered by the same revision.
        """
        asked = requests_of(requests, "recommend_many")
        serving = self._now()
        rankings: list[Ranking] = []
        for queries in serving.steps([serving.resolve(request) for request in asked]):
            with serving.lock:
                rankings += serving.step(queries)
        return rankings

    async def submit(self, request: Request, *, timeout_ms: float | None = None) -> Ranking:
        """Waits for its turn in a batch with whatever else was submitted, and for the answer.

        timeout_ms: how long it may wait for its step to begin. Raises InvalidRequest and QueueFull at once,
        DeadlineExceeded when the time is up, EngineClosed if the engine is closed first. A cancelled task takes its
        request out of the queue.
        """
        timeout_ms = None if timeout_ms is None else _milliseconds(timeout_ms)
        waiting = self._enqueue(request, timeout_ms)
        try:
            return await _answer(waiting, timeout_ms)
        except DeadlineExceeded:
            self._scheduler.count_expired()
            raise

    def generate(self, requests: Iterable[Request], max_tokens: int = MAX_TITLE_TOKENS) -> list[Generation]:
        """What the model writes, greedily, as the next item's title: up to a newline or `max_tokens` tokens.

        It is valid where it is the title of one of the request's candidates (of any item without them) that may be
        answered; of several such items the first of the catalogue is meant. Sessions are used and extended.
        Here to compare with: `recommend(head="title")` scores candidates' titles in one pass and is always valid.
        """
        asked, max_tokens = requests_of(requests, "generate"), whole_number("max_tokens", max_tokens, 1)
        if max_tokens > MOST_ANSWER_IDS:
            raise InvalidRequest(f"max_tokens: {max_tokens} are more than any title's {MOST_ANSWER_IDS}; ask for fewer")
        serving = self._now()
        if not serving.parts.config.heads.title:
            raise InvalidRequest("generate: this model was trained without a title head; use recommend")
        generations: list[Generation] = []
        for queries in serving.steps([serving.resolve(request, "retrieve") for request in asked]):
            with serving.lock:
                generations += serving.generate(queries, max_tokens)
        return generations

    def user_vector(self, history: Sequence[str]) -> NDArray[np.float32]:
        """[d]: its dot product with an item's vector is that item's retrieve score, prior and followers aside."""
        vector: NDArray[np.float32] = self.user_vectors([Request(history)])[0]
        return vector

    def user_vectors(self, requests: Iterable[Request]) -> NDArray[np.float32]:
        """[B, d] in the order of the requests; their sessions are used and extended. InvalidRequest where there
        is no retrieve head."""
        serving, queries = self._retrieving(requests, "user_vectors")
        return _vectors(serving, queries)

    def scores(self, requests: Iterable[Request], ids: Sequence[str]) -> NDArray[np.float32]:
        """[B, n]: what the retrieve head gives each of these items, prior and followers in it, whether or not it may be
        answered; `recommend`'s up to rounding. The whole catalogue's scores are many: for the best of them ask
        `recommend`. InvalidRequest where there is no retrieve head."""
        serving, queries = self._retrieving(requests, "scores")
        rows = serving.catalogue.rows(item_ids(ids, "scores"), "scores")
        vectors, scores = _vectors(serving, queries), np.empty((len(queries), len(rows)), np.float32)
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            with serving.lock:
                scores[:, part] = serving.retrieve_scores(vectors, rows[part])
        for line, query in zip(scores, queries, strict=True):
            if query.following is not None:
                line += query.following.of(rows)
        return scores

    def _retrieving(self, requests: Iterable[Request], where: str) -> tuple[Serving, list[Query]]:
        """What these requests ask without their candidates."""
        asked = [replace(request, candidates=None, head=None) for request in requests_of(requests, where)]
        serving = self._now()
        if not serving.parts.config.heads.retrieve:
            raise InvalidRequest(f"{where}: this model was trained without a retrieve head; use recommend")
        return serving, [serving.resolve(request) for request in asked]

    def item_vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Item tokens [n, d] of these ids."""
        serving = self._now()
        with serving.lock:
            return serving.item_vectors(item_ids(ids, "item_vectors"))

    def similar_items(self, item_id: str, k: int = 10) -> Ranking:
        """The k items whose tokens are nearest by cosine, the item itself left out."""
        serving = self._now()
        request = Request([item_id], k)
        serving.catalogue.rows([item_id], "similar_items")
        query = serving.resolve(request, "retrieve")
        with serving.lock:
            return serving.ranking(query, serving.scorer.similar(query))

    def session(self, user_id: str) -> Session:
        """The user's history as this engine holds it until `close_session`, empty at first; all sessions of a user are
        one. For millions of users send histories with requests instead: keys and values are found by `user_id`."""
        self._now()
        check_user(user_id)
        return Session(self, user_id)

    def held_history(self, user_id: str, keep: bool) -> History:
        """What the user's sessions hold. keep: for who writes to it; a history that is only read, of a user who has
        none, is forgotten at once."""
        self._now()
        # one atomic call and no lock: a reload takes seconds
        return self._histories.setdefault(user_id, History()) if keep else self._histories.get(user_id, History())

    def warm(
        self,
        user_id: str,
        history: Sequence[str],
        *,
        times: Sequence[float] | None = None,
        history_offset: int = 0,
        on_unknown: OnUnknown = "error",
        pin: bool = False,
    ) -> int:
        """Computes a user's session ahead of the request, without an answer; returns the rows that took.

        history, times, history_offset, on_unknown: as a request's. pin: evict this session only when there are none but
        pinned ones; see `pin_session`. CacheExhausted where that is refused; the session is computed all the same.
        """
        check_user(user_id)
        pin = true_or_false("pin", pin)
        request = Request(history, user_id=user_id, times=times, history_offset=history_offset, on_unknown=on_unknown)
        serving = self._now()
        query = serving.resolve(request, "retrieve")
        pin, pinned = pin and bool(query.window.size), False
        with serving.lock:
            before = serving.runner.rows_computed
            with serving.forward([query]):
                pass
            rows = serving.runner.rows_computed - before
            if pin:  # before a step of somebody else's may evict it
                pinned = self._pin(serving, user_id)
        if pin and not pinned:
            raise CacheExhausted(
                f"warm: pin: {shown(user_id)} is computed and not pinned: pinned sessions would exceed kv_budget, "
                f"{self.config.kv_budget!r}; raise it, or take others back with pin_session(user_id, False)"
            )
        return rows

    def pin_session(self, user_id: str, pinned: bool = True) -> bool:
        """Keeps (or, with False, stops keeping) a user's session while there are others to evict. False if there is no
        session, or if pinned ones would exceed the KV budget. A pin outlives a reload: there the user's session is
        pinned when it is computed again."""
        check_user(user_id)
        if true_or_false("pinned", pinned):
            return self._pin(self._now(), user_id)
        with self._pinning:
            serving = self._now()  # the one of before a reload, which takes its pins along later, or the new one
            found = bool(serving.cache.manager.pin(user_id, False)) or user_id in serving.to_pin
            serving.to_pin.discard(user_id)
        return found

    def _pin(self, serving: Serving, user_id: str) -> bool:
        with self._pinning:
            pinned = bool(serving.cache.manager.pin(user_id))
            if pinned and self._serving is not None and self._serving is not serving:
                self._serving.to_pin.add(user_id)  # a reload has taken the others along already
        return pinned

    def close_session(self, user_id: str) -> bool:
        """Forgets a user's history, keys and values; true if there were any."""
        check_user(user_id)
        with self._pinning:
            serving = self._now()
            held = self._histories.pop(user_id, None)
            serving.to_pin.discard(user_id)
            closed = bool(serving.cache.manager.close(user_id))
        return closed or bool(held and held.ids)

    def check_items(self, ids: Sequence[str], where: str) -> None:
        """Raises UnknownItem, `where` in its message, for ids that are not in the catalogue."""
        self.catalogue.rows(ids, where)

    @property
    def reads_times(self) -> bool:
        """Whether the model reads when the history's items were taken."""
        return self._now().layout.config.calendar is not None

    def upsert(self, items: Iterable[Item]) -> int:
        """Adds new items and replaces known ones; returns how many were new. Removed ones come back.

        Encoders and compressor run before, beside other requests. An item whose token changes gets a new version: no
        session reads keys of the old one. Raises DataError that names the item, or CatalogueFull; nothing is changed.
        """
        given = all_of(items, Item, "upsert", "[Item(item_id, text=...)]")
        serving = self._now()
        serving.catalogue.check_room(item.item_id for item in given)  # encoding them may take long
        if serving.parts.config.heads.title:
            serving.title_text.answers([item.title for item in given if item.title])  # refuses those beyond its words
        update = ItemUpdate(
            item_ids=tuple(item.item_id for item in given),
            tokens=serving.embedder.tokens(given),
            with_token=np.array([item.has_features for item in given], np.bool_),
            titles=tuple(item.title for item in given),
            available=tuple(item.available for item in given),
            priors=tuple(item.prior for item in given),
        )
        return len(self._change(lambda catalogue: catalogue.prepare_put(update), serving).added)

    def remove(self, ids: Sequence[str]) -> None:
        """Items that are never recommended again, but still read in old histories. Raises UnknownItem, none removed."""
        self._change(lambda catalogue: catalogue.prepare_remove(ids))

    def set_available(self, ids: Sequence[str], available: bool = True) -> None:
        """Whether these items may be recommended. Raises UnknownItem, none changed."""
        self._change(lambda catalogue: catalogue.prepare_available(ids, available))

    def set_prior(self, priors: Mapping[str, float]) -> None:
        """Priors by item id, for those named; they are added to scores at once and touch no session. Raises UnknownItem
        or DataError, none changed."""
        self._change(lambda catalogue: catalogue.prepare_prior(priors))

    def reload(self, path: str | Path) -> str:
        """Serves another engine directory from the next step on; returns its revision.

        It is read, verified and put on the device beside the old one, which goes on serving meanwhile and stays if
        that fails (ArtifactError, ConfigError). What was upserted or set at run time ends with the old one; sessions
        keep their histories and stay pinned, their keys and values are computed anew.
        """
        with self._changing:
            old = self._now()
            parts = EngineParts.load(given_path(path, "reload", "an engine directory"))
            serving = self._make_serving(parts)
            if self._is_warm:
                with serving.lock:
                    serving.warm_up()
            with self._pinning:
                serving.to_pin = old.to_pin.union(old.cache.manager.pinned())
                self._serving = serving
        if self._is_warm:
            self._freeze()
        return parts.revision

    def save(self, path: str | Path) -> str:
        """Writes an engine directory with the catalogue as it stands, upserts, priors and availability in it; returns
        its revision. It is whole or not there at all (ArtifactError); this engine goes on serving what it serves.

        Removed items are saved as not available, since old histories still read them. Onto the directory it was loaded
        from, the engine goes on from there: `revision` is the new one's.
        """
        out = given_path(path, "save", "an engine directory")
        with self._changing:
            serving = self._now()
            # beside steps, which only read it: no request waits for a catalogue of gigabytes
            catalogue = serving.catalogue
            with in_one_order(self.device):
                table, tokens = catalogue.table(), catalogue.served_tokens()
            saved = serving.parts.with_catalogue(table, tokens).save(out)
            known = serving.parts.artifact
            if known is not None and out.resolve() == known.path.resolve():
                # by the path that `load` made independent of where the process stands
                serving.parts = replace(serving.parts, artifact=replace(saved, path=known.path))
        return str(saved.manifest["revision"])

    def stats(self) -> EngineStats:
        queue = self._scheduler
        return self._now().stats(len(queue), queue.num_refused, queue.num_expired)

    def check_integrity(self) -> None:
        """Raises if the cache's books disagree; for tests and debugging."""
        self._now().cache.manager.check_integrity()

    def _now(self) -> Serving:
        serving = self._serving
        if serving is None:
            raise EngineClosed("the engine is closed; load another with Engine.load")
        if self._process != os.getpid():
            raise EngineClosed(
                "the engine belongs to the process that this one was forked from, and its threads stayed there; "
                "load an engine in each process"
            )
        return serving

    def _change(self, prepare: Callable[[Catalogue], Change], expected: Serving | None = None) -> Change:
        """What has been prepared beside steps is put in place between two of them; `expected` is the serving a change
        was made for."""
        with self._changing:
            serving = self._now()
            if expected is not None and serving is not expected:
                raise DataError("upsert: the engine was reloaded while the items were encoded; upsert them again")
            # looking up and checking may take long, and no request waits for it
            with in_one_order(self.device):
                change = prepare(serving.catalogue)
            with serving.lock:
                serving.catalogue.apply(change)
        return change

    def _enqueue(self, request: Request, timeout_ms: float | None) -> Waiting:
        [asked] = requests_of([request], "submit")
        serving = self._now()
        waiting = self._scheduler.put(serving.resolve(asked), serving, timeout_ms)
        self._worker.start()
        return waiting


def _serving_of(engine: "weakref.ref[Engine]") -> Callable[[], Serving | None]:
    """The engine's serving, as long as somebody holds the engine and it is open."""

    def current() -> Serving | None:
        held = engine()
        return held._serving if held is not None else None

    return current


def _vectors(serving: Serving, queries: Sequence[Query]) -> NDArray[np.float32]:
    """[B, d] user vectors, in as many steps as it takes."""
    vectors = [np.zeros((0, serving.catalogue.tokens.shape[1]), np.float32)]
    for part in serving.steps(queries):
        with serving.lock:
            vectors.append(serving.user_vectors(part))
    return np.concatenate(vectors)


async def _answer(waiting: Waiting, timeout_ms: float | None) -> Ranking:
    """Of a request in the queue. Raises DeadlineExceeded where its step has not begun in time."""
    answer = asyncio.wrap_future(waiting.future)
    answer.add_done_callback(_look_at)  # whoever is cancelled asks no more, and asyncio would complain
    try:
        return await asyncio.wait_for(asyncio.shield(answer), None if timeout_ms is None else timeout_ms / 1e3)
    except TimeoutError:
        if timeout_ms is not None and waiting.future.cancel():
            raise deadline_error(timeout_ms) from None
        return await answer  # its step has begun
    except asyncio.CancelledError:
        waiting.future.cancel()
        raise


def _close_queue(scheduler: Scheduler, process: int) -> None:
    if process == os.getpid():
        scheduler.close()


def _look_at(answer: "asyncio.Future[Ranking]") -> None:
    if not answer.cancelled():
        answer.exception()


def _milliseconds(timeout_ms: object) -> float:
    number = isinstance(timeout_ms, int | float | np.integer | np.floating) and not isinstance(timeout_ms, bool)
    if not (number and timeout_ms > 0):  # type: ignore[operator]
        raise InvalidRequest(f"timeout_ms: expected a positive number of milliseconds, got {shown(timeout_ms)}")
    try:
        return float(timeout_ms)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
