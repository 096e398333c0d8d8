"""Our exported graphs under other runtimes: ONNX Runtime and OpenVINO, sessions kept by the exports' own engine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from baselines.base import Answer, Unavailable
from baselines.exports import export_of
from baselines.speeder import answer_of
from numpy.typing import NDArray
from subject import Subject
from waiting import spinning
from workload import BenchUser

from speeder_engine.errors import SpeederError
from speeder_engine.export import OnnxEngine
from speeder_engine.export.graph_engine import GraphEngine
from speeder_engine.export.onnx_engine import OnnxFiles
from speeder_engine.export.onnx_session import load_runtime

Array = NDArray[Any]
KV_BUDGET = "1GiB"
STRANGER = "a stranger"


class ExportedGraphs:
    """A graph engine as a contender. Both runtimes take the same file, of standard operators in fp32."""

    key = label = ""
    has_warm, heavy = True, False

    def __init__(self, subject: Subject) -> None:
        if subject.device.type != "cpu":
            raise Unavailable(f"{self.key} is measured on the CPU alone")
        self.subject = subject
        try:
            self.engine = self._engine(subject)
        except SpeederError as error:
            raise Unavailable(str(error)) from None

    def _engine(self, subject: Subject) -> GraphEngine:
        raise NotImplementedError

    def answer(self, user: BenchUser) -> Answer:
        self.engine.close_session(STRANGER)
        return self._answer(user, user.history, STRANGER)

    def warm_up(self, user: BenchUser) -> None:
        self.engine.close_session(user.user_id)
        self._answer(user, user.history, user.user_id)

    def answer_warm(self, user: BenchUser) -> Answer:
        return self._answer(user, user.grown, user.user_id)

    def _answer(self, user: BenchUser, history: Sequence[int], user_id: str) -> Answer:
        return answer_of(self.engine, self.subject, user.candidates, history, user_id)

    def close(self) -> None:
        self.engine.close()


class OnnxRuntime(ExportedGraphs):
    """In fp32: it has no bf16 MatMul on a CPU, and casts fp16 there and back."""

    key, label = "onnxruntime", "ONNX Runtime, our export, fp32"

    def _engine(self, subject: Subject) -> GraphEngine:
        load_runtime("cpu")  # whoever lacks it is told before a model was exported for it
        export = export_of(subject)
        with sessions_that_spin():
            return OnnxEngine.load(export, "cpu", KV_BUDGET, torch.get_num_threads())


@contextmanager
def sessions_that_spin() -> Iterator[None]:
    """Where `--waiting spin` asks for it: the engine of our exports tells ONNX Runtime's threads to sleep instead."""
    if not spinning():
        yield
        return
    import onnxruntime

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            super().add_session_config_entry(key, "1" if key.endswith("allow_spinning") else value)

    with patch.object(onnxruntime, "SessionOptions", Options):
        yield


class OpenVino(ExportedGraphs):
    """In the precision OpenVINO chooses for this CPU, or in the one that is named ("f32", "bf16", "f16")."""

    key = "openvino"

    def __init__(self, subject: Subject, precision: str | None = None) -> None:
        # contenders take turns on the same cores: threads bound to them would be in the others' way
        self.hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
        self.hints |= {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
        super().__init__(subject)

    def _engine(self, subject: Subject) -> GraphEngine:
        try:
            import openvino
        except ImportError:
            raise Unavailable("openvino is not installed: pip install 'speeder-engine[bench]'") from None
        files = OnnxFiles.load(export_of(subject))
        graph = OpenVinoGraph(openvino.Core(), files.graph("extend"), self.hints)
        self.label = f"OpenVINO, our export, {graph.precision}"
        return GraphEngine(files, {"extend": graph}, KV_BUDGET)


class OpenVinoGraph:
    """One graph under OpenVINO. Arrays in and out; what is kept is copied out of the request, which is used again."""

    def __init__(self, core: Any, path: Path, hints: Mapping[str, Any]) -> None:
        self.core, self.hints = core, hints
        self.model = core.read_model(path)
        self.inputs = {name: place for place in self.model.inputs for name in place.get_names()}
        self.outputs = {name: place for place in self.model.outputs for name in place.get_names()}
        self._requests: dict[tuple[str, ...], Any] = {}

    def run(
        self, inputs: Mapping[str, Any], outputs: Sequence[str], kept: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Array], list[Any]]:
        """As `GraphSession.run`."""
        names = (*outputs, *(kept or {}))
        request = self._request(names)
        request.infer({name: value for name, value in inputs.items() if name in self.inputs}, share_inputs=True)
        arrays = [request.get_output_tensor(place).data.copy() for place in range(len(names))]
        return dict(zip(outputs, arrays, strict=False)), arrays[len(outputs) :]

    @property
    def precision(self) -> str:
        """What matmuls run in: "bf16", "f32"."""
        default = self.core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        return str(self.hints.get("INFERENCE_PRECISION_HINT", default.to_string()))

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
            self._requests[names] = self.core.compile_model(model, "CPU", self.hints).create_infer_request()
        return self._requests[names]
