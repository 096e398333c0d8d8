"""What a graph must be before a runtime sees it: operators that its flavour may have, weights that lie beside it.

Runtimes follow whatever path a graph names for its weights, links included; we don't let them.
"""

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speeder_engine.errors import ArtifactError, ExportError, MissingDependency, name_some

AGAIN = "export it again"
OWN_OPERATORS = {"standard": frozenset[str](), "ort": frozenset({"com.microsoft::GroupQueryAttention"})}


def load_onnx() -> Any:
    """The package, or MissingDependency."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency("onnx", "export", "ONNX") from error
    return onnx


def check_graph(path: Path, flavour: str) -> None:
    """Raises ArtifactError for weights anywhere but in a plain file of the graph's own folder, and for a file that is
    no ONNX; ExportError for operators that the flavour can't have."""
    model = read_graph(path)
    check_weights(path, model)
    check_operators(path, model, flavour)


def check_model(path: Path) -> None:
    """What onnx itself says of a graph: raises ExportError with its words."""
    onnx = load_onnx()
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # several types, the shape inference's among them
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{path.name}: onnx.checker refuses it: {reason}; report it with the tools' versions"
        ) from error


def read_graph(path: Path) -> Any:
    """The model without its external weights."""
    onnx = load_onnx()
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror}; {AGAIN}") from error
    except Exception as error:  # what the protobuf parser raises is no narrower
        raise ArtifactError(f"{path}: is no ONNX file; {AGAIN}") from error


def check_weights(path: Path, model: Any) -> None:
    """Every external tensor lies whole in a plain, unlinked file beside the graph, or ArtifactError."""
    external = load_onnx().TensorProto.EXTERNAL
    for tensor in _tensors(model.graph, model.functions):
        if tensor.data_location != external:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{path}: the weights of {tensor.name!r}"
        if location in ("", ".", "..") or set("/\\\0") & set(location):
            raise ArtifactError(f"{where} lie in {location!r}, not in a file beside the graph; {AGAIN}")
        size = _size(path.parent / location, where)
        begin, length = (_number(entries.get(key, "0")) for key in ("offset", "length"))
        if begin is None or length is None or begin + length > size:
            raise ArtifactError(f"{where} lie outside of {location}, which has {size} bytes; {AGAIN}")


def check_operators(path: Path, model: Any, flavour: str) -> None:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    functions = {(function.domain, function.name) for function in model.functions}
    strange = set()
    for node in _nodes(model.graph, model.functions):
        domain = "" if node.domain == "ai.onnx" else node.domain
        name = node.op_type if not domain else f"{domain}::{node.op_type}"
        known = name in OWN_OPERATORS[flavour] or (domain, node.op_type) in functions
        if not known and not (domain == "" and load_onnx().defs.has(node.op_type, opsets.get("", 1), domain)):
            strange.add(name)
    if strange:
        known_as = f"{flavour} graphs of opset {opsets.get('')}"
        raise ExportError(f"{path}: operator {name_some(sorted(strange))} is unknown to {known_as}; {AGAIN}")


def _size(file: Path, where: str) -> int:
    try:
        status = file.lstat()
    except OSError:
        raise ArtifactError(f"{where} lie in {file.name}, which is missing; {AGAIN}") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ArtifactError(f"{where} lie in {file.name}, which is a link or no plain file; put a copy there")
    return status.st_size


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _nodes(graph: Any, functions: Any = ()) -> Iterator[Any]:
    """Every node, those of functions and of graphs inside nodes too."""
    for node in (*graph.node, *(node for function in functions for node in function.node)):
        yield node
        for inner in _inner(node):
            yield from _nodes(inner)


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: Any, functions: Any = ()) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in (*graph.node, *(node for function in functions for node in function.node)):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in _inner(node):
            yield from _tensors(inner)
