"""Tiles of the kernels on this GPU: what each launcher chooses, beside the best of what stands around it.

    PYTHONPATH=build/gpu python3 bench/tune.py --out bench/results/GPU [--only 'fused_linear; top_scores']

A launcher asks a function of its file for tiles, warps and stages. Here another one answers: each option halved and
doubled, one at a time, and from the best of those once more. Everything tried must give what the launcher's own choice
gives. Nothing is written back: those functions are rules, and what to make of the figures is for people to say.
`make gpu` leaves build/gpu behind, which it needs. `--cpu-smoke` runs tiny shapes in Triton's interpreter; its figures
mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

if "--cpu-smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from commands import listed
from gpu import machine, still_answers
from kernel_cases import Case, Maker, maker_name
from measure import CPU, Clock, clocked, device_seconds, l2_bytes, num_copies
from torch import Tensor

from speeder_engine.random_engine import SHAPES
from speeder_engine.triton_kernels import compressed_attention, fused_linear, fused_qkv, linear_w8, top_scores
from speeder_engine.triton_kernels.few_rows import CUT_AT

Options = dict[str, int]
TRITON = {"num_warps": 4, "num_stages": 3}  # where a launcher says nothing
BOUNDS = {"num_warps": (2, 16), "num_stages": (1, 10), "SPLITS": (1, 32)}
TILE = (16, 512)  # of all other options
CLIMBS = 2  # rounds
CLOSE = 0.02  # of the largest element: rounding to bf16, summed in another order


@dataclass(frozen=True)
class Asked:
    """What a launcher asks: `function` of `module`; these of its answer are changed."""

    module: ModuleType
    function: str
    names: tuple[str, ...]

    def answering(self, answer: Callable[..., Options]) -> Any:
        return patch.object(self.module, self.function, answer)


ASKED = {
    "fused_linear": Asked(
        fused_linear, "few_rows_options", ("BLOCK_OUT", "BLOCK_SIZE", "SPLITS", "num_warps", "num_stages")
    ),
    "fused_qkv": Asked(fused_qkv, "few_rows_options", ("BLOCK_SIZE", "SPLITS", "num_warps", "num_stages")),
    "compressed_attention": Asked(compressed_attention, "tile_options", ("KEYS", "num_warps")),
    "linear_w8": Asked(
        linear_w8, "linear_options", ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_SIZE", "num_warps", "num_stages")
    ),
    "top_scores": Asked(top_scores, "partial_options", ("BLOCK_ITEMS", "BLOCK_SIZE", "num_warps", "num_stages")),
}


@dataclass(frozen=True)
class Subject:
    """A kernel at one shape."""

    operation: str
    name: str
    make: Callable[[], Case]

    @property
    def asked(self) -> Asked:
        return ASKED[self.operation]

    def chosen(self) -> Options:
        """What the launcher would choose; nothing is launched."""
        original = getattr(self.asked.module, self.asked.function)

        def answer(*args: Any, **kwargs: Any) -> Options:
            raise _Answered(original(*args, **kwargs))

        try:
            with self.asked.answering(answer):
                self.make().call()
        except _Answered as answered:
            return answered.options
        raise AssertionError(f"{self.name} asks for no options")

    def run(self, options: Options, case: Case) -> Any:
        with self.asked.answering(lambda *_, **__: options):
            return case.call()


class _Answered(Exception):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options


def subjects(device: torch.device, smoke: bool) -> list[Subject]:
    """Those that decide what a pass and a search take."""
    dtype = torch.float32 if smoke else torch.bfloat16
    found = []
    for shape in ("tiny",) if smoke else ("0.5b", "7b"):
        config = replace(SHAPES[shape], head_dim=32) if smoke else SHAPES[shape]  # whose heads fit `fused_qkv`
        for num_rows in (16,) if smoke else (16, 32, 64, 128):
            maker = Maker(config, num_rows, device, dtype)
            makes: list[tuple[str, Callable[[], Case]]] = [("fused_qkv", maker.fused_heads)]
            makes += [("fused_linear", partial(maker.fused, part)) for part in ("gate_up", "down")]
            makes += [("fused_linear", partial(maker.fused, "gate_up", kind)) for kind in ("int8", "fp8")]
            makes += [("compressed_attention", maker.attention)]
            found += [Subject(operation, f"{shape} {maker_name(make)}", make) for operation, make in makes]
        maker = Maker(config, 16 if smoke else 512, device, dtype)
        for make in (partial(maker.small_linear, "int8"), partial(maker.small_linear, "fp8", rows=True)):
            found.append(Subject("linear_w8", f"{shape} {maker_name(make)}", make))
    maker = Maker(SHAPES["tiny" if smoke else "0.5b"], 32, device, dtype)
    for num_users in (1, 2 if smoke else 64):
        num_items = 300 if smoke else 1_000_000
        make = partial(maker.search, num_items, num_users)
        found.append(Subject("top_scores", f"search of {num_items:,}, {num_users} users", make))
    return found


def neighbours(options: Options, names: tuple[str, ...]) -> Iterator[Options]:
    """Each of `names` halved and doubled; a stage fewer, one and two more."""
    for name in names:
        now = options.get(name, TRITON.get(name, 0))
        least, most = BOUNDS.get(name, TILE)
        for value in (now - 1, now + 1, now + 2) if name == "num_stages" else (now // 2, now * 2):
            if least <= value <= most and value != now:
                yield _covering(options, {name: value})


def _covering(options: Options, change: Options) -> Options:
    """A matrix that is cut otherwise has parts of another length: of whole blocks, or columns would count twice."""
    made = options | change
    if "SPLITS" in made:
        whole, step = options["PART"] * options["SPLITS"], max(CUT_AT, made["BLOCK_SIZE"])
        made["PART"] = -(-whole // (made["SPLITS"] * step)) * step
    return made


@contextmanager
def launching(smoke: bool) -> Iterator[None]:
    """In a smoke test the public functions launch their kernels on the CPU too: in the interpreter."""
    with torch.inference_mode(), ExitStack() as stack:
        for asked in ASKED.values() if smoke else ():
            stack.enter_context(patch.object(asked.module, "runs_triton", lambda *_: True))
        yield


class Climb:
    """One subject on its way from what its launcher chooses to something faster."""

    def __init__(self, subject: Subject, most: int | None = None) -> None:
        """`most`: of its neighbours; all if None."""
        self.subject, self.most = subject, most
        self.chosen = subject.chosen()
        self.best = self.chosen
        self.seconds: dict[str, float] = {}  # of everything tried, by its options as JSON
        self.impossible: dict[str, str] = {}
        self.wrong: list[Options] = []

    def ahead(self) -> list[Options]:
        """What is to be tried next."""
        around = [self.best, *islice(neighbours(self.best, self.subject.asked.names), self.most)]
        tried = self.seconds.keys() | self.impossible.keys()
        return [each for each in around if json.dumps(each) not in tried and each not in self.wrong]

    def measure(self, device: torch.device) -> None:
        """Times what is ahead, the launcher's choice first: the others are held against what it gives."""
        case = self.subject.make()
        others = [self.subject.make() for _ in range(num_copies(case.num_bytes, l2_bytes(device)) - 1)]
        expected = None
        for options in [self.chosen, *(each for each in self.ahead() if each != self.chosen)]:
            try:
                found = self.subject.run(options, case)
                expected = found if expected is None else expected
                if not alike(found, expected):
                    self.wrong.append(options)
                    continue
                calls = [partial(self.subject.run, options, each) for each in (case, *others)]
                seconds = device_seconds(calls, device, rounds=5) if device.type == "cuda" else clocked(calls[0])
                self.seconds[json.dumps(options)] = seconds
            except Exception as error:  # too much shared memory, a tile its layout has no instructions for
                self.impossible[json.dumps(options)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if not still_answers(device):
                    raise
                if options == self.chosen:
                    return
        self.best = json.loads(min(self.seconds, key=lambda options: self.seconds[options]))

    def found(self) -> dict[str, Any]:
        own, best = self.seconds.get(json.dumps(self.chosen)), self.seconds.get(json.dumps(self.best))
        return {
            "chosen": self.chosen,
            "chosen_us": None if own is None else own * 1e6,
            "best": {name: value for name, value in self.best.items() if self.chosen.get(name) != value},
            "best_us": None if best is None else best * 1e6,
            "tried": len(self.seconds),
            "impossible": self.impossible,
            "wrong": self.wrong,
        }


def alike(found: Any, expected: Any) -> bool:
    """Whether all fractions of two outcomes are equal but for rounding."""
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    return all(bool(((a - b).abs() <= CLOSE * b.abs().max()).all()) for a, b in pairs)


def _tensors(outcome: Any) -> list[Tensor]:
    given = outcome if isinstance(outcome, tuple) else (outcome,)
    return [each.float() for each in given if each.is_floating_point()]


def compile_ahead(climbs: Mapping[int, Climb], seconds: float) -> None:
    """What is timed next goes into Triton's cache, on all cores; what fails there will be met again."""
    work = [(index, tried) for index, climb in climbs.items() for tried in climb.ahead()]
    processes = min(os.cpu_count() or 1, 16, len(work))
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number in range(processes):
            path = Path(folder) / f"{number}.json"
            path.write_text(json.dumps(work[number::processes]))
            command = [sys.executable, __file__, "--compile", str(path)]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        clock = Clock.of(seconds)
        for process in running:
            try:
                process.wait(max(clock.left, 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def compile_listed(path: Path, device: torch.device) -> None:
    found = subjects(device, smoke=False)
    for index, options in json.loads(path.read_text()):
        try:
            found[index].run(options, found[index].make())
            torch.cuda.synchronize(device)
        except Exception as error:
            print(f"{found[index].name}, {options}: {error}")


def table(found: Mapping[str, Any]) -> str:
    lines = [f"{'':50} {'us':>9} {'best':>9} {'less':>6}  with"]
    for name, row in found.items():
        if row["best_us"] is None or row["chosen_us"] is None:
            lines.append(f"{name:50} {'-':>9} {'-':>9} {'-':>6}  what it chooses can't be run")
            continue
        changed = ", ".join(f"{key} {value}" for key, value in row["best"].items()) or "what it chooses"
        less = 1 - row["best_us"] / row["chosen_us"]
        lines.append(f"{name:50} {row['chosen_us']:9.1f} {row['best_us']:9.1f} {less:6.0%}  {changed}")
        lines += [f"WRONG {name}: with {each} it gives something else" for each in row["wrong"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for tune.json and tune.txt")
    parser.add_argument("--only", default="", help=f"operations between semicolons: {'; '.join(ASKED)}")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU; the figures mean nothing")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    smoke, only = options.cpu_smoke, set(listed(options.only))
    if strange := sorted(only - ASKED.keys()):
        print(f"bench/tune.py: {'; '.join(strange)}: nothing is tried there; of {'; '.join(ASKED)} it is")
        return 1
    if not smoke and not torch.cuda.is_available():
        print("bench/tune.py: no CUDA device is usable here; run it on a machine with one, or with --cpu-smoke")
        return 1
    device = CPU if smoke else torch.device("cuda")
    with launching(smoke):
        if options.compile is not None:
            compile_listed(options.compile, device)
            return 0
        return tune(device, only, options)


def tune(device: torch.device, only: set[str], options: argparse.Namespace) -> int:
    clock, smoke = Clock.of(options.seconds), options.cpu_smoke
    options.out.mkdir(parents=True, exist_ok=True)
    climbs = {
        index: Climb(subject, 1 if smoke else None)
        for index, subject in enumerate(subjects(device, smoke))
        if not only or subject.operation in only
    }
    for _ in range(1 if smoke else CLIMBS):
        if not smoke:
            compile_ahead(climbs, clock.left / 2)
        for climb in climbs.values():
            if clock.left > 0:
                climb.measure(device)
            found = {each.subject.name: each.found() for each in climbs.values() if each.seconds or each.impossible}
            report = {"is_smoke": smoke, "machine": machine(device), "found": found}
            (options.out / "tune.json").write_text(json.dumps(report, indent=1) + "\n")
            (options.out / "tune.txt").write_text(table(found) + "\n")
    print(table(found))
    if left := [climb.subject.name for climb in climbs.values() if not climb.seconds]:
        print(f"without a figure: {', '.join(left)}")
    return 1 if any(climb.wrong for climb in climbs.values()) or left else 0


if __name__ == "__main__":
    sys.exit(main())
