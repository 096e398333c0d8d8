"""A model of Triton's Python backend: item ids <-> rows. It is copied into repositories as it stands and imports
nothing but numpy and what Triton brings.

role "encode"  history, candidates, excluded (strings; "" is padding, wherever it stands), times (of the history's
               shape; what stands beside padding is not read) -> rows, padded so that requests can be stacked, and how
               many
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
LATEST_SECOND = 10**11  # the year 5138 in seconds, but 1973 in milliseconds
IDS_FILE = "item_ids.json"
LISTS = ("history", "candidates", "excluded")


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
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in (*LISTS, "times")}
        inputs = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
        _check_shapes(inputs)
        rows = {name: self._look_up(name, inputs[name]) for name in LISTS if name in inputs}
        histories = rows["history"]
        windows = [self._window(history) for history in histories]
        answer: dict[str, NDArray[Any]] = {
            "history_rows": self._pad("history", windows, 0),
            "lengths": np.array([[len(window)] for window in windows], dtype=np.int64),
        }
        if "calendar" in self.settings:
            answer["buckets"] = self._buckets(inputs, windows)
        if "excluded" in rows:
            # a session knows itself what the user has taken
            seen = [[]] * len(histories) if self.settings["session"] else histories
            closed = [list(dict.fromkeys([*deny, *taken])) for deny, taken in zip(rows["excluded"], seen, strict=True)]
            answer["excluded_rows"] = self._pad("excluded", closed, -1)
        if "candidates" in rows:
            self._check_candidates(rows["candidates"])
            answer["candidate_rows"] = self._pad("candidates", rows["candidates"], -1)
        return answer

    def _look_up(self, name: str, strings: NDArray[Any]) -> list[list[int]]:
        """Rows of every user in the request."""
        try:
            ids = [[value.decode() for value in row if value] for row in strings]
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: {error.object[:50]!r} is no UTF-8; send ids as they were exported") from None
        unknown = list(dict.fromkeys(item_id for row in ids for item_id in row if item_id not in self.rows))
        if unknown:
            more = f" (and {len(unknown) - 5} more)" if len(unknown) > 5 else ""
            raise ValueError(f"{name}: unknown item {', '.join(map(repr, unknown[:5]))}{more}")
        return [[self.rows[item_id] for item_id in row] for row in ids]

    def _check_candidates(self, rows: list[list[int]]) -> None:
        """Each named once; at least one where nothing else is asked."""
        for named in rows:
            if not named and not self.settings["session"]:
                raise ValueError("candidates: the list is empty; send one for every user, or ask recommend_items")
            if len(set(named)) < len(named):
                twice = [self.item_ids[row] for row in dict.fromkeys(named) if named.count(row) > 1]
                raise ValueError(f"candidates: {', '.join(map(repr, twice[:5]))} more than once; name each once")

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

    def _buckets(self, inputs: dict[str, NDArray[Any]], windows: list[list[int]]) -> Rows:
        """Calendar buckets of the windows; 0 is a time that is not known."""
        calendar = self.settings["calendar"]
        buckets = []
        for ids, times, window in zip(inputs["history"], inputs["times"], windows, strict=True):
            own = times[ids != b""]
            if not np.isfinite(own).all():
                raise ValueError("times: they must be finite; send 0 where one is not known")
            if (np.abs(own) > LATEST_SECOND).any():
                raise ValueError(
                    f"times: {np.abs(own).max():.0f} s is thousands of years away; divide milliseconds by 1000"
                )
            own = own[len(own) - len(window) :]
            passed = (own - calendar["first_second"]) // calendar["bucket_seconds"]
            found = np.clip(passed, 0, calendar["num_buckets"] - 1).astype(np.int64) + 1
            buckets.append(np.where(own == 0, 0, found).tolist())
        return self._pad("history", buckets, 0)

    def _pad(self, name: str, rows: list[list[int]], value: int) -> Rows:
        """[B, width]: the next of a few widths, at most what the graph takes."""
        longest, most = max(map(len, rows), default=0), self.settings["most"][name]
        if longest > most:
            what = "items, the history's too," if name == "excluded" else "items"
            raise ValueError(
                f"{name}: {longest} {what} are more than the {most} this repository takes; send fewer, or export it "
                f"anew with --{name} TYPICAL,{longest} or more"
            )
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


def _check_shapes(inputs: dict[str, NDArray[Any]]) -> None:
    """Every user has a row of every input, and every place of a history its time."""
    shape = inputs["history"].shape
    for name, array in inputs.items():
        if len(array) != shape[0]:
            raise ValueError(f"{name}: {len(array)} rows for {shape[0]} of the history; send one for every user")
    if "times" in inputs and inputs["times"].shape != shape:
        got = "x".join(map(str, inputs["times"].shape))
        wanted = "x".join(map(str, shape))
        raise ValueError(f"times: {got} for a history of {wanted}; send one for each place, padding too (0: not known)")


def _array(request: Any, name: str) -> NDArray[Any]:
    array: NDArray[Any] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return array
