"""Small C++ programs of bench/, built beside the cache manager's sources: without Python, its cost alone."""

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC, BUILD = ROOT / "csrc", ROOT / "build" / "bench"
# program -> the sources of csrc/ that it needs
PROGRAMS = {
    "block_pool": ("block_pool.cpp",),
    "cache_steps": (
        "block_manager.cpp",
        "block_manager_check.cpp",
        "block_manager_commit.cpp",
        "block_manager_plan.cpp",
        "block_pool.cpp",
        "session_table.cpp",
    ),
}


class MissingTool(Exception):
    """A compiler or valgrind isn't there; one line says which."""


def find_compiler() -> str:
    """Raises MissingTool where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise MissingTool("no C++ compiler; install g++")
    return compiler


def compiler_version() -> str:
    """Its name and version, as it says them."""
    command = [find_compiler(), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def build(program: str, optimisation: str = "-O2") -> Path:
    """Compiles bench/`program`.cpp unless it stands. Raises MissingTool without a compiler, and CalledProcessError
    where the source is wrong."""
    compiler = find_compiler()
    sources = [Path(__file__).with_name(f"{program}.cpp"), *(CSRC / name for name in PROGRAMS[program])]
    out = BUILD / program
    newest = max(path.stat().st_mtime for path in (*sources, *CSRC.glob("*.h")))
    if not out.exists() or out.stat().st_mtime < newest:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-std=c++20", optimisation, "-DNDEBUG", f"-I{CSRC}", *map(str, sources), "-o", str(out)]
        subprocess.run(command, check=True)
    return out


def run(program: Path) -> str:
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def count_instructions(program: Path) -> int:
    """Instructions that the program executes in all, by valgrind's callgrind. Raises MissingTool without it."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise MissingTool("no valgrind to count instructions with; install valgrind")
    command = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", str(program)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(f"valgrind: no count in what it said: {done.stderr[-500:]}")
    return int(found[1])
