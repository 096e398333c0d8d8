"""`make gpu` where there is no GPU: what it says, and that its benchmarks run, on tiny shapes."""

import ast
import gc
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import gpu
import make_gpu
import on_cuda
import pytest
import torch
from command import script
from goals import COLD, STATIC, WARM, goals_of
from gpu import EMPTY, Report, compile_part, plan
from kernel_cases import Case, Maker, maker_name
from make_gpu import compile_commands
from measure import CPU, Clock, OutOfTime, measure_ceilings, num_copies, quantiles
from steps import contender_latency

from speeder_engine.random_engine import SHAPES

KERNEL = {"us": 1.5, "gb_s": 1, "tflop_s": 1, "of_ceiling": 1}


@pytest.fixture
def smoke(root, tmp_path):
    """bench/gpu.py with tiny shapes, in this process."""
    yield partial(script, root / "bench" / "gpu.py", "--cpu-smoke", "--out", tmp_path)
    gc.unfreeze()  # what the script froze, as if its process had ended


def test_the_benchmarks_run_on_tiny_shapes(root, tmp_path):
    command = [sys.executable, str(root / "bench" / "gpu.py"), "--cpu-smoke", "--out", str(tmp_path), "--seconds"]
    done = subprocess.run([*command, "900"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["schema"] == 1
    assert found["is_smoke"] is True
    assert found["failed"] == {}
    assert found["machine"]["ceilings"].keys() == {"copy_bytes", "matmul_flops"}
    names = ("add_rms_norm", "swiglu", "item_embed", "qk_norm_rope_store", "compressed_attention", "linear_w8")
    names += ("fused_qkv", "fused_linear gate_up", "fused_linear down", "F.linear qkv", "F.linear down")
    for name in (*names, "keep_last", "candidate_scores", "modality_experts", "top_scores ", "top_scores_two_stage"):
        rows = [row for case, row in found["kernels"].items() if name in case]
        assert rows and all(row.keys() == {"us", "gb_s", "tflop_s", "of_ceiling"} for row in rows), name
    step = found["steps"]["tiny"]
    assert step["latency"].keys() == {"cold 30 + 20", "warm 1 + 20", "warm 1, catalogue"}
    assert all({"bucket_rows", "p50_ms", "count"} <= row.keys() for row in step["latency"].values())
    assert step["graphs_captured"] == 2
    assert step["graph_replays"] > 0
    assert found["steps"]["tiny, launches apart"]["latency"].keys() == step["latency"].keys()
    for label in ("tiny, weights fp8", "tiny, weights int8", "tiny, kv fp8"):
        small = found["steps"][label]
        assert small["latency"].keys() == step["latency"].keys()
        assert small["graphs_captured"] == 2
        assert small["graph_replays"] > 0
        name = "kv_block_bytes" if "kv" in label else "weight_bytes"
        assert small[name] < step[name] * 0.35  # of fp32, scales included
        assert f"{label}, random weights" in (tmp_path / "gpu.txt").read_text()
    theirs = {f"{STATIC}, {name}" for name in (COLD, WARM)}
    assert found["skipped"] == [] and found["transformers"]["tiny"].keys() == theirs
    assert [name.split(", k")[0] for name in found["searches"]] == [
        f"{search} 500 items, {users} users" for search in ("top_scores", "top_scores_two_stage") for users in (1, 4)
    ]
    assert {"us", "gb_s", "of_copy"} == found["searches"].popitem()[1].keys()
    assert 0 < step["saturated"]["batch 2, 1 + 20 ranked"]["of_limit"] < 1
    assert found["goals"] == {}  # no figure of a shape they are about
    assert "these figures mean nothing" in (tmp_path / "gpu.txt").read_text()


def test_every_part_of_the_plan_is_compiled_before_it_is_timed():
    assert set(compile_commands(False)) == {f"compile {part}" for part in range(len(plan(CPU, False)) + 2)}


def test_some_sections_go_into_the_file_that_is_there(smoke, tmp_path):
    before = {
        "schema": 1,
        "is_smoke": True,
        **EMPTY,
        "skipped": ["searches: the rest of it", "searches of more", "steps 7b"],
        "kernels": {"a": KERNEL},
    }
    before |= {"failed": {"searches": "of yesterday", "kernels": "too"}}
    (tmp_path / "gpu.json").write_text(json.dumps(before))
    done = smoke("--only", "searches")
    assert done.returncode == 1, done.stdout + done.stderr  # what had failed before has still
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["searches"]) == 4 and found["kernels"] == {"a": KERNEL} and found["steps"] == {}
    assert (found["skipped"], found["failed"]) == (["searches of more", "steps 7b"], {"kernels": "too"})
    done = smoke("--only", "steps; kernels")
    assert (
        done.returncode == 1 and "bench/gpu.py: steps: no such section; there are steps tiny; searches;" in done.stdout
    )


def steps(cold, p50, **more):
    return {"latency": {COLD: {"device_us": cold, "p50_ms": p50}}, **more}


def test_goals_are_held_against_what_was_found():
    found = {
        "steps": {
            "0.5b": steps(300, 0.5, saturated={"a": {"of_limit": 0.4}, "b": {"of_limit": 0.6}, "c": {"users_s": 1}}),
            "1.5b": steps(1000, 1.1),
            "7b": steps(3200, 3.5),
            "7b, weights fp8": steps(2000, 2.1),
        },
        "searches": {
            "top_scores 1000000 items, 1 users, k=10": {"of_copy": 0.8},
            "top_scores 1000000 items, 64 users, k=10": {"of_copy": 0.5},
            "top_scores_two_stage 1000000 items, 1 users, k=10": {"of_copy": 0.1},
        },
        "transformers": {"0.5b": {f"{STATIC}, {COLD}": {"p50_ms": 2.0}}},
    }
    rows = list(goals_of(found).values())
    assert [row["found"] for row in rows] == pytest.approx([0.3, 1.0, 3.2, 0.2, 0.6, 2.0, 1.6, 4.0])
    assert [row["reached"] for row in rows] == [True, False, True, False, True, False, True, True]
    assert goals_of({"steps": {"7b": found["steps"]["7b"]}, "searches": {}, "transformers": {}}).keys() == {
        "7b, cold: ms of the device"
    }
    lines = gpu.table({**EMPTY, "is_smoke": False, "skipped": [], "goals": goals_of(found)}).splitlines()
    assert "1.5b, cold: ms of the device" in lines[4] and lines[4].endswith("1.000   <= 0.9  missed")
    assert lines[5].endswith("3.200     <= 4")


@pytest.mark.parametrize("part", [0, 5])
def test_a_part_is_compiled_alone(monkeypatch, part):
    called = []
    monkeypatch.setattr(gpu, "touch", lambda load, batches: called.append(load.shape.num_layers))
    monkeypatch.setattr(gpu, "search_makers", lambda *_: [])
    monkeypatch.setattr(
        gpu, "kernel_makers", lambda *_: [("tiny", lambda: SimpleNamespace(call=lambda: called.append(0)))]
    )
    compile_part(part, CPU, True)
    assert called == ([2] if part == 0 else [0])


def test_what_a_section_measured_stands_when_its_time_is_up(tmp_path):
    report = Report(tmp_path, True)

    def section(clock):
        report.found["kernels"]["first"] = KERNEL
        raise OutOfTime

    report.run("kernels", Clock.of(9), 9, section)
    for name in ("gpu.json", "gpu.txt"):
        assert "first" in (tmp_path / name).read_text()
    assert "skipped for want of time: kernels: the rest of it" in (tmp_path / "gpu.txt").read_text()


def broken():
    raise RuntimeError("an illegal memory access was encountered")


def test_a_kernel_that_breaks_the_device_costs_no_other(tmp_path, monkeypatch):
    maker = Maker(SHAPES["tiny"], 32, CPU, torch.float32)
    monkeypatch.setattr(maker.__class__, "gated", lambda self: Case("swiglu 32 rows", broken, 1, 1))
    makers = [("tiny", maker.norm), ("tiny", maker.gated), ("tiny", partial(maker.linear, "down"))]
    monkeypatch.setattr(gpu, "kernel_makers", lambda *_: makers)
    answers = iter([False, True])
    monkeypatch.setattr(gpu, "still_answers", lambda device: next(answers))
    report, ceilings = Report(tmp_path, True), measure_ceilings(CPU, True)

    def measured_from(case):
        return report.run("kernels", Clock.of(60), 60, partial(gpu.kernels, report, CPU, ceilings, True, case))

    assert measured_from(0) == 2  # the process is of no use any more
    failure = {"kernel at tiny: <lambda>(), 32 rows": "RuntimeError: an illegal memory access was encountered"}
    assert report.found["failed"] == failure and [*report.found["kernels"]] == ["tiny add_rms_norm 32 rows"]
    assert measured_from(2) == 0 and len(report.found["kernels"]) == 2 and report.found["failed"] == failure
    measured_from(1)  # where the device goes on, so does the section
    assert len(report.found["kernels"]) == 2 and report.found["failed"] == failure
    assert maker_name(makers[2][1]) == "linear(down), 32 rows"


def test_what_is_left_is_measured_in_another_process(tmp_path, monkeypatch):
    began = []
    monkeypatch.setattr(os, "execv", lambda program, command: began.append(command[1:]))
    options = Namespace(out=tmp_path, only="searches; kernels", until=9e9)
    gpu.go_on_elsewhere("kernels", 7, Clock.of(50), options)
    (command,) = began
    assert command[0].endswith("bench/gpu.py") and {"--out", str(tmp_path), "searches; kernels"} <= {*command}
    assert command[command.index("--begin") : command.index("--begin") + 4] == ["--begin", "kernels", "--case", "7"]
    assert 45 < float(command[command.index("--seconds") + 1]) <= 50


def test_a_run_that_goes_on_keeps_what_was_found(smoke, tmp_path):
    found = {"schema": 1, "is_smoke": True, **EMPTY, "skipped": [], "failed": {"searches": "lost the device"}}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    only = ("--only", "searches; kernels", "--begin", "kernels", "--case", "12")
    done = smoke(*only)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["searches"] == {} and found["failed"] == {"searches": "lost the device"}
    kinds = {name.split()[1] for name in found["kernels"]}
    assert "keep_last" in kinds and "add_rms_norm" not in kinds


def test_what_processes_say_is_joined_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_gpu, "PLACE", tmp_path)
    run = make_gpu.Run(60)
    says = {
        name: [sys.executable, "-c", f"print('{name} speaks'); raise SystemExit({code})"]
        for name, code in (("a", 0), ("b", 3))
    }
    run.step(says, dict(os.environ), 30, tmp_path / "out" / "tests.log")
    assert (tmp_path / "out" / "tests.log").read_text() == "-- a\na speaks\n-- b\nb speaks\n"
    assert run.failures == ["b: exit code 3"]


