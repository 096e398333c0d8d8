"""How many kernels a captured pass is: counted on the CPU, of what a GPU would be sent."""

import importlib
import inspect
import pkgutil

import pytest
from reference import make_tiny, make_titled
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from speeder_engine import Engine, EngineConfig, Request, runner, triton_kernels
from speeder_engine.models import linear
from speeder_engine.triton_kernels import few_rows, language
from speeder_engine.triton_kernels.few_rows import block_of
from speeder_engine.triton_kernels.quantize_rows import W8Weight
from speeder_engine.triton_kernels.top_scores import list_length

ALLOCATES = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view")
NUM_LAYERS = 3  # of make_tiny


class Launches(TorchDispatchMode):
    """Names of operations that are neither views nor mere memory; an operation of ours is one, whatever its reference
    does."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.compiled = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and func._schema.name not in ALLOCATES:
            self.names.append(func._schema.name)
        return func(*args, **kwargs or {})

    def stands_for(self, name, reference):
        def launch(*args, **kwargs):
            self.names.append(name)
            # what a kernel is compiled for
            block = (block_of(args[0].shape[0]), *matrix(args[1]).shape) if name.startswith("fused") else None
            if name == "top_scores":
                block = args[0].shape[0] == 1, args[1].dtype, args[3].limited is None, list_length(args[4])
            self.compiled.add((name, block, language._launches.overlap))
            with _disable_current_modes():
                return reference(*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch):
    """All operations as on a GPU, their kernels replaced by references."""
    counted = Launches()
    for each in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{each.name}")
        for name, launch in inspect.getmembers(module, inspect.isfunction):
            operation = name.removeprefix("launch_")
            reference = getattr(module, f"{operation}_ref", None)
            if name.startswith("launch_") and launch.__module__ == module.__name__ and reference is not None:
                if operation in ("compressed_attention", "tree_attention"):
                    reference = into_out(reference)
                monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
                monkeypatch.setattr(module, name, counted.stands_for(operation, reference))
    for module in (runner, few_rows):
        monkeypatch.setattr(module, "runs_triton", lambda *tensors: True)
    return counted


def matrix(weight):
    return weight.values if isinstance(weight, W8Weight) else weight


def into_out(reference):
    """Its launcher takes the tensor to write into, behind what the reference takes."""
    return lambda *args: args[-1].copy_(reference(*args[:-1]))


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


@pytest.mark.parametrize("search", ["exact", "two_stage"])
@pytest.mark.parametrize("kind", ["fused", "overlapped"])
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_no_request_meets_a_kernel_that_the_warm_up_has_not(graphs, kind, search, launches):
    """With hardly a bucket, so that most passes are launched as they are; then users whose histories are all cached."""
    tiny = make_tiny(window=12, step=4, head_dim=32)
    config = {"cpu_path": "torch", "graphs": "on", "row_buckets": (16,), "freeze_gc": False, "max_batch_users": 40}
    engine = Engine(tiny.parts(), EngineConfig(**config, dtype="bfloat16", launches=kind, search=search))
    serving = engine._now()
    if graphs == "off":
        serving.graphs._capture = None
    engine.warm_up()
    serving.graphs.meet_few_rows()  # as on a GPU
    known = set(launches.compiled)
    for users in (1, 3, 20, 36):
        for head in ("retrieve", "rank"):
            named = tiny.ids(range(40, 43))
            histories = [tiny.ids(range(user, user + 3)) for user in range(users)]
            asked = [Request(each, user_id=each[0], candidates=named, head=head) for each in histories]
            for _ in range(2):
                serving.step([serving.resolve(each) for each in asked])
                serving.step([serving.resolve(Request(each.history, 5, user_id=each.user_id)) for each in asked])
        for more in ({}, {"allow": tiny.ids(range(60))}):
            wanted = [serving.resolve(Request(each.history, 5, **more)) for each in asked]
            with serving.forward(wanted) as done:
                serving.scorer.search_exactly(wanted, range(users), done.vectors)
            serving.step(wanted)
    assert launches.compiled == known
    assert {block[0] for name, block, _ in known if name == "fused_qkv"} == {16, 32, 64, 128}


@pytest.mark.parametrize(("warm_k", "unmet"), [(10, {32, 64, 128}), (40, {128}), (1000, set())])
def test_the_warm_up_meets_titles_and_searches_as_deep_as_they_are_asked_for(warm_k, unmet, launches):
    tiny = make_titled(head_dim=32)
    config = {"cpu_path": "torch", "graphs": "on", "row_buckets": (16, 256), "freeze_gc": False, "max_batch_users": 4}
    engine = Engine(tiny.parts(), EngineConfig(**config, dtype="bfloat16", warm_k=warm_k))
    engine.warm_up()
    engine._now().graphs.meet_few_rows()  # as on a GPU
    known = set(launches.compiled)
    assert "tree_attention" in {name for name, *_ in known}
    for last in (11, 13, 60):
        engine.recommend(tiny.ids([1, 2, 3]), candidates=tiny.ids(range(10, last)), head="title")
    assert launches.compiled == known
    for k in (16, 17, 64, 100):
        for users in (1, 3):
            engine.recommend_many([Request(tiny.ids(range(user + 1)), k) for user in range(users)])
    depths = {block[-1] for name, block, _ in launches.compiled - known if name == "top_scores"}
    assert depths == unmet
    assert {name for name, *_ in launches.compiled - known} <= {"top_scores"}
