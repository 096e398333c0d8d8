"""ServedEngine: the graphs of a model server with the face of `Engine`, so that they are compared as all others are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.export.graph_engine import GraphEngine, GraphFiles, pad
from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.onnx_session import Array, GraphSession
from speeder_engine.export.served_graph import ROWS
from speeder_engine.export.user_cache import UserState

# what stands in for which graph of an ONNX export
STANDS_FOR = {"recommend": "recommend", "score": "score", "session": "extend"}
PRESENT_ROWS = "present_rows"
TOP = {"top_rows": "rows", "top_scores": "scores"}
OUTPUTS = {
    "recommend": TOP,
    "score": {"scores": "scores", "retrieve_scores": "scores"},
    "session": TOP | {"scores": "candidate_scores", "retrieve_scores": "candidate_scores"},
}
NARROWEST = 8  # of padded rows, as the steps around the graphs send them


class ServedRunner(GraphSession):
    """A served graph under ONNX Runtime, called as the graph that it stands for."""

    def __init__(self, path: Path, spec: GraphSpec) -> None:
        super().__init__(path, "cpu")
        self.spec = spec

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Any]]:
        """As `GraphSession.run`; what is a constant of this graph is not asked for."""
        given = {"history" if name == "rows" else name: value for name, value in inputs.items()}
        own = OUTPUTS[self.spec.name]
        found, values = super().run(
            {name: _served(name, given[name]) for name in self.spec.inputs}, [own[name] for name in outputs], kept
        )
        return dict(zip(outputs, found.values(), strict=True)), values


class ServedEngine(GraphEngine):
    """Served graphs, for what they answer alike: any request of one head, its k at most the graphs'."""

    def __init__(self, files: GraphFiles, graphs: Mapping[Path, GraphSpec]) -> None:
        sessions = {STANDS_FOR[spec.name]: ServedRunner(path, spec) for path, spec in graphs.items()}
        super().__init__(files, sessions, "1GiB")
        # a state goes in as it came out, as a server hands it on
        self._past, self._present = (*self._past, ROWS), (*self._present, PRESENT_ROWS)

    def _no_past(self) -> list[Any]:
        """As a sequence begins: zeros."""
        (heads, size), window = self._kv_shape, self.layout.config.window
        empty = np.zeros((1, heads, window, size), self.files.config.dtype)
        return [*[empty] * (len(self._past) - 1), np.zeros((1, window), np.int64)]

    def _state(self, keys: NDArray[np.int32], values: Sequence[Any]) -> UserState:
        return UserState(keys, values, self.layout.config.window)


def _served(name: str, value: Any) -> Any:
    """An input as these graphs take it: everything begins with the batch, few widths occur."""
    if name in ("lengths", "past_lengths"):
        return value[:, None]
    return pad(value, 0, NARROWEST) if name in ("history", "buckets") else value
