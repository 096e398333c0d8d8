"""Deep decoders, traced in parts: the layers between the first and the last are the same graph over other weights.

Tracing takes seconds a layer. So a decoder is traced with four of its layers, the first three and the last, with a mark
where each but the last ends; what stands between the first two marks is written once more for every layer that was left
out. The third layer is there to be compared: it must be the second's copy, operator by operator.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from speeder_engine.export.graph_spec import GraphSpec
from speeder_engine.export.static_graph import MARK, OWN_DOMAIN

if TYPE_CHECKING:  # of the extra `export`
    import onnx_ir as ir

TRACED_LAYERS = 4
COPIED, TWIN = 1, 2
LAYERS = "model.decoder.layers."  # where a graph's module has them


def kept_layers(num_layers: int) -> tuple[int, ...]:
    """Which of so many stand for all when a decoder is traced."""
    return (*range(TRACED_LAYERS - 1), num_layers - 1)


def repeat_layers(model: "ir.Model", spec: GraphSpec, short: GraphSpec, optimize: Callable[[], None]) -> None:
    """Makes the marked graph of `short`, as it was traced, that of `spec`: with all layers, without marks.

    optimize: of the exporter, in place. It goes over the traced layers first, whose weights it doesn't see meanwhile
    (what it made of one layer's would be missing of another's), and over the whole at the end. Raises NotAlike for
    layers that can't be copied; the graph is of no use then.
    """
    hidden = _hide_weights(model.graph)
    optimize()
    _show_weights(model.graph, hidden)
    _Repetition(model.graph, spec, short).write()
    del model.opset_imports[OWN_DOMAIN]
    optimize()


def _hide_weights(graph: "ir.Graph") -> "dict[str, ir.TensorProtocol]":
    """Weights of layers become inputs, behind the others."""
    tensors = {}
    for name in [name for name in graph.initializers if name.startswith(LAYERS)]:
        value = graph.initializers.pop(name)
        assert value.const_value is not None
        tensors[name], value.const_value = value.const_value, None
        graph.inputs.append(value)
    return tensors


def _show_weights(graph: "ir.Graph", tensors: "Mapping[str, ir.TensorProtocol]") -> None:
    for value in [value for value in graph.inputs if value.name in tensors]:
        graph.inputs.remove(value)
        value.const_value = tensors[value.name or ""]
        graph.register_initializer(value)


class NotAlike(Exception):
    """Two layers of the decoder are not each other's copies."""


