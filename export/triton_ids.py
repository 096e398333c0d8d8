"""A model of Triton's Python backend: item ids <-> rows. It is copied into repositories as it stands and imports
nothing but numpy and what Triton brings.

role "encode"  history, candidates, excluded (strings; "" is padding), times -> rows, padded so that requests can be
               stacked, and how many
role "decode"  rows and scores -> item ids, best first; "" where there is none
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

Rows = NDArray[np.int64]
NARROWEST = 8  # of padded rows; then powers of two, so that few shapes occur and requests share batches
IDS_FILE = "item_ids.json"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """args: as Triton gives them: model_config (JSON), model_repository, model_version."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.settings = json.loads(parameters["settings"]["string_value"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.item_ids = json.loads((folder / IDS_FILE).read_text(encoding="utf-8"))
        self.answers = np.array([*(item_id.encode() for item_id in self.item_ids), b""], dtype=object)
        self.rows = {item_id: row for row, item_id in enumerate(self.item_ids)}

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request: an error of one is no other's."""
        work = self._encode if self.settings["role"] == "encode" else self._decode
        responses = []
        for request in requests:
            try:
                tensors = [pb_utils.Tensor(name, array) for name, array in work(request).items()]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            except ValueError as error:
                failure = pb_utils.TritonError(str(error))
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=failure))
        return responses

    def _encode(self, request: Any) -> dict[str, NDArray[Any]]:
        """Arrays [B, n]; every user's window, and what may not be answered."""
        histories = self._read(request, "history")
        windows = [self._window(history) for history in histories]
        answer: dict[str, NDArray[Any]] = {
            "history_rows": self._pad("history", windows, 0),
            "lengths": np.array([[len(rows)] for rows in windows], dtype=np.int64),
        }
        if "calendar" in self.settings:
            answer["buckets"] = self._buckets(request, histories, windows)
        excluded = self._read(request, "excluded")
        # a session knows itself what the user has taken
        seen = [[]] * len(excluded) if self.settings["session"] else histories
        if excluded:
            closed = [list(dict.fromkeys([*deny, *taken])) for deny, taken in zip(excluded, seen, strict=True)]
            answer["excluded_rows"] = self._pad("excluded", closed, -1)
        if candidates := self._read(request, "candidates"):
            answer["candidate_rows"] = self._pad("candidates", candidates, -1)
        return answer

    def _read(self, request: Any, name: str) -> list[list[int]]:
        """Rows of every user in the request; empty where the model has no such input."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return []
        ids = [[value.decode() for value in row if value] for row in tensor.as_numpy()]
        unknown = list(dict.fromkeys(item_id for row in ids for item_id in row if item_id not in self.rows))
        if unknown:
            more = f" (and {len(unknown) - 5} more)" if len(unknown) > 5 else ""
            raise ValueError(f"{name}: unknown item {', '.join(map(repr, unknown[:5]))}{more}")
        return [[self.rows[item_id] for item_id in row] for row in ids]

    def _window(self, history: list[int]) -> list[int]:
        """The part of a history that the model sees: it begins at 0 and moves on in whole steps."""
        window, step = self.settings["window"], self.settings["window_step"]
        over = len(history) - window
        start = 0 if over <= 0 else step * -(-over // step)
        if start and self.settings["session"]:
            kept = len(history) - start
            raise ValueError(
                f"history: {len(history)} items are more than the window of {window}; start a sequence "
                f"with the last {kept}"
            )
        return history[start:]

    def _buckets(self, request: Any, histories: list[list[int]], windows: list[list[int]]) -> Rows:
        """Calendar buckets of the windows; 0 is a time that is not known."""
        calendar = self.settings["calendar"]
        times = pb_utils.get_input_tensor_by_name(request, "times").as_numpy()
        buckets = []
        for row, history, window in zip(times, histories, windows, strict=True):
            own = row[len(history) - len(window) : len(history)]
            passed = (own - calendar["first_second"]) // calendar["bucket_seconds"]
            found = np.clip(passed, 0, calendar["num_buckets"] - 1).astype(np.int64) + 1
            buckets.append(np.where(own == 0, 0, found).tolist())
        return self._pad("history", buckets, 0)

    def _pad(self, name: str, rows: list[list[int]], value: int) -> Rows:
        """[B, width]: the next of a few widths, at most what the graph takes."""
        longest, most = max(map(len, rows), default=0), self.settings["most"][name]
        if longest > most:
            raise ValueError(f"{name}: {longest} items are more than the {most} this repository takes")
        width = NARROWEST
        while width < longest:
            width *= 2
        padded = np.full((len(rows), min(width, most)), value, dtype=np.int64)
        for b, each in enumerate(rows):
            padded[b, : len(each)] = each
        return padded

    def _decode(self, request: Any) -> dict[str, NDArray[Any]]:
        """Rows and scores [B, n] -> item ids and scores, best first; equal scores keep their order."""
        self._check_session(request)
        rows, scores = (_array(request, name) for name in ("rows", "scores"))
        order = np.argsort(-scores, axis=1, kind="stable")
        rows, scores = np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
        answered = np.isfinite(scores) & (rows >= 0)
        return {"item_ids": self.answers[np.where(answered, rows, -1)], "item_scores": scores.astype(np.float32)}

    def _check_session(self, request: Any) -> None:
        """A state that has outgrown the window, or has been asked nothing new, answers nonsense: refused."""
        if pb_utils.get_input_tensor_by_name(request, "total_lengths") is None:
            return
        total, new = (int(_array(request, name).max()) for name in ("total_lengths", "lengths"))
        window = self.settings["window"]
        if total > window:
            raise ValueError(
                f"session: {total} items are more than the window of {window}; start the sequence again "
                f"with the newest items"
            )
        if total and not new:
            raise ValueError("session: nothing new in the history; send at least one item, or start the sequence again")


def _array(request: Any, name: str) -> NDArray[Any]:
    array: NDArray[Any] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return array
