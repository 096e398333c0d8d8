"""What a run has found: flat keys for programs, tables for people. Written after every section."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Value = float | int | str | bool | None
LINE = 160  # columns of a table where stdout is no terminal


class Report:
    """Keys are put once each; `path` gets them as JSON after every section, whatever happens next."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: dict[str, Value] = {}
        self.tables: list[tuple[str, Table]] = []
        self.notes: list[str] = []

    def put(self, key: str, value: Value) -> None:
        """A figure under its flat key. Raises ValueError for a key that is taken, or a figure that is none."""
        if key in self.values:
            raise ValueError(f"key {key!r} is measured twice")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}: {value} is no figure")
        self.values[key] = rounded(value)

    def describe(self, found: dict[str, Any]) -> None:
        """The machine and the run, as keys of their own."""
        for key, value in found.items():
            self.put(f"machine_{key}", value)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """The first column is text, the others are figures; None is shown as a dash."""
        table = Table()
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
        for row in rows:
            table.add_row(*(cell(value) for value in row))
        self.tables.append((title, table))

    def note(self, line: str) -> None:
        """Something that was left out, and why."""
        self.notes.append(line)

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.values, indent=1) + "\n")

    def show(self, console: Console | None = None) -> None:
        """Tables and notes, then one line of JSON, the last."""
        self.write()
        shown = console or Console()
        if console is None and not shown.is_terminal:
            shown = Console(width=LINE)
        for title, table in self.tables:
            shown.print(f"\n{title}", style="bold", markup=False, highlight=False)
            shown.print(table)
        for line in self.notes:
            shown.print(line, markup=False, highlight=False)
        print(json.dumps(self.values), flush=True)


def rounded(value: Value) -> Value:
    """Four significant digits: more is noise."""
    return float(f"{value:.4g}") if isinstance(value, float) and not isinstance(value, bool) else value


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
