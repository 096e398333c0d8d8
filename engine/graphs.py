"""CUDA graphs: the whole pass, heads included, captured for every bucket at warm-up and replayed from then on.

What is captured reads fixed places alone: the step's buffers, weights, the caches, and the catalogue's tensors, which
are written in place and never moved. All captures share one pool of memory: one runs at a time, and what it leaves is
read before the next.
"""

import gc
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from speeder_engine.batch import RowLayout
from speeder_engine.cache import CacheSize
from speeder_engine.config import ROW_TILE, EngineConfig
from speeder_engine.progress import track
from speeder_engine.prompt import PromptLayout
from speeder_engine.step import Outcome, StepModel
from speeder_engine.step_buffers import Bucket, StepBuffers, bucket_words, make_buckets
from speeder_engine.transfer import Transfer
from speeder_engine.triton_kernels.few_rows import BLOCKS_OF_ROWS, MOST_ROWS, block_of

WARM_RUNS = 2  # before a capture: what is compiled, tuned or allocated at first must be
MANY_ROWS = MOST_ROWS + ROW_TILE  # for all passes of more than few rows
# a pass of every kind there is: of every block of few rows, and of many, of which all or a part are read
KINDS = (*(Bucket(rows, rows) for rows in BLOCKS_OF_ROWS), Bucket(MANY_ROWS, MANY_ROWS), Bucket(MANY_ROWS, ROW_TILE))
EXTRA_WORDS = 1 << 17  # of a step beside its rows: lists of excluded items, named candidates


class Capture(Protocol):
    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does what `run` did, on the same tensors, as often as it is called."""
        ...


class CudaCapture:
    """Real graphs, from one pool, captured on a stream of their own.

    What runs before a capture does so on another stream: cuBLAS keeps a workspace by stream, and the graphs' own is to
    come from their pool. From outside, it would be freed under them by whoever clears these workspaces, as
    torch.compile does for graphs of its own.

    No graph of a device is replayed while one is captured there: its generator of random numbers takes part in all of
    them, used or not, and releases of torch refuse to replay while a capture has it. Captured outside of inference
    mode, so that the generator's state can be written in any.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._warming, self._stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._busy = _busy.setdefault(device, threading.Lock())

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            self._warming.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._warming):
                for _ in range(WARM_RUNS):
                    run()
            torch.cuda.current_stream().wait_stream(self._warming)
            graph = torch.cuda.CUDAGraph()
            # an engine that reloads captures while its worker serves: what other threads do must not end a capture
            captured = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
            with self._busy, torch.inference_mode(False), captured:
                run()
            self._replay(graph)  # sends it to the device, which the first step would wait for
        return partial(self._replay, graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with self._busy:
            graph.replay()


_busy: dict[torch.device, threading.Lock] = {}  # by device: held for a capture and for a replay
_capturing = threading.Lock()  # the collector is the process's: one engine at a time


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: what it frees on the device in the middle of a capture would end that."""
    with _capturing:
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """Where there are no graphs: the same computation on the same static tensors, for tests of all around it."""
    run()
    return run


def pick_capture(graphs: str, device: torch.device) -> Capture | None:
    if graphs == "off" or (graphs == "auto" and device.type != "cuda"):
        return None
    return CudaCapture(device) if device.type == "cuda" else run_again


class StepGraph:
    """One bucket's pass: filled in, sent, replayed."""

    _outcome: Outcome  # where the captured pass leaves it

    def __init__(self, buffers: StepBuffers, model: StepModel, capture: Capture) -> None:
        self.buffers = buffers
        self._model = model
        buffers.clear()
        self._replay = capture(self._compute)

    @property
    def block_tables(self) -> Tensor:
        return self.buffers.batch.attention.block_tables

    def run(self, rows: RowLayout) -> Outcome:
        """The outcome is overwritten by the next step, whichever graph's it is."""
        self.buffers.fill(rows)
        self._replay()
        return self._outcome

    @torch.inference_mode()
    def _compute(self) -> None:
        model, batch = self._model, self.buffers.batch
        hidden = model.runner.hidden_states(batch, model.catalogue.tokens)
        self._outcome = replace(model.read(hidden, self.buffers.reads), hidden=None)


class StepGraphs:
    """All buckets' graphs: none until `warm_up`, and never another after it."""

    def __init__(
        self,
        capture: Capture | None,
        model: StepModel,
        layout: PromptLayout,
        transfer: Transfer,
        config: EngineConfig,
    ) -> None:
        self._capture, self._model = capture, model
        self._layout, self._transfer = layout, transfer
        self._buckets = make_buckets(config.row_buckets, config.max_batch_rows)
        self._row_sizes = [bucket.rows for bucket in self._buckets]
        self._graphs: dict[Bucket, StepGraph] = {}
        self.replays = 0

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def warm_up(self) -> None:
        """Captures every bucket, the largest first: the smaller ones then fit into its memory."""
        if self._capture is None or self._graphs:
            return
        graphs = {}
        with uncollected():
            for bucket in track(self._buckets[::-1], "capturing CUDA graphs"):
                buffers = StepBuffers(bucket, self._model.cache, self._layout, self._transfer)
                graphs[bucket] = StepGraph(buffers, self._model, self._capture)
        self._graphs = graphs

    def precompile_passes(self) -> None:
        """Padding through the passes that no graph covers, as they are: their kernels are compiled then, and not in a
        request."""
        covered = {block_of(bucket.rows) if bucket.rows <= MOST_ROWS else MANY_ROWS for bucket in self._graphs}
        for kind in KINDS:
            if kind.rows not in covered:
                buffers = StepBuffers(kind, self._model.cache, self._layout, self._transfer)
                StepGraph(buffers, self._model, run_again)

    def find(self, rows: RowLayout) -> StepGraph | None:
        """The smallest that holds these rows; none for no rows at all, or more than any holds."""
        if not self._graphs or rows.num_rows == 0:
            return None
        at = bisect_left(self._row_sizes, rows.num_rows)
        for bucket in self._buckets[at : at + 2]:
            if bucket.reads >= rows.num_reads:
                self.replays += 1
                return self._graphs[bucket]
        return None


def transfer_words(config: EngineConfig, size: CacheSize) -> int:
    """Room in a transfer's arena for every bucket, and for what a step sends besides."""
    buckets = (*make_buckets(config.row_buckets, config.max_batch_rows), *KINDS)
    return max(bucket_words(bucket, size) for bucket in buckets) + EXTRA_WORDS