def test_what_is_late_says_what_it_knows_or_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(make_gpu, "PLACE", tmp_path)
    monkeypatch.setattr(make_gpu, "SAYS_WHY", 1.5)
    waits = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n raise SystemExit('one failed by then')"
    hangs = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    run = make_gpu.Run(60)
    commands = {name: [sys.executable, "-c", code] for name, code in (("a", waits), ("b", hangs), ("c", "print(1)"))}
    run.step(commands, dict(os.environ), 5.5, tmp_path / "out" / "tests.log")
    assert (tmp_path / "out" / "tests.log").read_text() == "-- a\none failed by then\n-- b\n\n-- c\n1\n"
    assert run.failures == ["a: ended after 6 s", "b: ended after 6 s"] and run.left > 45


def test_every_test_of_the_engine_is_run_on_a_gpu_once(root):
    commands = make_gpu.test_commands(False)
    named = [word.partition("::")[2] for words in commands.values() for word in words if "::" in word]
    lines = (root / "tests" / "gpu" / "test_engine.py").read_text().splitlines()
    assert sorted(named) == sorted(line[4 : line.index("(")] for line in lines if line.startswith("def test_"))
    files = {path.stem.removeprefix("test_") for path in (root / "tests" / "kernels").glob("test_*.py")}
    assert commands.keys() - files == {"training", *(f"engine {part}" for part in range(make_gpu.NUM_ENGINE_PARTS))}


