"""Progress bars for long steps, on stderr so that stdout stays a program's. SPEEDER_PROGRESS=0 silences them."""

import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True)
_silent: ContextVar[bool] = ContextVar("silent", default=False)


def enabled() -> bool:
    return os.environ.get("SPEEDER_PROGRESS", "1") != "0" and not _silent.get()


@contextmanager
def no_bars() -> Iterator[None]:
    """For what runs inside a service: nobody watches."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar whose tasks take a free `note` field (the live loss, the current metric)."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not enabled()) as progress:
        yield progress


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` under a bar; `total` where `items` has no length."""
    count = len(items) if total is None and isinstance(items, Sized) else total
    with progress_bar() as progress:
        task = progress.add_task(description, total=count, note="")
        for item in items:
            yield item
            progress.advance(task)
