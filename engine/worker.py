"""Worker: the thread that turns what waits in the queue into steps."""

import atexit
import logging
import os
import threading
from collections.abc import Callable, Sequence

from speeder_engine.scheduler import Scheduler, Waiting
from speeder_engine.serving import Serving

log = logging.getLogger("speeder_engine")
_running: dict[threading.Thread, Scheduler] = {}  # of all engines of this process


@atexit.register
def _end_all() -> None:
    """A thread that is still in native code when the interpreter goes takes the process down with it."""
    for thread, scheduler in list(_running.items()):
        scheduler.close()
        thread.join()


os.register_at_fork(after_in_child=_running.clear)


class Worker:
    """Starts with the first request. `serving()` says what serves now, None when it is over; it keeps nothing alive
    while it waits."""

    def __init__(self, scheduler: Scheduler, serving: Callable[[], Serving | None]) -> None:
        self._scheduler = scheduler
        self._serving = serving
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """Harmless if it runs."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    arguments = (self._scheduler, self._serving)
                    thread = threading.Thread(target=_run, args=arguments, name="speeder-engine", daemon=True)
                    # before it starts: an interpreter that ends at once must know of it
                    _running[thread] = self._scheduler
                    try:
                        thread.start()
                    except BaseException:
                        _running.pop(thread, None)
                        raise
                    self._thread = thread

    def stop(self) -> None:
        """Ends after the step that runs; what waits fails with EngineClosed. A second time is harmless."""
        self._scheduler.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _run(scheduler: Scheduler, current: Callable[[], Serving | None]) -> None:
    try:
        _work(scheduler, current)
    except Exception:
        # nothing a request does gets here; a bug must not leave everybody waiting for good
        log.exception("the engine's worker failed and stops")
        scheduler.close()
    finally:
        _running.pop(threading.current_thread(), None)


def _work(scheduler: Scheduler, current: Callable[[], Serving | None]) -> None:
    while scheduler.wait():
        serving = current()
        if serving is None:
            return
        with serving.lock:
            if current() is serving:  # it may have been replaced while its last step ran
                answer(serving, scheduler.take(_refresher(serving), serving.num_rows))
        del serving


def _refresher(serving: Serving) -> Callable[[Waiting], None]:
    """Resolves requests anew that were resolved by what served before a reload, or with titles as they stood then."""

    def refresh(waiting: Waiting) -> None:
        if waiting.owner is not serving or serving.is_stale(waiting.query):
            try:
                waiting.query, waiting.owner = serving.resolve(waiting.query.request), serving
            except Exception as error:
                waiting.fail(error)

    return refresh


def answer(serving: Serving, taken: Sequence[Waiting]) -> None:
    """Runs one step; where it fails, each request alone, so that one can't spoil the others' answers."""
    if not taken:
        return
    try:
        rankings = serving.step([waiting.query for waiting in taken])
    except Exception as error:
        if len(taken) == 1:
            taken[0].fail(error)
            return
        for waiting in taken:
            answer(serving, [waiting])
        return
    for waiting, ranking in zip(taken, rankings, strict=True):
        waiting.future.set_result(ranking)
