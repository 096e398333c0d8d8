"""What the GPU path is meant to reach on an H200, in bf16, beside what bench/gpu.py has found.

30 rows of instruction, 30 of history, 20 candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]
COLD, WARM = "cold 30 + 20", "warm 1 + 20"
DEVICE_MS = {"0.5b": 0.35, "1.5b": 0.9, "7b": 4.0}
STATIC = "static cache + 4-D mask, eager"
SEARCHED = 1_000_000  # items


@dataclass(frozen=True)
class Goal:
    """`measure` takes a file's content and raises KeyError, or ValueError, where it does not hold what is needed."""

    name: str
    bound: float
    measure: Callable[[Found], float]
    at_most: bool = True

    def row(self, found: Found) -> dict[str, Any] | None:
        """What was found, the bound, and whether it is kept; None where it was not measured."""
        try:
            value = self.measure(found)
        except (KeyError, ValueError):
            return None
        kept = value <= self.bound if self.at_most else value >= self.bound
        return {"found": value, "bound": self.bound, "at_most": self.at_most, "reached": kept}


def goals_of(found: Found) -> dict[str, dict[str, Any]]:
    """Every goal that has a figure."""
    rows = {goal.name: goal.row(found) for goal in GOALS}
    return {name: row for name, row in rows.items() if row is not None}


def _latency(found: Found, shape: str, name: str) -> Mapping[str, float]:
    row: Mapping[str, float] = found["steps"][shape]["latency"][name]
    return row


def _device_ms(shape: str) -> Callable[[Found], float]:
    return lambda found: _latency(found, shape, COLD)["device_us"] / 1e3


def _behind_device_ms(found: Found) -> float:
    """At 0.5B: what a request takes beside its pass."""
    row = _latency(found, "0.5b", COLD)
    return float(row["p50_ms"] - row["device_us"] / 1e3)


def _of_limit(found: Found) -> float:
    return max(float(row["of_limit"]) for row in found["steps"]["0.5b"]["saturated"].values() if "of_limit" in row)


def _over_a_read(found: Found) -> float:
    """At most, over one user and many."""
    rows = [row for name, row in found["searches"].items() if name.startswith(f"top_scores {SEARCHED} items")]
    return max(1 / float(row["of_copy"]) for row in rows)


def _fp8(found: Found) -> float:
    return _latency(found, "7b", COLD)["device_us"] / _latency(found, "7b, weights fp8", COLD)["device_us"]


def _times_transformers(found: Found) -> float:
    theirs: float = found["transformers"]["0.5b"][f"{STATIC}, {COLD}"]["p50_ms"]
    return theirs / _latency(found, "0.5b", COLD)["p50_ms"]


GOALS = (
    *(Goal(f"{shape}, cold: ms of the device", bound, _device_ms(shape)) for shape, bound in DEVICE_MS.items()),
    Goal("0.5b, cold: ms more from request to answer", 0.15, _behind_device_ms),
    Goal("0.5b, saturated, warm: of the limit", 0.5, _of_limit, at_most=False),
    Goal("top 10 of 1,000,000 x 896: of one read of the table", 1.3, _over_a_read),
    Goal("7b, cold: bf16's time over fp8's", 1.5, _fp8, at_most=False),
    Goal("0.5b, cold: times transformers (sdpa, static cache, eager)", 3.0, _times_transformers, at_most=False),
)
