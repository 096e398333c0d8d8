"""config.pbtxt: the settings of a model in a Triton repository, as text of Triton's own protobuf schema."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from speeder_engine.artifact import Kind
from speeder_engine.config import MOST_INT32, Config, check
from speeder_engine.export.graph_spec import GraphSpec, dtype_name
from speeder_engine.export.onnx_config import check_chosen
from speeder_engine.export.plan_config import MOST_K, PlanConfig, Range

TRITON = Kind("speeder-triton", 1, "export.json", "Triton model repository", "`speeder export triton ENGINE OUT`")
BACKENDS = ("onnxruntime", "tensorrt")
SERVED = ("recommend", "score", "session")
TYPES = {
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float64": "TYPE_FP64",
    "string": "TYPE_STRING",
}


class Word(str):
    """A name of an enumeration, written without quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class TritonConfig(Config):
    """batch, candidates, excluded: (typical, most) for plans, the most for both backends. k: how many are answered.
    queue_size: requests that may wait for a model; one more, or one that has waited for `queue_ms`, is
    rejected. batch_wait_us: how long a request waits for company. max_sessions: users with a state on each instance;
    session_idle_s: when an idle one is forgotten.
    """

    backend: str = "onnxruntime"
    dtype: str = "float32"
    graphs: tuple[str, ...] = field(default=SERVED)
    batch: Range = (8, 64)
    candidates: Range = (20, 128)
    excluded: Range = (64, 1024)
    k: int = 100
    queue_size: int = 256
    queue_ms: int = 200
    batch_wait_us: int = 500
    max_sessions: int = 1024
    session_idle_s: int = 600

    def check_values(self) -> None:
        check(self.backend in BACKENDS, f"backend: {self.backend!r} is not one of {', '.join(BACKENDS)}")
        check_chosen("graphs", self.graphs, SERVED)
        runs = self.backend == "tensorrt" or self.dtype not in ("bfloat16", "float8")
        check(runs, f"dtype: Triton's ONNX Runtime knows no {self.dtype}; choose float16, or backend tensorrt")
        found = self.backend != "tensorrt" or self.k <= MOST_K
        check(found, f"k: TensorRT finds at most {MOST_K} of the best, got {self.k}")
        # Triton reads most of them as numbers of 32 bits
        for name in ("k", "queue_size", "queue_ms", "batch_wait_us", "max_sessions", "session_idle_s"):
            least, value = int(name != "batch_wait_us"), getattr(self, name)
            check(least <= value <= MOST_INT32, f"{name}: must be within {least}..{MOST_INT32}, is {value}")
        self.plans  # noqa: B018  the ranges and the type are checked there

    @property
    def plans(self) -> PlanConfig:
        """How plans of these graphs are built: by tensorrt, since Triton reads no plans of tensorrt-rtx."""
        ranges = {"batch": self.batch, "candidates": self.candidates, "excluded": self.excluded}
        return PlanConfig("tensorrt", self.dtype, (), ("score",), k=(1, min(self.k, MOST_K)), **ranges)


def render(message: Mapping[str, Any], indent: str = "") -> str:
    """A message as text: mappings are messages, lists are repeated fields."""
    lines = []
    for key, value in message.items():
        if isinstance(value, list) and all(isinstance(each, int) for each in value):
            lines.append(f"{indent}{key}: [ {', '.join(map(str, value))} ]")
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{key} {{\n{render(each, indent + '  ')}{indent}}}")
            else:
                lines.append(f"{indent}{key}: {_scalar(each)}")
    return "".join(f"{line}\n" for line in lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, Word | int) else json.dumps(value)


def tensor(name: str, dtype: str, shape: Sequence[int | str]) -> dict[str, Any]:
    """An input or output; `shape` without the batch, names of dimensions vary."""
    dims = [size if isinstance(size, int) else -1 for size in shape]
    return {"name": name, "data_type": Word(TYPES[dtype]), "dims": dims}


def graph_config(spec: GraphSpec, config: TritonConfig) -> dict[str, Any]:
    """A graph with dynamic batching, or, where it has a state, with sequences."""
    states = state_names(spec)
    inputs = [
        tensor(name, dtype_name(spec.inputs[name]), shape[1:])
        for name, shape in spec.input_shapes.items()
        if name not in states
    ]
    kept = set(states.values())
    outputs = [
        tensor(name, "int64" if name in ("rows", "total_lengths") else "float32", shape[1:])
        for name, shape in spec.outputs.items()
        if name not in kept or name == "total_lengths"
    ]
    return {
        "name": spec.name,
        "backend": config.backend,
        "default_model_filename": model_file(config.backend),
        "max_batch_size": config.batch[1],
        "input": inputs,
        "output": outputs,
        **(_sequences(spec, config) if states else queueing(config, config.batch_wait_us)),
    }


def model_file(backend: str) -> str:
    return "model.onnx" if backend == "onnxruntime" else "model.plan"


def state_names(spec: GraphSpec) -> dict[str, str]:
    """Input -> output, for what is kept from a request of a sequence to the next."""
    names = {name: name.replace("past_key_values", "present") for name in spec.inputs if name.startswith("past_key")}
    return {"past_lengths": "total_lengths", "past_rows": "present_rows", **names} if names else {}


def queueing(config: TritonConfig, wait_us: int) -> dict[str, Any]:
    """Dynamic batching with a bounded queue: what waits too long, or comes to a full one, is rejected. wait_us: how
    long a request waits for company."""
    policy = {
        "timeout_action": Word("REJECT"),
        "default_timeout_microseconds": 1000 * config.queue_ms,
        "allow_timeout_override": True,
        "max_queue_size": config.queue_size,
    }
    batching = {"max_queue_delay_microseconds": wait_us, "default_queue_policy": policy}
    return {"dynamic_batching": batching}


def _sequences(spec: GraphSpec, config: TritonConfig) -> dict[str, Any]:
    states = []
    for past, present in state_names(spec).items():
        value = spec.inputs[past]
        shape = {"data_type": Word(TYPES[dtype_name(value)]), "dims": list(value.shape[1:])}
        initial = {**shape, "zero_data": True, "name": f"empty {past}"}
        states.append({"input_name": past, "output_name": present, **shape, "initial_state": initial})
    oldest = {"max_candidate_sequences": config.max_sessions, "max_queue_delay_microseconds": config.batch_wait_us}
    idle = 1_000_000 * config.session_idle_s
    return {"sequence_batching": {"max_sequence_idle_microseconds": idle, "oldest": oldest, "state": states}}
