"""`make gpu`: builds in place, tests and measures on a machine with CUDA, with its own Python and no network.

    python3 bench/make_gpu.py [--out bench/results] [--seconds 520] [--cpu-smoke]

The repository's folders become the package through a tree of links under build/gpu, which PYTHONPATH names: nothing is
installed. Tests of the engine and the kernels' own tests on the device run beside one another, benchmarks alone behind
them. Ends with exit code 1 and the names of what failed, if anything did. It needs nothing but the standard
library itself.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "gpu"
NUM_ENGINE_PARTS = 6  # of tests/gpu: together they compile for longer than there is time for all tests
SAYS_WHY = 10  # seconds in which what is interrupted may still say what has failed
NUM_PARTS = 10  # of bench/gpu.py's plan, kernels and what is compiled of transformers included
EXTENSIONS = {"_C": "csrc", "_cpu": "csrc/cpu"}
LATER = ("nice", "-n", "5")  # the tests: what is timed behind them is to be compiled by then
CUDA = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass
class Run:
    """The command's clock, and what has failed so far."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def step(self, commands: dict[str, list[str]], environment: dict[str, str], most: float, kept: Path) -> None:
        """Processes beside one another, ended when their share of the time is up; what they say comes one by one, here
        and in the file `kept`."""
        share = min(most, self.left)
        if share <= 5:
            self.failures += [f"{name}: not run, the time was up" for name in commands]
            return
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("")
        print(f"== {', '.join(commands)} (at most {share:.0f} s)", flush=True)
        until = time.monotonic() + share
        logs = {name: (PLACE / f"{name}.log").open("w+") for name in commands}
        with interruptible():
            running = {
                name: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=logs[name], stderr=subprocess.STDOUT)
                for name, command in commands.items()
            }
        late: set[str] = set()
        for name, process in running.items():
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                late = end(running)
            if name in late:
                self.failures.append(f"{name}: ended after {share:.0f} s")
            elif process.returncode:
                self.failures.append(f"{name}: exit code {process.returncode}")
            with logs[name] as log:
                log.seek(0)
                said = f"-- {name}\n{log.read().rstrip()}"
            print(said, flush=True)
            with kept.open("a") as joined:
                joined.write(f"{said}\n")


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside can be interrupted, also where a shell runs all of this in the background: a process there
    ignores Ctrl-C, and what it starts inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end(processes: dict[str, subprocess.Popen[bytes]]) -> set[str]:
    """Those that still run, as Ctrl-C does: pytest then says what has failed by now. What does not end is killed."""
    late = {name: process for name, process in processes.items() if process.poll() is None}
    for process in late.values():
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + SAYS_WHY
    for process in late.values():
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return {*late}


def cuda_device() -> str:
    """The name of the device; empty where none is usable, or torch isn't there."""
    found = subprocess.run([sys.executable, "-c", CUDA], capture_output=True, text=True, cwd="/")
    return found.stdout.strip().splitlines()[-1] if found.returncode == 0 and found.stdout.strip() else ""


def make_layout() -> None:
    """build/gpu/speeder_engine: links to the modules, and the extensions."""
    package = PLACE / "speeder_engine"
    shutil.rmtree(PLACE, ignore_errors=True)
    package.mkdir(parents=True)
    sources = [*(ROOT / "engine").iterdir(), ROOT / "triton_kernels", ROOT / "export"]
    for path in sources:
        if path.name != "__pycache__" and path.suffix != ".so":
            (package / path.name).symlink_to(path)
    build_extensions(package)


