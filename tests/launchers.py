"""The launchers of triton_kernels/, each with its reference: for tests that stand something else in their place."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

from speeder_engine import runner, triton_kernels

WRITE_INTO = ("compressed_attention", "tree_attention")  # their last argument, which their references do not take


class Launcher(NamedTuple):
    module: ModuleType
    operation: str
    launch: Callable
    reference: Callable  # of the launcher's arguments

    @property
    def name(self) -> str:
        return self.launch.__name__


def deciding_modules() -> list[ModuleType]:
    """Those that ask `runs_triton` whether a kernel is launched."""
    names = [f"{triton_kernels.__name__}.{each.name}" for each in pkgutil.iter_modules(triton_kernels.__path__)]
    modules = [*map(importlib.import_module, names), runner]
    return [module for module in modules if hasattr(module, "runs_triton")]


def launchers() -> Iterator[Launcher]:
    for module in deciding_modules():
        for name, launch in inspect.getmembers(module, inspect.isfunction):
            operation = name.removeprefix("launch_")
            reference = getattr(module, f"{operation}_ref", None)
            if name.startswith("launch_") and launch.__module__ == module.__name__ and reference is not None:
                yield Launcher(module, operation, launch, _into(reference) if operation in WRITE_INTO else reference)


def _into(reference: Callable) -> Callable:
    return lambda *args: args[-1].copy_(reference(*args[:-1]))
