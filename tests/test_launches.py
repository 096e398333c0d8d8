"""How many kernels a captured pass is, and which are compiled when: counted on the CPU, of what a GPU would be sent."""

import json
import os
import subprocess
import sys

import pytest
from launchers import deciding_modules, launchers
from reference import make_tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from speeder_engine import Engine, EngineConfig
from speeder_engine.models import linear

ALLOCATES = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view")
NUM_LAYERS = 3  # of make_tiny


class Launches(TorchDispatchMode):
    """Names of operations that are neither views nor mere memory; an operation of ours is one, whatever its reference
    does."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and func._schema.name not in ALLOCATES:
            self.names.append(func._schema.name)
        return func(*args, **kwargs or {})

    def stands_for(self, name, reference):
        def launch(*args, **kwargs):
            self.names.append(name)
            with _disable_current_modes():
                return reference(*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """All operations as on a GPU, their kernels replaced by references."""
    counted, found = Launches(), list(launchers())
    for module in deciding_modules():
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    for each in found:
        monkeypatch.setattr(each.module, each.name, counted.stands_for(each.operation, each.reference))
    return counted


@pytest.mark.parametrize(
    ("head_dim", "settings", "a_layer", "around"),
    [
        (32, {"dtype": "bfloat16"}, 5, 5),
        (32, {"dtype": "bfloat16", "weights": "int8", "kv": "int8"}, 5, 5),
        (8, {"dtype": "bfloat16"}, 6, 5),
        (32, {"dtype": "bfloat16", "weights": "fp8"}, 5, 5),
        (32, {"dtype": "bfloat16", "weights": "fp8", "launches": "apart"}, 10, 13),
        (32, {"dtype": "bfloat16", "launches": "apart"}, 9, 10),
        (32, {"dtype": "float32"}, 9, 10),
    ],
)
def test_launches_of_a_captured_pass(head_dim, settings, a_layer, around, launches, monkeypatch):
    monkeypatch.setattr(linear, "multiplies_fp8", lambda device: True)
    tiny = make_tiny(window=6, step=2, head_dim=head_dim)
    config = {"cpu_path": "torch", "graphs": "on", "row_buckets": (16,), "freeze_gc": False, "max_batch_users": 2}
    engine = Engine(tiny.parts(), EngineConfig(**config | settings))
    engine.warm_up()
    [graph] = engine._now().graphs._graphs.values()
    graph.buffers.clear()  # the warm-up's steps have left theirs
    launches.names.clear()
    with launches:
        graph._replay()
    assert len(launches.names) == a_layer * NUM_LAYERS + around, launches.names


@pytest.fixture(scope="module")
def met(root):
    """Of variants of an engine: how often each kernel is compiled in its warm-up, and which are later."""
    paths = os.pathsep.join([str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(root / "tests" / "triton_keys.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_request_meets_a_kernel_that_the_warm_up_has_not(met):
    kinds = {"fused", "overlapped", "apart", "float16", "8 bits", "two stages", "hardly a bucket", "no graphs"}
    assert met.keys() == kinds | {"titles", "deep", "deeper than was said"}
    assert all(sum(warm.values()) > 10 for warm, _ in met.values())
    for variant in kinds - {"apart", "float16"}:  # one for each block of few rows
        assert met[variant][0]["_fused_qkv_kernel"] == 4
    assert {variant for variant, (_, later) in met.items() if later} == {"deeper than was said"}


def test_searches_deeper_than_was_said_are_met_when_they_come(met):
    assert met["deeper than was said"][1] == ["_merge_lists_kernel", "_partial_top_kernel"]
    deeper, deep = (met[variant][0]["_partial_top_kernel"] for variant in ("deeper than was said", "deep"))
    assert deeper < deep
