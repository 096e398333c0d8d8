"""Compiles every kernel of triton_kernels/ for every GPU it may meet, with none here: registers, spills, shared memory.

    python bench/compile_kernels.py [--targets 80,90] [--kernels attention] [--first] [--jobs 2]

Ends with exit code 1 where a kernel doesn't compile, spills registers, or wants more shared memory than a block can
have. What it shows is the compiler's word; how fast a kernel runs, it doesn't know.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

# read when triton is imported, by the workers too
os.environ.pop("TRITON_INTERPRET", None)
os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}

# compute capability -> the most bytes of shared memory a block can have (CUDA C++ Programming Guide)
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel on one GPU."""

    name: str
    target: int
    registers: int = 0
    spills: int = 0  # bytes
    shared: int = 0  # bytes
    error: str = ""  # whole: where in the kernel it stands, and why

    @property
    def complaint(self) -> str | None:
        if self.error:
            return f"does not compile: {self.error}"
        if self.spills:
            return f"spills {self.spills} bytes of registers"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"wants {self.shared:,} bytes of shared memory, a block has {SHARED_LIMIT[self.target]:,}"
        return None


def compile_one(job: tuple[int, int]) -> Compiled:
    """The specimen of this index, for this target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index, target = job
    specimen = specimens()[index]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            source = ASTSource(specimen.kernel, *described(specimen))
            options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
            made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # a compiler fails in many ways
        return Compiled(specimen.name, target, error=f"{error}\n{error.__cause__ or ''}")
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    assert registers and spills, f"ptxas said nothing of {specimen.name}: {log.getvalue()!r}"
    return Compiled(specimen.name, target, int(registers[1]), int(spills[1]) + int(spills[2]), made.metadata.shared)


def described(specimen: Any) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """A specimen's signature, constexprs and alignments, as the compiler wants them."""
    names = specimen.kernel.arg_names
    strange = set(names) ^ set(specimen.arguments)
    if strange:
        raise ValueError(f"specimen {specimen.name!r} and its kernel disagree about {sorted(strange)}")
    typed = {name: value for name, value in specimen.arguments.items() if isinstance(value, str)}
    signature = {name: typed.get(name, "constexpr").removesuffix(":16") for name in names}
    constexprs = {(names.index(name),): value for name, value in specimen.arguments.items() if name not in typed}
    aligned = [name for name, kind in typed.items() if kind.startswith("*") or kind.endswith(":16")]
    return signature, constexprs, {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}


def specimens() -> list[Any]:
    from speeder_engine.triton_kernels.specimen import all_specimens

    return list(all_specimens())


def compile_all(targets: Sequence[int], chosen: str, first: bool, jobs: int) -> list[Compiled]:
    found = specimens()
    earlier = [{each.kernel.__name__ for each in found[:index]} for index in range(len(found))]
    work = [
        (index, target)
        for index, specimen in enumerate(found)
        for target in targets
        if chosen in specimen.name
        and target >= specimen.since
        and not (first and specimen.kernel.__name__ in earlier[index])
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs) as pool:
            return list(pool.map(compile_one, work))


def table(results: Sequence[Compiled], targets: Sequence[int]) -> str:
    """A line a kernel, a column a target: registers / bytes spilled / bytes of shared memory."""
    cells = {(each.name, each.target): f"{each.registers}/{each.spills}/{each.shared}" for each in results}
    names = list(dict.fromkeys(each.name for each in results))
    width = max(map(len, names), default=0)
    lines = [f"{'registers/spilled/shared':{width}} " + "".join(f"{f'sm_{target}':>15}" for target in targets)]
    for name in names:
        lines.append(f"{name:{width}} " + "".join(f"{cells.get((name, target), '-'):>15}" for target in targets))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(map(str, SHARED_LIMIT)), help="compute capabilities, as 80,90")
    parser.add_argument("--kernels", default="", help="only those whose names hold this")
    parser.add_argument("--first", action="store_true", help="only the first specimen of each kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    targets = [int(target) for target in options.targets.split(",")]
    results = compile_all(targets, options.kernels, options.first, options.jobs)
    print(table(results, targets))
    complaints = [f"{each.name} on sm_{each.target} {each.complaint}" for each in results if each.complaint]
    print("\n".join(complaints) or f"{len(results)} compiled, none spills, all fit")
    return 1 if complaints or not results else 0


if __name__ == "__main__":
    sys.exit(main())
