"""float8 layers: what they compute in torch, and that the exported graph computes the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fake_tensorrt import small_parts
from torch import nn

from speeder_engine.export import to_tensorrt
from speeder_engine.export.float8 import LARGEST, Float8Linear, use_float8
from speeder_engine.export.graph_spec import graph_specs
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.onnx_file import WeightsFile, write_graph
from speeder_engine.export.plan_config import PlanConfig
from speeder_engine.export.static_graph import StaticModel
from speeder_engine.export.to_tensorrt import graph_files


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_a_layer_is_near_what_it_replaces(size):
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(50, 64) * size
    expected = linear(x)
    found = Float8Linear(linear, float(x.abs().max()))(x)
    # e4m3 has three bits behind the point: 6 % of a number at most, which a sum of 64 averages out
    assert float((found - expected).norm() / (expected - linear.bias).norm()) < 0.04


def test_inputs_beyond_the_scale_are_cut_off_and_zeros_stay():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data.fill_(1.0)
    layer = Float8Linear(linear, 2.0)
    assert layer(torch.full((1, 4), 1000.0)).tolist() == [[8.0, 8.0]]
    assert layer(torch.zeros(1, 4)).tolist() == [[0.0, 0.0]]
    linear.weight.data.zero_()
    assert torch.isfinite(Float8Linear(linear, 0.0)(torch.ones(1, 4))).all()
    assert LARGEST == 448


@pytest.mark.parametrize("graphs", [("compress", "recommend", "score"), ("recommend", "compress"), ("recommend",)])
def test_the_order_of_the_graphs_does_not_matter(tmp_path, monkeypatch, graphs):
    """Whichever is traced first, all of the decoder's layers are of float8 by then."""
    traced = {}

    def note(spec, opset, weights):
        kinds = [type(module) for module in spec.static_model.decoder.modules()] if spec.static_model else []
        traced[spec.name] = kinds.count(Float8Linear), kinds.count(nn.Linear)
        return weights.folder / f"{spec.name}.onnx"

    for name, stand_in in {"write_graph": note, "check_graph": lambda *_: None, "check_model": lambda _: None}.items():
        monkeypatch.setattr(to_tensorrt, name, stand_in)
    with graph_files(small_parts(num_layers=1), PlanConfig(dtype="float8", chips=(89,), graphs=graphs), tmp_path):
        assert traced == {name: (4, 0) if name != "compress" else (0, 0) for name in graphs}


def test_the_exported_graph_computes_the_same(shared_traces, tmp_path):
    parts = small_parts(num_layers=1)
    config = OnnxConfig(flavour="standard", dtype="float16", graphs=("recommend",))
    [spec] = graph_specs(parts, config)
    plain = StaticModel(parts, config)
    model = spec.module.model
    use_float8(model)
    replaced = [module for module in model.decoder.modules() if isinstance(module, Float8Linear)]
    assert len(replaced) == 4 and not any(isinstance(module, nn.Linear) for module in model.decoder.modules())
    with WeightsFile(tmp_path) as weights:
        path = write_graph(spec, config.opset, weights)
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    inputs = {
        "history": rng.integers(0, 120, (6, 12)),
        "lengths": np.array([12, 1, 5, 7, 0, 11]),
        "excluded": np.full((6, 1), -1),
        "k": np.array([10]),
    }
    rows, vectors = session.run(["top_rows", "user_vectors"], inputs)
    given = torch.from_numpy(inputs["history"]), torch.from_numpy(inputs["lengths"])
    expected = model.retrieve(model(*given)[0]).detach().numpy()
    assert rows.shape == (6, 10)
    assert np.abs(vectors - expected).max() <= 0.02 * np.abs(expected).max()
    # float8 does change the answer: it is not the plain model that was exported
    exact = plain.retrieve(plain(*given)[0]).detach().numpy()
    error = np.linalg.norm(vectors - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.15
