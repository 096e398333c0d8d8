"""Which device an engine takes."""

from contextlib import contextmanager

import pytest
import torch

from speeder_engine import ConfigError
from speeder_engine.device import DeviceLock, in_one_order, pick_device


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


def test_a_cpu_has_no_streams(entered):
    with DeviceLock(torch.device("cpu")), in_one_order(torch.device("cpu")):
        assert entered == ["the caller's"]
