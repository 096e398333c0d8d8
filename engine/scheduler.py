"""Cuts a list of requests into steps that fit the row budget. Speaks lengths, never tensors."""

from collections.abc import Iterator, Sequence

from speeder_engine.config import EngineConfig


def cut_into_steps(num_rows: Sequence[int], config: EngineConfig) -> Iterator[slice]:
    """Consecutive slices of requests: each within `max_batch_users` and, unless it is a single request, within
    `max_batch_rows` even if nothing is cached."""
    start = rows = 0
    for index, count in enumerate(num_rows):
        full = index - start == config.max_batch_users or rows + count > config.max_batch_rows
        if full and index > start:
            yield slice(start, index)
            start, rows = index, 0
        rows += count
    if start < len(num_rows):
        yield slice(start, len(num_rows))
