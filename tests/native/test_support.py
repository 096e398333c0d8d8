"""Which kernels an engine runs on, and what it says where they can't be had."""

import pytest
import torch
from reference import make_tiny

from speeder_engine import Engine, EngineConfig, _cpu
from speeder_engine.errors import ConfigError
from speeder_engine.native.support import advise_huge, pick_kernels, read_memory

CPU = torch.device("cpu")
BEST = _cpu.best_kernels()


def test_the_best_kernels_are_picked_where_types_allow():
    expected = None if BEST == "plain" else BEST
    assert pick_kernels(EngineConfig(), CPU, torch.float32) == expected
    assert pick_kernels(EngineConfig(), CPU, torch.bfloat16) == expected
    assert pick_kernels(EngineConfig(), CPU, torch.float16) is None
    assert pick_kernels(EngineConfig(cpu_path="torch"), CPU, torch.float32) is None
    assert pick_kernels(EngineConfig(cpu_path="plain"), CPU, torch.float32) == "plain"
    assert pick_kernels(EngineConfig(), torch.device("cuda"), torch.bfloat16) is None
    for small in ({"weights": "fp8"}, {"weights": "int8"}, {"kv": "fp8"}):
        assert pick_kernels(EngineConfig(**small), torch.device("cuda"), torch.bfloat16) is None
        assert pick_kernels(EngineConfig(**small, cpu_path="torch"), CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("settings", "dtype", "device", "message"),
    [
        ({"cpu_path": BEST}, torch.float16, "cpu", "choose 'torch'"),
        ({"cpu_path": "plain", "weights": "fp8"}, torch.bfloat16, "cpu", "multiply no 'fp8'; choose 'int8', or set"),
        ({"cpu_path": "plain", "kv": "int8"}, torch.bfloat16, "cpu", "not in 'int8'; leave it at 'auto'"),
    ],
)
def test_what_can_not_be_had_is_refused(settings, dtype, device, message):
    with pytest.raises(ConfigError, match=message):
        pick_kernels(EngineConfig(**settings), torch.device(device), dtype)


@pytest.mark.parametrize("settings", [{"cpu_path": "amx"}, {"weights": "int4"}])
def test_unknown_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineConfig(**settings)


def test_kernels_of_another_machine_are_refused(monkeypatch):
    monkeypatch.setattr(_cpu, "has_kernels", lambda name: name == "plain")
    with pytest.raises(ConfigError, match=f"no 'avx512'; its best is {BEST!r}"):
        pick_kernels(EngineConfig(cpu_path="avx512"), CPU, torch.float32)


@pytest.mark.parametrize("path", ["plain", "torch"])
def test_engines_of_every_path_answer_alike(path):
    tiny = make_tiny()
    history, named = tiny.ids(range(9)), tiny.ids(range(20, 40))
    answers = []
    for cpu_path in ("auto", path):
        engine = Engine(tiny.parts(), EngineConfig(dtype="float32", cpu_path=cpu_path))
        answers.append((engine.recommend(history, 10), engine.recommend(history, 20, candidates=named)))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.items == theirs.items
        assert ours.scores == pytest.approx(theirs.scores, abs=2e-5)


def test_int8_keeps_the_best_of_a_random_model():
    """Random weights are the worst case: nothing stands out."""
    tiny = make_tiny()
    exact = Engine(tiny.parts(), EngineConfig(dtype="float32"))
    small = Engine(tiny.parts(), EngineConfig(dtype="float32", weights="int8"))
    shared = 0
    for start in range(0, 40, 4):
        history = tiny.ids(range(start, start + 12))
        shared += len({*exact.recommend(history, 10).items} & {*small.recommend(history, 10).items})
    assert shared >= 85


def test_huge_pages_change_nothing():
    tensor = torch.arange(3 << 20, dtype=torch.int32)
    advise_huge(tensor)
    read_memory(tensor)
    assert torch.equal(tensor, torch.arange(3 << 20, dtype=torch.int32))
    advise_huge(tensor[:0])