def build_extensions(package: Path) -> None:
    """Both at once, with the compiler alone; what another Python has built lies elsewhere and stays."""
    includes = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11_headers())]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *includes]
    objects = {name: sorted((ROOT / folder).glob("*.cpp")) for name, folder in EXTENSIONS.items()}
    made = {path: PLACE / f"{name}-{path.stem}.o" for name, paths in objects.items() for path in paths}
    building = [subprocess.Popen([*compiler, *flags, "-c", path, "-o", out]) for path, out in made.items()]
    codes = [process.wait() for process in building]
    if any(codes):
        raise SystemExit("make gpu: the extensions do not compile")
    for name, paths in objects.items():
        target = package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run([*compiler, "-shared", *(made[path] for path in paths), "-o", target], check=True)


def pybind11_headers() -> str:
    """pybind11's own, or those that torch brings."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            headers = Path(spec.origin).parent / folder
            if (headers / "pybind11" / "pybind11.h").is_file():
                return str(headers)
    raise SystemExit("make gpu: pybind11's headers are not there; install pybind11")


def environment(smoke: bool) -> dict[str, str]:
    # the root itself must not be named: its folders bear the names of other people's packages
    return {
        **os.environ,
        # tests: where -p on_cuda is, which pytest imports before it reads `pythonpath` in older releases
        "PYTHONPATH": os.pathsep.join([str(PLACE), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "1" if smoke else "0",
        "SPEEDER_TEST_DEVICE": "cpu" if smoke else "cuda",
        "SPEEDER_PROGRESS": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }


def test_commands(smoke: bool) -> dict[str, list[str]]:
    """A process a file of kernels, and several of the engine's tests: what takes them time is the compiler, and it uses
    one core."""
    pytest = [*LATER, sys.executable, "-m", "pytest", "-c", "tests/gpu/pytest.ini", "--rootdir", str(ROOT), "-q"]
    engine = ROOT / "tests" / "gpu" / "test_engine.py"
    names = re.findall(r"^def (test_\w+)", engine.read_text(), re.MULTILINE)
    parts = [names[part::NUM_ENGINE_PARTS] for part in range(1 if smoke else NUM_ENGINE_PARTS)]
    commands = {f"engine {at}": [*pytest, *(f"{engine}::{name}" for name in part)] for at, part in enumerate(parts)}
    commands["training"] = [*pytest, str(engine.with_name("test_training.py"))]
    for path in sorted((ROOT / "tests" / "kernels").glob("test_swiglu.py" if smoke else "test_*.py")):
        # shapes at random are many compilations, and were tried in the interpreter
        commands[path.stem.removeprefix("test_")] = [*pytest, "-p", "on_cuda", str(path), "-k", "not test_any_"]
    return commands


def benchmarks(smoke: bool) -> list[str]:
    return [sys.executable, "bench/gpu.py", *(["--cpu-smoke"] if smoke else [])]


def compile_commands(smoke: bool) -> dict[str, list[str]]:
    """What the benchmarks run is compiled beside the tests, a process a part, and not while they are timed."""
    parts = range(1 if smoke else NUM_PARTS)
    return {f"compile {part}": [*benchmarks(smoke), "--compile", str(part)] for part in parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU: that this command works")
    options = parser.parse_args()
    run, smoke = Run(options.seconds), options.cpu_smoke
    name = "cpu-smoke" if smoke else cuda_device()
    if not name:
        print("make gpu: no CUDA device is usable from this python3; run it on a machine with one")
        return 1
    make_layout()
    print(f"{name}: built in {run.seconds - run.left:.0f} s", flush=True)
    out = options.out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    settings = environment(smoke)
    run.step(compile_commands(smoke) | test_commands(smoke), settings, 230, out / "tests.log")
    # alone: they are timed. By the clock on the wall: a process takes its time to start
    until = ["--seconds", str(run.seconds), "--until", str(time.time() + run.left - 15)]
    run.step({"benchmarks": [*benchmarks(smoke), "--out", str(out), *until]}, settings, run.left - 5, out / "bench.log")
    print("\n".join(["", *(f"FAILED {each}" for each in run.failures)]) if run.failures else "all passed")
    print(f"{run.seconds - run.left:.0f} s; results in {out}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
