"""A pytest plugin that runs the tests of tests/kernels on a GPU: `pytest -p on_cuda tests/kernels`.

Their cases are made on the CPU and so are their references; every `launch_...` they call gets its tensors as copies on
the device, and what it wrote into them is copied back. SPEEDER_TEST_DEVICE=cpu tries the plugin itself.
"""

import dataclasses
import os
import types

import pytest
import torch

DEVICE = os.environ.get("SPEEDER_TEST_DEVICE", "cuda")
# the compiler's or the interpreter's affair, not a device's; or kernels that are handed CPU tensors by other ways
ELSEWHERE = ("test_registry", "test_interpreter", "test_engine_through_kernels", "test_graphs_through_kernels")
HUGE = "beyond"  # tests whose tensors are gigabytes that nobody touches, which a device would have to hold


def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__.split(".")[-1] in ELSEWHERE or HUGE in item.name:
            item.add_marker(pytest.mark.skip(reason="not for a device"))


@pytest.fixture(autouse=True)
def launches_on_the_device(request, monkeypatch):
    module = request.module
    for holder in (module, getattr(module, "module", None)):
        for name, value in list(vars(holder).items()) if isinstance(holder, types.ModuleType) else ():
            if name.startswith("launch_") and holder is module:
                monkeypatch.setattr(holder, name, on_device(value))


def on_device(launch):
    def launched(*args, **kwargs):
        moved = {}
        found = launch(*(there(each, moved) for each in args), **{k: there(v, moved) for k, v in kwargs.items()})
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for ours, theirs in moved.values():
            ours.copy_(theirs)
        back = {id(theirs): ours for ours, theirs in moved.values()}
        return here(found, back)

    return launched


def there(value, moved):
    """The same with every tensor as a copy on the device; strides stay where torch can keep them."""
    if isinstance(value, torch.Tensor):
        if id(value) not in moved:
            moved[id(value)] = value, value.detach().clone().to(DEVICE)
        return moved[id(value)][1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: there(getattr(value, f.name), moved) for f in fields(value)})
    if isinstance(value, tuple | list):
        return again(value, [there(each, moved) for each in value])
    return value


def here(value, back):
    if isinstance(value, torch.Tensor):
        return back.get(id(value), value.cpu())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: here(getattr(value, f.name), back) for f in fields(value)})
    if isinstance(value, tuple | list):
        return again(value, [here(each, back) for each in value])
    return value


def again(value, parts):
    """The same kind of tuple or list, of other parts."""
    return value._make(parts) if hasattr(value, "_make") else type(value)(parts)


def fields(value):
    return [each for each in dataclasses.fields(value) if each.init]
