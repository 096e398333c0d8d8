"""What an evaluation found: means, and values per user for intervals; kept in a file. Computes no scores."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.metrics import Rows, Values, per_user
from speeder_engine.files import write_atomic

FORMAT = "speeder report 1"


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
    `notes` are the caller's own (a seed, a variant), anything that JSON can hold.
    """

    system: str
    uses_time: bool
    users: Rows
    ranks: Rows
    metrics: dict[str, float]
    on_candidates: CandidateOutcome | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

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

    def save(self, path: Path | str, notes: Mapping[str, Any] | None = None) -> None:
        """One .npz without pickle, old or new at every moment; `notes` are added to the report's own."""
        told = {"format": FORMAT, **self.to_json(), "notes": {**self.notes, **(notes or {})}}
        arrays = {"users": self.users, "ranks": self.ranks, "report": np.array(json.dumps(told))}
        if self.on_candidates is not None:
            arrays |= {"candidate_ranks": self.on_candidates.ranks, "valid": self.on_candidates.valid}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        write_atomic(Path(path), content.getvalue())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """DataError where `path` is no report as `save` writes it."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                told = json.loads(str(arrays["report"]))
                if told["format"] != FORMAT:
                    raise ValueError(f"its format is {told['format']!r}, not {FORMAT!r}")
                outcome = None
                if "valid" in arrays:
                    outcome = CandidateOutcome(arrays["candidate_ranks"], arrays["valid"])
                users, ranks, metrics = arrays["users"], arrays["ranks"], told["metrics"]
            return cls(told["system"], told["uses_time"], users, ranks, metrics, outcome, told["notes"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a readable report ({error}); evaluate again and save it") from error