class _Repetition:
    """A graph of four layers with three marks, on its way to all layers."""

    def __init__(self, graph: "ir.Graph", spec: GraphSpec, short: GraphSpec) -> None:
        self.graph, self.spec = graph, spec
        module = spec.module
        # by all their names, should layers have one in common
        named = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
        self.weights: dict[str, Tensor] = dict(named)
        self.num_layers = 1 + max(_layer_of(name) for name in self.weights if name.startswith(LAYERS))
        self.inputs = dict(zip(short.input_order, graph.inputs, strict=True))
        self.outputs = dict(zip(short.outputs, graph.outputs, strict=True))
        nodes = list(graph)
        self.marks = [node for node in nodes if node.op_type == MARK and node.domain == OWN_DOMAIN]
        if len(self.marks) != TRACED_LAYERS - 1:
            raise NotAlike(f"{len(self.marks)} marks")
        first, second, third = map(nodes.index, self.marks)
        self.copied, self.twin = nodes[first + 1 : second], nodes[second + 1 : third]
        self.ends = [_marked(mark) for mark in self.marks]  # each layer's hidden rows
        self.shared: set[ir.Value] = set()  # made in the copied layer, and read in its twin too

    def write(self) -> None:
        self._compare()
        self._rename_last()
        hidden, written = self.ends[TWIN], []
        for index in range(TRACED_LAYERS - 1, self.num_layers - 1):
            known = self._begin(index, hidden)
            written += [self._again(node, known, index) for node in self.copied]
            for name, value in self._of_layer(self.outputs).items():
                self.outputs[_renamed(name, index)] = known[value]
            hidden = known[self.ends[COPIED]]
        self.graph.insert_after(self.marks[TWIN], written)
        self.marks[TWIN].outputs[0].replace_all_uses_with(hidden)
        for mark, end in zip(self.marks[:TWIN], self.ends[:TWIN], strict=True):
            mark.outputs[0].replace_all_uses_with(end)
        self.graph.remove(self.marks, safe=True)
        for found, held, order in (
            (self.inputs, self.graph.inputs, self.spec.input_order),
            (self.outputs, self.graph.outputs, list(self.spec.outputs)),
        ):
            held.clear()
            held.extend(found[name] for name in order)

    def _compare(self) -> None:
        """Raises NotAlike unless the third layer is the second over other weights."""
        known = {self.marks[0].outputs[0]: self.marks[1].outputs[0]} | self._weights_of(TWIN)
        known |= {value: self._twin_of(name, self.inputs) for name, value in self._of_layer(self.inputs).items()}
        for node, twin in zip(self.copied, self.twin, strict=False):
            same = (node.domain, node.op_type, node.overload) == (twin.domain, twin.op_type, twin.overload)
            if not same or not _equal_attributes(node, twin) or len(node.inputs) != len(twin.inputs):
                raise NotAlike(f"{node.op_type} for {twin.op_type}")
            for mine, other in zip(node.inputs, twin.inputs, strict=True):
                if mine is not None and other is not known.get(mine, mine):
                    self._share(mine, other)
            known |= dict(zip(node.outputs, twin.outputs, strict=True))
        ends = {self.ends[COPIED]: self.ends[TWIN]}
        ends |= {value: self._twin_of(name, self.outputs) for name, value in self._of_layer(self.outputs).items()}
        if len(self.copied) != len(self.twin) or any(known.get(mine) is not other for mine, other in ends.items()):
            raise NotAlike("other ends")

    def _share(self, mine: "ir.Value", other: "ir.Value | None") -> None:
        """Raises NotAlike unless both are one value, or equal constants."""
        constants = [None if value is None else value.const_value for value in (mine, other)]
        if mine is not other and (None in constants or not _equal(*constants)):
            raise NotAlike(f"{mine.name} for {other}")
        self.shared.add(mine)

    def _of_layer(self, named: "Mapping[str, ir.Value]") -> "dict[str, ir.Value]":
        """What bears the copied layer's number."""
        return {name: value for name, value in named.items() if f".{COPIED}." in name}

    def _twin_of(self, name: str, named: "Mapping[str, ir.Value]") -> "ir.Value":
        return named[_renamed(name, TWIN)]

    def _weights_of(self, index: int) -> "dict[ir.Value, ir.Value]":
        """Another layer's weights by the copied one's; those that no graph holds yet are made."""
        found = {}
        for name, value in list(self.graph.initializers.items()):
            if name.startswith(f"{LAYERS}{COPIED}."):
                found[value] = self._weight(_renamed(name, index), value)
        return found

    def _weight(self, name: str, like: "ir.Value") -> "ir.Value":
        import onnx_ir as ir

        if name not in self.graph.initializers:
            tensor = ir.tensor_adapters.TorchTensor(self.weights[name].detach(), name=name)
            value = ir.Value(name=name, shape=like.shape, type=like.type, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _rename_last(self) -> None:
        """The last layer was traced under the place that it has among the four."""
        for name in [name for name in self.graph.initializers if name.startswith(f"{LAYERS}{TRACED_LAYERS - 1}.")]:
            value = self.graph.initializers.pop(name)
            value.name = _renamed(name, self.num_layers - 1, TRACED_LAYERS - 1)
            self.graph.register_initializer(value)

    def _begin(self, index: int, hidden: "ir.Value") -> "dict[ir.Value, ir.Value]":
        """What stands in this layer for what stands in the copied one, before any of its operators is written."""
        import onnx_ir as ir

        known = {self.marks[0].outputs[0]: hidden} | self._weights_of(index)
        for name, value in self._of_layer(self.inputs).items():
            again = _renamed(name, index)
            known[value] = self.inputs[again] = ir.Value(name=again, shape=value.shape, type=value.type)
        return known

    def _again(self, node: "ir.Node", known: "dict[ir.Value, ir.Value]", index: int) -> "ir.Node":
        import onnx_ir as ir

        # what all layers share stays what it is
        inputs = [None if value is None else known.get(value, value) for value in node.inputs]
        outputs = [ir.Value(name=f"{each.name}.{index}", shape=each.shape, type=each.type) for each in node.outputs]
        known |= {mine: new for mine, new in zip(node.outputs, outputs, strict=True) if mine not in self.shared}
        return ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            outputs=outputs,
            version=node.version,
            name=f"{node.name}.{index}",
        )


def _marked(mark: "ir.Node") -> "ir.Value":
    [value] = mark.inputs
    assert value is not None
    return value


def _renamed(name: str, index: int, was: int = COPIED) -> str:
    """What a weight, an input or an output of one layer is called in another."""
    return name.replace(f".{was}.", f".{index}.", 1)


def _layer_of(name: str) -> int:
    return int(name.removeprefix(LAYERS).partition(".")[0])


def _equal_attributes(node: "ir.Node", twin: "ir.Node") -> bool:
    mine, others = node.attributes, twin.attributes
    return mine.keys() == others.keys() and all(
        each.type == others[name].type and _equal(each.value, others[name].value) for name, each in mine.items()
    )


def _equal(mine: Any, other: Any) -> bool:
    """Of tensors, by what is in them."""
    if hasattr(mine, "numpy"):
        return mine.dtype == other.dtype and np.array_equal(mine.numpy(), other.numpy())
    return bool(mine == other)
