"""What is installed, what importing it costs, and what a wheel holds."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

OPTIONAL = {
    *("pydantic", "fastapi", "ray", "polars", "peft", "accelerate", "onnx", "onnxscript", "onnxruntime"),
    *("tensorrt", "tensorrt_rtx", "tritonclient", "google.protobuf"),
    *("pandas", "matplotlib", "sklearn", "sentence_transformers", "torchmetrics", "yaml"),
}
SHIPPED = ("engine", "triton_kernels", "export", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run_python(code: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_core_loads_nothing_optional(tmp_path):
    public = "import sys, speeder_engine\nfor name in speeder_engine.__all__: getattr(speeder_engine, name)\n"
    loaded = run_python(f"{public}print(*sys.modules)", tmp_path).split()
    assert {"speeder_engine.engine", "speeder_engine._C", "torch"} <= set(loaded)
    assert OPTIONAL.intersection(loaded) == set()


def test_installed_as_a_typed_package_of_one_version():
    import speeder_engine

    home = Path(speeder_engine.__file__).parent
    assert (home / "py.typed").is_file()
    assert (home / "_C.pyi").is_file() and (home / "_cpu.pyi").is_file()
    assert speeder_engine.__version__ == distribution("speeder-engine").version


def test_the_command_is_installed():
    (command,) = distribution("speeder-engine").entry_points.select(group="console_scripts")
    assert command.name == "speeder"
    assert callable(command.load())


@pytest.mark.parametrize("name", ["_C", "_cpu"])
def test_the_stub_names_what_the_extension_has(root, name):
    extension = import_module(f"speeder_engine.{name}")
    stub = (root / "engine" / f"{name}.pyi").read_text()
    declared = set(re.findall(r"^(?:class|def) (\w+)", stub, re.MULTILINE))
    assert declared == {each for each in dir(extension) if not each.startswith("_")}


def test_no_folder_shadows_a_mapped_one(root):
    """Even its __pycache__ would: the editable finder looks inside engine/ first."""
    assert not (root / "engine" / "triton_kernels").exists()
    assert not (root / "engine" / "export").exists()
    for folder in ("engine", "triton_kernels", "export"):
        assert (root / folder / "__init__.py").is_file()


def test_every_folder_of_modules_is_a_package(root):
    folders = {
        path.parent for folder in ("engine", "triton_kernels", "export") for path in (root / folder).rglob("*.py")
    }
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_root_is_not_on_the_path(root):
    """There, our folder triton_kernels would hide the package of that name."""
    assert root not in [Path(entry or ".").resolve() for entry in sys.path]
    found = find_spec("triton_kernels")
    assert found is None or root not in Path(str(found.origin)).parents


def hasty_compiler(folder: Path) -> dict[str, str]:
    """What is in a wheel is judged, not how fast: optimising takes most of a minute."""
    path = folder / "hasty"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    path.chmod(0o755)
    return {"CC": str(path), "CXX": str(path)}


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """Built from a copy in which an earlier build left a module that is gone by now."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SHIPPED:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        copy(root / name, source / name, **({"ignore": ignored} if copy is shutil.copytree else {}))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()
    stale = run_python(
        "import sysconfig, sys; print(f'lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}')", source
    )
    (source / "build" / stale / "speeder_engine").mkdir(parents=True)
    (source / "build" / stale / "speeder_engine" / "deleted.py").touch()
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", str(out)]
    command, environment = [sys.executable, "-m", "pip", "wheel", ".", *options], os.environ | hasty_compiler(source)
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(root, wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        Path("speeder_engine", *(() if folder == "engine" else (folder,)), path.relative_to(root / folder)).as_posix()
        for folder in ("engine", "triton_kernels", "export")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".yaml") or path.name == "py.typed"
    }
    extensions = {name for name in held if name.endswith(".so")}
    assert sorted(name.split(".")[0] for name in extensions) == ["speeder_engine/_C", "speeder_engine/_cpu"]
    assert held - extensions == sources
    stubs = {"speeder_engine/_C.pyi", "speeder_engine/_cpu.pyi"}
    assert {"speeder_engine/py.typed", "speeder_engine/cli.py"} | stubs <= held
    assert any(name.startswith("speeder_engine/training/recipes/") for name in held)


@pytest.mark.slow
def test_the_wheel_works_from_any_directory(wheel, tmp_path):
    place = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    code = "import speeder_engine, speeder_engine._C as c; from speeder_engine import Engine; print(c.__file__)"
    assert run_python(code, tmp_path, PYTHONPATH=str(place)).startswith(str(place))
    code = "import speeder_engine.triton_kernels as t, speeder_engine.export as e; print(t.__file__); print(e.__file__)"
    assert all(line.startswith(str(place)) for line in run_python(code, tmp_path, PYTHONPATH=str(place)).splitlines())
