"""Tables for people: what an engine directory holds, and a user's history beside what is recommended."""

from collections.abc import Mapping, Sequence

from rich.table import Column, Table
from rich.text import Text

from speeder_engine.catalogue import Catalogue
from speeder_engine.device import DTYPES
from speeder_engine.inspection import EngineSummary
from speeder_engine.request import Ranking


def readable_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def summary_table(summary: EngineSummary) -> Table:
    decoder = summary.decoder
    shape = f"{decoder['num_layers']} layers x {decoder['hidden_size']}, {decoder['num_heads']} heads"
    table = Table("engine directory", Column(Text(summary.path)), show_edge=True)
    table.add_row("revision", summary.revision)
    table.add_row("items", f"{summary.num_items:,} from {', '.join(summary.modalities)}")
    table.add_row("decoder", f"{shape} ({decoder['num_kv_heads']} for keys), {summary.num_parameters:,} parameters")
    table.add_row("instruction", Text(f"{summary.instruction!r}, {summary.instruction_len} rows, computed once"))
    table.add_row("window", f"{summary.window} items, slides by {summary.window_step}")
    table.add_row("heads", ", ".join(summary.heads))
    table.add_row("on disk", f"{readable_bytes(summary.disk_bytes)} in {len(summary.files) + 1} files")
    table.add_section()
    for name in summary.users_per_gib:
        held = f"{readable_bytes(summary.memory[name])} weights and tokens + " if name in DTYPES else ""
        user, users = readable_bytes(summary.kv_bytes_per_user[name]), f"{summary.users_per_gib[name]:,} users"
        table.add_row(f"memory, {name}" if held else f"KV alone, {name}", f"{held}KV: {user} a user, {users} a GiB")
    return table


def recommendation_table(user: str, history: Sequence[str], ranking: Ranking, catalogue: Catalogue) -> Table:
    """The last items of a history, oldest first, beside the ranking."""
    title = Text(user, "table.title")  # brackets of a user's name are no markup
    table = Table("history, oldest first", "recommended", "score", title=title, title_justify="left", expand=True)
    table.columns[2].justify = "right"
    shown = list(history[-len(ranking) :]) if len(ranking) else list(history[-10:])
    titles = [catalogue.title(item_id) for item_id in shown]
    if len(history) > len(shown):
        titles[0] = f"... {len(history) - len(shown) + 1} earlier"
    found = list(ranking)
    for line in range(max(len(titles), len(found))):
        left = titles[line] if line < len(titles) else ""
        right, score = (catalogue.title(found[line][0]), f"{found[line][1]:.2f}") if line < len(found) else ("", "")
        table.add_row(Text(left), Text(right), score)
    return table


def latency_table(timings: Mapping[str, Sequence[float]]) -> Table:
    """Milliseconds a request by kind of request."""
    table = Table("latency, one user, one thread", "p50 ms", "p95 ms", "p99 ms", "runs")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in timings.items():
        ordered = sorted(seconds)
        cells = [f"{1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))]:.2f}" for q in (0.5, 0.95, 0.99)]
        table.add_row(name, *cells, str(len(ordered)))
    return table
