"""Specimen: a kernel at one real shape, as much as a compiler needs to know of a launch.

`bench/compile_kernels.py` compiles every specimen for every GPU, without having one.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import speeder_engine.triton_kernels as package


@dataclass(frozen=True)
class Specimen:
    """One compilation. `arguments` names every argument of the kernel, in any order: a string is the type of a run-time
    argument (`"*bf16"`, `"i32"`, `"fp32"`), all else the value of a constexpr.

    Pointers are 16-byte aligned, as torch's are; so are integers whose type ends in `:16`. All other integers differ
    from launch to launch, and the kernel names them in `do_not_specialize`.
    """

    label: str  # of the shape: "7B bf16"
    kernel: Any  # the function under @triton.jit
    arguments: Mapping[str, Any]
    num_warps: int = 4  # this and the next as Triton has them where a launcher says nothing
    num_stages: int = 3
    since: int = 80  # the first compute capability that has what it needs

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__.strip('_').removesuffix('_kernel')} {self.label}"


def all_specimens() -> Iterator[Specimen]:
    """Those of every file here, as its `SPECIMENS` lists them."""
    for module in pkgutil.iter_modules(package.__path__):
        yield from getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "SPECIMENS", ())