def test_what_is_launched_by_hand_is_not_tried_on_a_device(root):
    """on_cuda moves the tensors of `launch_...` alone: a kernel that is called itself would get CPU tensors there."""
    by_hand = set()
    for path in (root / "tests" / "kernels").glob("test_*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and on_cuda.HUGE not in function.name:
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                by_hand |= {path.stem for call in calls if isinstance(call.func, ast.Subscript)}
    assert by_hand == {"test_interpreter"} <= {*on_cuda.ELSEWHERE}


class Asked:
    """A contender that notes whom it is asked for; with the last of so many it takes more time than there is."""

    label = "transformers, asked"

    def __init__(self, most=math.inf):
        self.users, self.most = [], most

    def answer(self, user):
        self.users.append(user)
        if len(self.users) == self.most:
            time.sleep(30)

    warm_up = answer_warm = answer


def test_a_contenders_calls_stand_when_its_time_is_up_and_one_user_is_enough_to_compile():
    asked, found = Asked(), {}
    contender_latency(asked, ["ada"], Clock.of(math.inf), CPU, found)
    assert asked.users == ["ada"] * 3 and found == {}
    with pytest.raises(OutOfTime):
        contender_latency(Asked(5), range(9), Clock.of(3), CPU, found)
    assert found.keys() == {f"asked, {COLD}"} and found[f"asked, {COLD}"]["count"] == 1
    contender_latency(Asked(), range(4), Clock.of(60), CPU, found)
    assert [row["count"] for row in found.values()] == [1, 1] and found.keys() == {f"asked, {COLD}", f"asked, {WARM}"}


def test_a_quantile_needs_samples():
    assert quantiles([]) == {"count": 0}
    assert quantiles([0.001]).keys() == {"p50_ms", "count"}
    assert quantiles([0.001] * 20).keys() == {"p50_ms", "p95_ms", "count"}
    assert quantiles([0.001] * 100).keys() == {"p50_ms", "p95_ms", "p99_ms", "count"}


def test_what_a_kernel_reads_is_not_in_the_cache_when_it_is_timed():
    assert num_copies(9e6, 50 << 20) == 12
    assert num_copies(700e6, 50 << 20) == 1
    assert num_copies(2.06e6, 50 << 20) == 51  # the smallest weights there are: of 0.5B's queries, keys and values
    assert num_copies(1e5, 50 << 20) == 1  # rows: the kernel before has just written them
    assert num_copies(1e5, 0) == 1


@pytest.mark.parametrize("name", ["make_gpu.py", "gpu.py"])
def test_without_a_gpu_one_line_says_so(root, tmp_path, monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes it starts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = script(root / "bench" / name, "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    [line] = done.stdout.splitlines()
    assert "no CUDA device is usable" in line
    assert list(tmp_path.iterdir()) == []
