"""A traced graph -> an .onnx file whose weights lie in one file beside it, shared with the other graphs'."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from speeder_engine.errors import ExportError
from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.onnx_config import WEIGHTS_FILE
from speeder_engine.export.repeated_layers import TRACED_LAYERS, NotAlike, kept_layers, repeat_layers

ALIGNMENT = 4096  # of a page, so that a runtime can map a weight instead of reading it
INLINE_BYTES = 1024  # smaller constants stay in the graph: runtimes read shapes and axes there


class WeightsFile:
    """Weights one behind the other, equal ones once. A context manager; OSError when the disk is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[tuple[str, int], int] = {}  # digest and size -> offset

    def __enter__(self) -> Self:
        self._file = (self.folder / WEIGHTS_FILE).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def add(self, content: bytes) -> int:
        """The offset of these bytes."""
        key = hashlib.sha256(content).hexdigest(), len(content)
        if key not in self._places:
            self._file.seek(-self._file.tell() % ALIGNMENT, io.SEEK_CUR)
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]


def write_graph(spec: GraphSpec, opset: int, weights: WeightsFile) -> Path:
    """Traces, names and writes `<name>.onnx`. Raises ExportError for what the exporter can't translate."""
    model = _trace(spec, opset)
    _name(model, spec)
    _move_weights(model, weights)
    proto = _plain(model)
    path = weights.folder / f"{spec.name}.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def _trace(spec: GraphSpec, opset: int) -> Any:
    """The graph as the exporter leaves it; of a deep decoder put together out of four of its layers."""
    model = spec.static_model
    if model is not None and len(model.decoder.layers) > TRACED_LAYERS:
        kept = kept_layers(len(model.decoder.layers))
        short = spec.of_layers(kept)
        with model.only_layers(kept):
            program = _export(short, opset, optimize=False)
        with contextlib.suppress(NotAlike), _quiet():
            repeat_layers(program.model, spec, short, program.optimize)
            return program.model
    return _export(spec, opset).model


def _export(spec: GraphSpec, opset: int, optimize: bool = True) -> Any:
    with _quiet(), _without_cache():
        try:
            return torch.onnx.export(
                spec.module,
                (),
                kwargs=spec.arguments,
                dynamic_shapes=spec.dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                optimize=optimize,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()
            detail = f"graph {spec.name}: can't be written with opset {opset}: {reason[0] if reason else error}"
            raise ExportError(f"{detail}; choose another --opset, or leave this graph out of --graphs") from error


def _name(model: Any, spec: GraphSpec) -> None:
    """Inputs and outputs as the specification calls them; inputs with defaults get those as constants."""
    import onnx_ir as ir

    for value, name in zip(model.graph.inputs, spec.input_order, strict=True):
        value.name = name
        if name in spec.defaults:
            value.const_value = ir.tensor(spec.defaults[name].numpy(), name=name)
            model.graph.initializers[name] = value
    for value, (name, dims) in zip(model.graph.outputs, spec.outputs.items(), strict=True):
        value.name = name
        value.shape = ir.Shape(dims)


def _move_weights(model: Any, weights: WeightsFile) -> None:
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BYTES or value.is_graph_input():
            continue
        content = tensor.tobytes()
        offset = weights.add(content)
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            offset,
            len(content),
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=weights.folder,
        )


def _plain(model: Any) -> Any:
    """The model as protobuf, without what the exporter notes of the sources it came from."""
    import onnx_ir as ir

    proto = ir.to_proto(model)
    proto.producer_name, proto.producer_version = "speeder-engine", ""
    for holder in (proto, proto.graph):
        del holder.metadata_props[:]
    del proto.graph.value_info[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes: on packages it could also translate, on axes it renames."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            noisy.setLevel(level)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Without torch's cache of what operators make of shapes: with dimensions that vary it costs more than it saves, a
    fifth of an export."""
    from torch._dynamo import config

    with config.patch(fake_tensor_cache_enabled=False):
        yield
