"""Graphs put together out of four layers, against the exporter's own of all layers; and traces that tests share."""

from contextlib import contextmanager, nullcontext

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from traces import Traces, digest

from speeder_engine.export import onnx_file
from speeder_engine.export.graph_spec import GraphSpec, cache_names
from speeder_engine.export.onnx_config import WEIGHTS_FILE
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.static_graph import StaticModel, mark_layer

DIM, ROWS = 16, 3


class Layer(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM, dtype=dtype)
        self.norm = nn.Parameter(torch.ones(DIM))  # equal in all layers, as where nothing was trained

    def forward(self, hidden, past, table):
        scaled = nn.functional.rms_norm(hidden, (DIM,), self.norm)
        mixed = self.linear(scaled.to(self.linear.weight.dtype)).float() + past * table
        return hidden + torch.tanh(mixed), torch.cat([past, mixed])


class Decoder(StaticModel):
    """The outside of one, and what layers of a decoder have: weights, what all of them read, caches."""

    def __init__(self, layers):
        nn.Module.__init__(self)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(layers)
        self.register_buffer("table", torch.linspace(0.5, 2, DIM))
        self._marks_layers = False

    def forward(self, rows, past):
        hidden, kept, table = rows * 2, [], None
        for index, layer in enumerate(self.decoder.layers):
            table = self.table.cos() + rows.shape[0] if table is None else table
            hidden, present = layer(hidden, past[index], table)
            kept.append(present)
            if self._marks_layers and index < len(self.decoder.layers) - 1:
                hidden = mark_layer(hidden)
        return hidden.sum(dim=1), kept


class Graph(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.model = Decoder(layers)
        self.requires_grad_(False).eval()

    def forward(self, rows, past: list[torch.Tensor]):
        return self.model(rows, past)


def make_spec(layers):
    names = [name for name in cache_names("past_key_values", len(layers)) if name.endswith("key")]
    return GraphSpec(
        "toy",
        Graph(layers),
        {"rows": torch.randn(ROWS, DIM)} | {name: torch.randn(ROWS, DIM) for name in names},
        {name: {0: "batch"} for name in ("rows", *names)},
        {"sums": ("batch",)} | {name.replace("past_key_values", "present"): ("2 * batch", DIM) for name in names},
        lists={"past": tuple(names)},
    )


def layers_of(count, **settings):
    torch.manual_seed(0)
    return [Layer(**settings) for _ in range(count)]


def answers(spec, folder):
    """Of a graph that is written there: its outputs by name, and its operators in order."""
    import onnx

    folder.mkdir()
    with WeightsFile(folder) as weights:
        path = write_graph(spec, 18, weights)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    found = session.run(None, {name: tensor.numpy() for name, tensor in spec.inputs.items()})
    assert [each.name for each in session.get_inputs()] == spec.input_order
    graph = onnx.load(path, load_external_data=False).graph
    return dict(zip(spec.outputs, found, strict=True)), sorted(node.op_type for node in graph.node)


@contextmanager
def counted_layers(monkeypatch, most=99):
    """How many layers each trace saw; so many traces are run."""
    seen, export = [], onnx_file._export

    def count(spec, *rest, **more):
        seen.append(len(spec.module.model.decoder.layers))
        if len(seen) > most:
            raise InterruptedError
        return export(spec, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(onnx_file, "_export", count)
        yield seen


@pytest.mark.parametrize(("count", "dtype"), [(5, torch.float32), (8, torch.float16)])
def test_a_deep_decoder_is_the_graph_of_all_its_layers(tmp_path, monkeypatch, count, dtype):
    layers = layers_of(count, dtype=dtype)
    layers[2].linear = layers[3].linear  # as where layers share their weights
    spec = make_spec(layers)
    with counted_layers(monkeypatch) as seen:
        found, operators = answers(spec, tmp_path / "parts")
        assert seen == [4] and len(spec.module.model.decoder.layers) == count
        monkeypatch.setattr(onnx_file, "TRACED_LAYERS", count)
        expected, all_operators = answers(spec, tmp_path / "whole")
    assert seen == [4, count] and operators == all_operators
    assert list(found) == ["sums", *(f"present.{index}.key" for index in range(count))]
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        sums, _ = spec.module(**spec.arguments)
    torch.testing.assert_close(torch.from_numpy(found["sums"]), sums, atol=1e-2, rtol=1e-3)


class Squared(Layer):
    def forward(self, hidden, past, table):
        hidden, present = super().forward(hidden, past, table)
        return hidden * hidden, present


class Shifted(Layer):
    """Other numbers in the graph."""

    def forward(self, hidden, past, table):
        return super().forward(hidden, past + 0.5, table * 2)


class Doubled(Layer):
    def forward(self, hidden, past, table):
        return super().forward(hidden, past, table * 3)


class Elsewhere(Layer):
    """Other ends: what is kept is another value."""

    def forward(self, hidden, past, table):
        hidden, present = super().forward(hidden, past, table)
        return hidden, torch.cat([present[:ROWS], present[:ROWS]])


@pytest.mark.parametrize("changes", [{2: Squared}, {1: Shifted, 2: Doubled}, {2: Elsewhere}])
def test_layers_that_are_not_alike_are_all_traced(tmp_path, monkeypatch, changes):
    layers = layers_of(6)
    for index, kind in changes.items():
        layers[index] = kind()
    with counted_layers(monkeypatch, most=1) as seen, pytest.raises(InterruptedError):
        answers(make_spec(layers), tmp_path / "graph")
    assert seen == [4, 6]


def test_a_trace_that_tests_share_is_the_trace(tmp_path):
    """Kept and read again it is written as it would have been at once, and other weights are another's."""
    traces, written = Traces(tmp_path / "traces"), []
    for place, used in (("made", nullcontext()), ("kept", traces.used()), ("read", traces.used())):
        (tmp_path / place).mkdir()
        with used, WeightsFile(tmp_path / place) as weights:
            path = write_graph(make_spec(layers_of(5)), 18, weights)
        written.append((path.read_bytes(), path.with_name(WEIGHTS_FILE).read_bytes()))
    assert written[0] == written[1] == written[2]
    assert len(list(traces.folder.glob("*.onnx"))) == 1
    other = layers_of(5)
    other[4].norm.data[0] = 2
    assert digest(make_spec(other)) != digest(make_spec(layers_of(5)))
