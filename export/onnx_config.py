"""What an ONNX export is asked to be, and what kind of directory it makes.

export.json          manifest: settings, engine revision, tools, inputs and outputs, parity, hash and size of every file
<graph>.onnx         score, recommend, extend, compress
weights.bin          all graphs' weights, each once
items.parquet        item id <-> row, titles, availability, prior
instruction.safetensors   `ort` alone: what a new user's buffers of keys and values begin with
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from speeder_engine.artifact import Kind
from speeder_engine.config import Config, check
from speeder_engine.device import DTYPES

ONNX = Kind("speeder-onnx", 1, "export.json", "ONNX export", "`speeder export onnx ENGINE OUT`")
WEIGHTS_FILE = "weights.bin"
INSTRUCTION_FILE = "instruction.safetensors"

GRAPHS = ("score", "recommend", "extend", "compress")
# TensorRT takes the Attention operator (23 and later) in half precision alone; the first is the default
_SINGLE, _HALF = (18, 20), (23, 24)
OPSETS: dict[str, dict[str, tuple[int, ...]]] = {
    "standard": {"float32": _SINGLE, "float16": _HALF, "bfloat16": _HALF},
    "ort": {"float32": (*_SINGLE, *_HALF), "float16": _HALF, "bfloat16": _HALF},
}


@dataclass(frozen=True)
class OnnxConfig(Config):
    """flavour: "standard" (plain operators, for any runtime) or "ort" (GroupQueryAttention, keys and values in place).

    opset: 0 takes the flavour's own.
    """

    flavour: str = "standard"
    dtype: str = "float32"
    graphs: tuple[str, ...] = field(default=GRAPHS)
    opset: int = 0

    def check_values(self) -> None:
        check(self.flavour in OPSETS, f"flavour: {self.flavour!r} is not one of {', '.join(OPSETS)}")
        check(self.dtype in DTYPES, f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        check_chosen("graphs", self.graphs, GRAPHS)
        possible = OPSETS[self.flavour][self.dtype]
        if self.opset == 0:
            object.__setattr__(self, "opset", possible[0])
        wanted = f"{', '.join(map(str, possible))} for {self.flavour} {self.dtype}"
        check(self.opset in possible, f"opset: {self.opset} is not one of {wanted}; leave it out")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def has_instruction(self) -> bool:
        """Whether INSTRUCTION_FILE is a part of the export."""
        return self.flavour == "ort" and "extend" in self.graphs

    @property
    def has_attention_operator(self) -> bool:
        return self.opset >= 23


def check_chosen(
    name: str, chosen: Sequence[str | int], known: Sequence[str | int], why: str = "are not known"
) -> None:
    """Raises ConfigError unless `chosen` names some of what is known, each once; why: the others can't be."""
    choice = f"choose of {', '.join(map(str, known))}"
    check(len(chosen) > 0, f"{name}: none named; {choice}")
    strange = [each for each in chosen if each not in known]
    check(not strange, f"{name}: {strange} {why}; {choice}")
    check(len(set(chosen)) == len(chosen), f"{name}: one is named twice; name each once")
