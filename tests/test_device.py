"""Which device an engine takes."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from reference import make_titled
from torch.utils._python_dispatch import TorchDispatchMode

from speeder_engine import ConfigError, Engine, EngineConfig, Item, Request, device, embedder, engine
from speeder_engine.device import DeviceLock, in_one_order, pick_device
from speeder_engine.parts import EngineParts


@pytest.fixture
def two_gpus(monkeypatch):
    """As torch speaks of them, of which the second one is the caller's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(("name", "number"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_its_number(name, number, two_gpus):
    """Other threads have another current one, and an engine's worker is one."""
    assert pick_device(name) == torch.device("cuda", number)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "the GPUs here are 0..1"),
        ("gpu", "is no device"),
        ("meta", "is not supported"),
    ],
)
def test_what_is_no_device_is_refused(name, message, two_gpus):
    with pytest.raises(ConfigError, match=message):
        pick_device(name)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device is usable here; use device='cpu'"):
        pick_device("cuda")


@pytest.fixture
def entered(monkeypatch):
    """The streams that are current, one in another, in place of a GPU's."""
    current = ["the caller's"]

    @contextmanager
    def stream(of):
        current.append(of)
        try:
            yield
        finally:
            assert current.pop() == of

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"the default of {device}")
    return current


def test_who_holds_the_lock_works_on_the_default_stream(entered):
    lock = DeviceLock(torch.device("cuda", 1))
    for _ in range(2):
        with lock, pytest.raises(ValueError, match="in the middle"), in_one_order(torch.device("cuda", 0)):
            assert entered == ["the caller's", "the default of cuda:1", "the default of cuda:0"]
            raise ValueError("in the middle")
        assert entered == ["the caller's"]
    with pytest.raises(KeyError), lock:
        raise KeyError
    lock.acquire()
    assert entered == ["the caller's", "the default of cuda:1"]
    lock.release()
    assert entered == ["the caller's"]


def test_a_device_that_is_lost_leaves_the_lock_free(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error")

    lock = DeviceLock(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "default_stream", lost)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="CUDA error"), lock:
            raise AssertionError("not held")


def test_who_waits_is_let_in_before_who_has_just_left():
    """Else a worker that takes step after step would keep a change out for as long as there are requests."""
    lock, order = DeviceLock(torch.device("cpu")), []

    def wait():
        with lock:
            order.append("waited")

    for turn in range(20):
        waiting = threading.Thread(target=wait)
        with lock:
            waiting.start()
            deadline = time.monotonic() + 60
            while not lock._door.locked() and time.monotonic() < deadline:
                time.sleep(1e-4)
        with lock:
            order.append("left")
        waiting.join()
        assert order == ["waited", "left"] * (turn + 1)


def test_a_cpu_has_no_streams(entered):
    with DeviceLock(torch.device("cpu")), in_one_order(torch.device("cpu")):
        assert entered == ["the caller's"]


class InOrder(TorchDispatchMode):
    """Notes what is launched while nobody sees to the order."""

    def __init__(self):
        super().__init__()
        self.depth, self.stray = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.depth:
            self.stray.append(func._schema.name)
        return func(*args, **kwargs or {})

    @contextmanager
    def inside(self, device):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def test_all_that_an_engine_launches_is_in_one_order(tmp_path, monkeypatch):
    """On a GPU what is not would go to the caller's stream."""
    watched = InOrder()
    for module in (device, embedder, engine):
        monkeypatch.setattr(module, "in_one_order", watched.inside)
    save, tiny = EngineParts.save, make_titled()

    def save_what_never_changes(parts, out):
        with watched.inside(None):
            return save(parts, out)

    monkeypatch.setattr(EngineParts, "save", save_what_never_changes)
    monkeypatch.setattr(EngineParts, "with_catalogue", lambda parts, table, tokens: parts)
    parts, settings = tiny.parts(), {"cpu_path": "torch", "graphs": "on", "row_buckets": (16, 64), "freeze_gc": False}
    with watched:
        made = Engine(parts, EngineConfig(device="cpu", **settings))
        made.warm_up()
        for head in ("retrieve", "rank", "title"):
            made.recommend(tiny.ids(range(5)), user_id="ada", candidates=tiny.ids(range(9)), head=head)
        made.recommend(tiny.ids(range(6)), user_id="ada")
        made.warm("ada", tiny.ids(range(7)))
        made.upsert([Item("new", vectors={"text": [0.5] * 8}), Item("0002", vectors={"text": [-0.5] * 8})])
        made.set_available(["0003"], False)
        made.set_prior({"0004": 1.0})
        made.remove(["0005"])
        made.user_vectors([Request(tiny.ids(range(3)))])
        made.scores([Request(tiny.ids(range(3)))], tiny.ids(range(4)))
        made.item_vectors(tiny.ids(range(4)))
        made.similar_items("0001")
        made.generate([Request(tiny.ids(range(3)))], 3)
        made.save(tmp_path / "saved")
        made.close()
    assert watched.stray == []
