"""Several reports on the same queries: groups of users in each, and differences to one of them. Scores nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from rich.table import Table

from speeder_engine.evaluation.bootstrap import Interval, paired_difference
from speeder_engine.evaluation.groups import GROUP_METRICS, Grouping, GroupMetrics, grouped
from speeder_engine.evaluation.report import Report
from speeder_engine.evaluation.report_table import difference_table, group_table, report_table
from speeder_engine.evaluation.results import PAIRED_METRICS


@dataclass(frozen=True, eq=False)
class Comparison:
    """`groups[by][system]` and `differences[system][metric]`, the latter to the system `against`, not of itself."""

    reports: list[Report]
    groups: dict[str, dict[str, list[GroupMetrics]]]
    against: str | None
    differences: dict[str, dict[str, Interval]]

    @classmethod
    def of(cls, reports: list[Report], groupings: Sequence[Grouping] = (), against: str | None = None) -> Self:
        """All that is asked for; `against` names one of the reports' systems."""
        groups = {each.by: {report.system: grouped(report, each) for report in reports} for each in groupings}
        base = {report.system: report for report in reports}.get(against or "")
        differences = {}
        if base is not None:
            others = [report for report in reports if report.system != against]
            differences = {report.system: _differences(report, base) for report in others}
        return cls(reports, groups, against, differences)

    def tables(self) -> Iterator[Table]:
        yield report_table(self.reports)
        for by, groups in self.groups.items():
            yield group_table(by, groups, GROUP_METRICS)
        if self.against is not None and self.differences:
            yield difference_table(self.against, self.differences)

    def to_json(self) -> list[dict[str, Any]]:
        """`Report.to_json` of each, with `groups` (by, then a list) and `difference` (against, then metrics) if any."""
        return [report.to_json() | self._details(report.system) for report in self.reports]

    def _details(self, system: str) -> dict[str, Any]:
        details: dict[str, Any] = {}
        if self.groups:
            details["groups"] = {by: [asdict(each) for each in groups[system]] for by, groups in self.groups.items()}
        if system in self.differences:
            found = self.differences[system]
            intervals = {name: asdict(each) | {"excludes_zero": each.excludes_zero} for name, each in found.items()}
            details["difference"] = {"against": self.against, **intervals}
        return details


def _differences(report: Report, base: Report) -> dict[str, Interval]:
    on_lists = report.on_candidates is not None and base.on_candidates is not None
    metrics = [name for name in PAIRED_METRICS if on_lists or name != "vhr@1"]
    return {name: paired_difference(report, base, name) for name in metrics}
