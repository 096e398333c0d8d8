"""What every section of a benchmark run is given: the model, the limits of the machine, where results go, how long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from limits import Limits
from measure import Clock
from report import Report
from rich.progress import Progress
from subject import Subject
from waiting import SETTLE, spinning
from workload import BenchUser, Workload, make_users

T = TypeVar("T")


@dataclass
class Bench:
    """One run. `only`: contenders to compare with, none named: all there are."""

    shape: str
    engine_dir: Path | None
    device: torch.device
    dtype: str
    quick: bool
    only: tuple[str, ...]
    report: Report
    clock: Clock
    progress: Progress | None = None  # the run's bars, where one is shown

    def track(self, items: Sequence[T], description: str) -> Iterator[T]:
        """The items under a bar among the run's; a terminal has one place for bars."""
        if self.progress is None:
            yield from items
            return
        task = self.progress.add_task(description, total=len(items), note="")
        for item in items:
            self.progress.update(task, note=str(item))
            yield item
            self.progress.advance(task)
        self.progress.update(task, note="")

    @cached_property
    def subject(self) -> Subject:
        """Made when first asked for: sections that need no model don't wait for one."""
        if self.engine_dir is not None:
            return Subject.load(self.engine_dir, dtype=self.dtype, device=str(self.device))
        num_items = 2_000 if self.quick else 10_000
        return Subject.random(self.shape, num_items=num_items, dtype=self.dtype, device=str(self.device))

    @cached_property
    def limits(self) -> Limits:
        """As measured now, when first asked for; `run.py` does so at its start and measures again at its end."""
        limits = Limits(self.device, self.quick)
        limits.measure(3 if self.quick else 10, self.clock)
        return limits

    @property
    def subject_name(self) -> str:
        return f"{self.shape if self.engine_dir is None else 'engine'}, {self.dtype}, {self.device.type}"

    @property
    def pause(self) -> float:
        """Seconds before each call that is timed: threads that still spin for one would take a core from the next."""
        return SETTLE if spinning() else 0.0

    @property
    def workload(self) -> Workload:
        return self.subject.workload

    def users(self, count: int, seed: int = 0) -> list[BenchUser]:
        return make_users(count, self.subject.num_items, self.workload, seed)

    def rounds(self, quick: int, full: int) -> int:
        return quick if self.quick else full
