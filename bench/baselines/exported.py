"""Our exported graphs under other runtimes: ONNX Runtime and OpenVINO, sessions kept as the export's own engine does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.base import Answer, Unavailable
from baselines.exports import GRAPHS, exports_of
from baselines.speeder import scores_of
from numpy.typing import NDArray
from subject import Subject
from workload import BenchUser

from speeder_engine.errors import SpeederError
from speeder_engine.export import OnnxEngine
from speeder_engine.export.onnx_engine import GraphEngine, OnnxFiles

Array = NDArray[Any]
KV_BUDGET = "1GiB"


class ExportedGraphs:
    """A graph engine as a contender: `score` for strangers, `extend` for those who return."""

    key = label = ""
    has_warm, heavy = True, False

    def __init__(self, subject: Subject) -> None:
        if subject.device.type != "cpu":
            raise Unavailable(f"{self.key} is measured on the CPU alone")
        self.subject = subject
        self.engine = self._engine(subject)

    def _engine(self, subject: Subject) -> GraphEngine:
        raise NotImplementedError

    def answer(self, user: BenchUser) -> Answer:
        return self._answer(user, user.history, None)

    def warm_up(self, user: BenchUser) -> None:
        self.engine.close_session(user.user_id)
        self._answer(user, user.history, user.user_id)

    def answer_warm(self, user: BenchUser) -> Answer:
        return self._answer(user, user.grown, user.user_id)

    def _answer(self, user: BenchUser, history: tuple[int, ...], user_id: str | None) -> Answer:
        candidates = self.subject.item_ids(user.candidates)
        ranking = self.engine.recommend(
            self.subject.item_ids(history), len(candidates), user_id=user_id, candidates=candidates
        )
        return Answer(scores_of(ranking, candidates))

    def close(self) -> None:
        self.engine.close()


class OnnxRuntime(ExportedGraphs):
    """The flavour with GroupQueryAttention and keys and values in place. There is no bf16 MatMul on a CPU."""

    key, label = "onnxruntime", "ONNX Runtime, our export, fp32"

    def _engine(self, subject: Subject) -> GraphEngine:
        try:
            return OnnxEngine.load(exports_of(subject).onnx("ort"), "cpu", KV_BUDGET, torch.get_num_threads())
        except SpeederError as error:
            raise Unavailable(str(error)) from None


class OpenVino(ExportedGraphs):
    """The flavour of standard operators, in the precision OpenVINO chooses for this CPU."""

    key = "openvino"

    def _engine(self, subject: Subject) -> GraphEngine:
        try:
            import openvino
        except ImportError:
            raise Unavailable("openvino is not installed: pip install 'speeder-engine[bench]'") from None
        files = OnnxFiles.load(exports_of(subject).onnx("standard"))
        core, threads = openvino.Core(), torch.get_num_threads()
        sessions = {name: OpenVinoGraph(core, files.graph(name), threads) for name in GRAPHS}
        self.label = f"OpenVINO, our export, {sessions['score'].precision}"
        return GraphEngine(files, sessions, KV_BUDGET)


class OpenVinoGraph:
    """One graph under OpenVINO. Arrays in and out; what is kept is copied out of the request, which is used again."""

    def __init__(self, core: Any, path: Path, threads: int) -> None:
        self.core, self.threads = core, threads
        self.model = core.read_model(path)
        self.inputs = {name: place for place in self.model.inputs for name in place.get_names()}
        self.outputs = {name: place for place in self.model.outputs for name in place.get_names()}
        self._requests: dict[tuple[str, ...], Any] = {}
        self.precision = ""
        self._request(tuple(self.outputs))

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Any]]:
        """As `GraphSession.run`."""
        names = (*outputs, *(kept or {}))
        request = self._request(names)
        request.infer({name: value for name, value in inputs.items() if name in self.inputs}, share_inputs=True)
        arrays = [request.get_output_tensor(place).data.copy() for place in range(len(names))]
        return dict(zip(outputs, arrays, strict=False)), arrays[len(outputs) :]

    def to_device(self, array: Array) -> Any:
        return array

    def shape(self, value: Any) -> tuple[int, ...]:
        return tuple(value.shape)

    def _request(self, names: tuple[str, ...]) -> Any:
        """One for each set of outputs, compiled without what leads to none of them."""
        if names not in self._requests:
            import openvino

            wanted = [self.outputs[name] for name in names]
            model = openvino.Model(wanted, self.model.get_parameters())
            compiled = self.core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": self.threads})
            self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
            self._requests[names] = compiled.create_infer_request()
        return self._requests[names]
