"""Maps the top-level folders onto the package `speeder_engine` and builds its C++ extensions."""

import shutil
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MAPPED = {
    "speeder_engine": "engine",
    "speeder_engine.triton_kernels": "triton_kernels",
    "speeder_engine.export": "export",
}


class FreshBuild(build_py):
    """Starts from an empty build/lib: whatever an earlier build left there would be shipped."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def packages() -> list[str]:
    found = []
    for package, folder in MAPPED.items():
        found += [package, *(f"{package}.{name}" for name in find_packages(folder))]
    return found


def extension(name: str, folder: str) -> Pybind11Extension:
    return Pybind11Extension(
        f"speeder_engine.{name}",
        sorted(str(path) for path in Path(folder).glob("*.cpp")),
        depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path(folder).glob(pattern)),
        cxx_std=20,
        extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden"],
        extra_link_args=["-pthread"],
    )


ParallelCompile(default=0).install()  # files of an extension at once, on all cores

setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={"speeder_engine": ["py.typed", "_C.pyi", "_cpu.pyi", "training/recipes/*.yaml"]},
    ext_modules=[extension("_C", "csrc"), extension("_cpu", "csrc/cpu")],
    cmdclass={"build_ext": build_ext, "build_py": FreshBuild},
)
