"""Every kernel is registered, compiles for a GPU that isn't here, and its file is typed around it."""

import ast
import os
import subprocess
import sys

import pytest

from speeder_engine.triton_kernels.specimen import all_specimens

NO_OPERATIONS = {"__init__", "language", "specimen"}


def functions(path, jitted):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and jitted == any("jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


@pytest.fixture(scope="session")
def files(root):
    return [path for path in sorted((root / "triton_kernels").glob("*.py")) if path.stem not in NO_OPERATIONS]


def test_every_kernel_has_a_specimen(files):
    written = {node.name for path in files for node in functions(path, True) if node.name.endswith("_kernel")}
    assert written == {specimen.kernel.__name__ for specimen in all_specimens()}


def test_a_specimen_names_its_kernels_arguments():
    for specimen in all_specimens():
        assert set(specimen.arguments) == set(specimen.kernel.arg_names), specimen.name


def test_counts_that_differ_from_launch_to_launch_compile_nothing():
    for specimen in all_specimens():
        counts = {name for name, kind in specimen.arguments.items() if kind in ("i32", "i64")}
        assert set(specimen.kernel.kwargs["do_not_specialize"] or ()) == counts, specimen.name


def test_what_is_no_kernel_is_typed(files):
    for path in files:
        for node in functions(path, False):
            arguments = node.args.args + node.args.kwonlyargs
            assert node.returns is not None and all(each.annotation for each in arguments), f"{path.name}: {node.name}"


def test_kernels_compile_for_a_gpu_that_is_not_here(root):
    # in a process of its own: this one interprets
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "bench" / "compile_kernels.py"), "--targets", "90", "--first"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none spills, all fit" in done.stdout
