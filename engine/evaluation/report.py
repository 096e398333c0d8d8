"""What an evaluation found: means for people and machines, values per user for intervals. Computes no scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import Rows, Values, per_user

COLUMNS = ("vhr@1", "valid_ratio", "hr@1", "hr@10", "ndcg@10", "mrr", "coverage@10")


@dataclass(frozen=True, eq=False)
class CandidateOutcome:
    """On candidate lists: `ranks` int32 [Q] of the target among its list, `valid` bool [Q], an answer was given."""

    ranks: Rows
    valid: NDArray[np.bool_]

    @property
    def correct(self) -> NDArray[np.bool_]:
        correct: NDArray[np.bool_] = self.valid & (self.ranks == 0)
        return correct


@dataclass(frozen=True, eq=False)
class Report:
    """One system on one set of queries, one query a user.

    `ranks` int32 [Q] are of the targets over the full catalogue, from 0, for `users` int32 [Q]; `metrics` has flat
    keys: `hr@K`, `ndcg@K`, `mrr`, `coverage@10`, and on candidate lists `vhr@1`, `valid_ratio`, `hr@1_valid`.
    """

    system: str
    uses_time: bool
    users: Rows
    ranks: Rows
    metrics: dict[str, float]
    on_candidates: CandidateOutcome | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.ranks)}
        if self.on_candidates is not None:
            lengths |= {len(self.on_candidates.ranks), len(self.on_candidates.valid)}
        if lengths == {0} or len(lengths) > 1:
            raise DataError(f"{self.system}: a report needs one rank for each of its users, not {sorted(lengths)}")

    @property
    def num_users(self) -> int:
        return len(self.users)

    def values(self, metric: str) -> Values:
        """float64 [Q], whose mean is the metric; ConfigError for those that are no mean over users."""
        if metric not in ("vhr@1", "valid_ratio"):
            return per_user(metric, self.ranks)
        if self.on_candidates is None:
            raise ConfigError(f"{self.system}: {metric} needs candidate lists; evaluate with candidates")
        found = self.on_candidates.correct if metric == "vhr@1" else self.on_candidates.valid
        return found.astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`: system, uses_time, num_users, metrics."""
        return {
            "system": self.system,
            "uses_time": self.uses_time,
            "num_users": self.num_users,
            "metrics": dict(self.metrics),
        }


def report_table(reports: Sequence[Report], columns: Sequence[str] = COLUMNS) -> Table:
    """Two classes, without and with knowledge of the query's time; the best of each class and column is bold."""
    shown = [name for name in columns if any(name in report.metrics for report in reports)]
    # all figures stay whole on 80 columns: the headers fold
    numbers = (Column(name, justify="right", min_width=6, overflow="fold") for name in shown)
    table = Table(Column("system", no_wrap=True), *numbers, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for uses_time, title in ((False, "without query time"), (True, "with query time")):
        group = [report for report in reports if report.uses_time is uses_time]
        if not group:
            continue
        table.add_section()
        table.add_row(Text(title, "italic"))
        best = {name: max(report.metrics.get(name, -np.inf) for report in group) for name in shown}
        for report in group:
            cells = [_cell(report.metrics.get(name), best[name]) for name in shown]
            table.add_row(Text(report.system), *cells)
    return table


def _cell(value: float | None, best: float) -> Text:
    if value is None:
        return Text("-", "dim")
    return Text(f"{value:.4f}", "bold" if value == best else "")
