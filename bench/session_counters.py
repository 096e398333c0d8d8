"""Rows computed for a returning user, by what happened since: `python bench/session_counters.py`.

Counts, not seconds: they are the same on every machine. Histories of 10, 50 and 200 items in a window of 50 that slides
by 10, and in a window of 256.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from speeder_engine import Engine, EngineConfig, Item
from speeder_engine.random_engine import FEATURES, random_parts

HISTORIES = (10, 50, 200)
WINDOWS = ((50, 10), (256, 32))
NUM_CANDIDATES = 20


def count(window: int, step: int, length: int) -> dict[str, int]:
    """Rows by event, each event on top of the ones before it."""
    parts = random_parts(num_items=1000, window=window, window_step=step)
    with Engine(parts, EngineConfig(dtype="float32", kv_budget="64MiB")) as engine:
        rng = np.random.default_rng(length)
        ids = [engine.catalogue.item_ids[row] for row in rng.permutation(1000)]
        history, candidates = ids[:length], ids[-NUM_CANDIDATES:]

        def rows(call: Callable[[], object]) -> int:
            before = engine.stats().rows_computed
            call()
            return engine.stats().rows_computed - before

        def ask(known: list[str], candidates: list[str] | None = None) -> int:
            return rows(lambda: engine.recommend(known, user_id="user", candidates=candidates))

        found = {"cold": ask(history), "repeated": ask(history)}
        found[f"{NUM_CANDIDATES} candidates"] = ask(history, candidates=candidates)
        appended = ids[: length + 1]
        found["after append"] = ask(appended)
        found["append + candidates"] = ask(ids[: length + 2], candidates=candidates)
        # appends until the window moves
        longer = length + 2
        start = engine._now().layout.start
        while start(longer + 1) == start(longer) and longer < window + length:
            longer += 1
            ask(ids[:longer])
        found["after slide"] = ask(ids[: longer + 1])
        middle = start(longer + 1) + (longer + 1 - start(longer + 1)) // 2
        vectors = {name: rng.normal(size=width) for name, width in FEATURES.items()}
        engine.upsert([Item(ids[middle], vectors=vectors)])
        found["after upsert of the middle item"] = ask(ids[: longer + 1])
        corrected = [*ids[:middle], ids[-1], *ids[middle + 1 : longer + 1]]
        found["middle item corrected"] = ask(corrected)
        engine.check_integrity()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    as_json = parser.parse_args().json
    console, results = Console(), {}
    for window, step in WINDOWS:
        columns = {length: count(window, step, length) for length in HISTORIES}
        results[f"window {window}, step {step}"] = columns
        table = Table("rows computed", *(f"history {length}" for length in HISTORIES))
        table.title = f"window {window}, sliding by {step}"
        for event in columns[HISTORIES[0]]:
            table.add_row(event, *(str(columns[length][event]) for length in HISTORIES))
        if not as_json:
            console.print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
