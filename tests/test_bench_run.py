"""bench/run.py as it is called, and what it measures with: interleaving, quantiles, limits, reports, the guard."""

import json
import os
import signal
import subprocess
import sys
import time

import guard
import pytest
import torch
import typer
from command import script
from gemm import forms, packs, step_products, work_of
from interrupts import take_interrupts
from limits import Limits, Probe, Work, bearable
from measure import Clock, OutOfTime, Timed, Timing, interleave
from plot import CHARTS, contenders, draw_all, with_another_run
from report import Report
from rich.console import Console
from sections.latency import Row
from waiting import spinning, wait_by

from speeder_engine.prompt import PromptLayout
from speeder_engine.random_engine import SHAPES, random_parts

ALWAYS = {  # keys of `all --quick` that need no optional package
    *("shape", "dtype", "device", "quick", "machine_cpu", "machine_cores", "machine_torch", "seconds"),
    *("cold_ms", "warm_ms", "cold_p95_ms", "cold_runs", "int8_cold_runs", "cold_gemm_ms", "host_us", "peak_mib"),
    *("cold_over_gemm", "warm_over_gemm", "cold_over_limit", "warm_over_limit"),
    *("vs_transformers", "vs_transformers_warm", "vs_transformers_uncached", "vs_transformers_static"),
    *("vs_separate_prompts", "vs_text_generation", "vs_text_generation_warm", "vs_multimodal_generation"),
    *("users_s_1", "users_s_64", "users_s_64_cold", "rows_s_64", "of_ceiling_64", "throughput_of_ceiling"),
    *("closed_users_s", "closed_p50_ms", "poisson_p95_ms", "stream_returning"),
    *("session_cold_50_rows", "session_same_10_rows", "session_append_200_ms", "session_correction_50_rows"),
    *("hit_rate", "hit_rate_10", "hit_rate_100"),
    *("catalogue_ms", "catalogue_over_read", "catalogue_over_read_64", "catalogue_vs_torch", "catalogue_items"),
    *("plan_us_1", "plan_us_64", "block_ops_per_s", "host_step_us_1", "host_step_us_8"),
    *("kernel_add_rms_norm_32_us", "kernel_compressed_attention_32_us"),
    *("train_vs_text", "train_targets_s", "train_text_targets_s"),
    *("ceiling_copy_gb_s", "ceiling_read_gb_s", "ceiling_matmul_bfloat16_gflop_s", "ceiling_matmul_int8_gflop_s"),
}


def run(root, *options):
    command = [sys.executable, str(root / "bench" / "run.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})


@pytest.fixture(scope="module")
def quick(root, tmp_path_factory):
    """What a quick run of everything says, as the last line and as a file; and how long it took."""
    path = tmp_path_factory.mktemp("bench") / "found.json"
    started = time.monotonic()
    done = run(root, "all", "--quick", "--json", path, "--seconds", 90)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), json.loads(path.read_text()), time.monotonic() - started


@pytest.mark.slow
def test_a_quick_run_of_everything(quick):
    found, written, seconds = quick
    assert sorted(ALWAYS - found.keys()) == []
    assert written == found
    assert all(isinstance(value, int | float | str) for value in found.values())
    assert seconds < 120  # 60 on a machine that does nothing else
    assert found["session_cold_50_rows"] == 50
    assert found["session_same_10_rows"] == 0
    assert found["session_append_200_rows"] == 1
    assert found["session_slide_10_rows"] == 41
    assert 0 < found["hit_rate_10"] < found["hit_rate_100"] == found["hit_rate"] < 1
    assert found["cold_over_limit"] >= 1
    assert found["vs_transformers"] == min(found["vs_transformers_uncached"], found["vs_transformers_static"])


@pytest.mark.slow
def test_charts_of_a_run(quick, tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_all(quick[0], tmp_path) == list(CHARTS)
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg", ".png"}
    assert draw_all({"shape": "tiny"}, tmp_path / "none") == []


def test_a_contender_is_drawn_from_the_run_with_more_rounds():
    slow = {"openvino_cold_ms": 114.0, "openvino_cold_runs": 1, "openvino_warm_ms": 74.0, "vs_openvino": 1.3}
    first = {"shape": "tiny", "cold_ms": 87.0, "int8_cold_ms": 50.0, **slow, "session_cold_10_ms": 26.0}
    longer = {"shape": "tiny", "cold_ms": 91.0, "openvino_cold_ms": 131.0, "openvino_cold_runs": 12}
    found = with_another_run(first, longer)
    assert contenders(found) == ["int8", "openvino"]
    assert (found["cold_ms"], found["openvino_cold_ms"], found["openvino_from"]) == (87.0, 131.0, "another run")
    assert "openvino_warm_ms" not in found  # of a run that had one round
    assert with_another_run(longer, first) == longer
    with pytest.raises(ValueError, match=r"^shape: tiny here, 7b in another run"):
        with_another_run(first, longer | {"shape": "7b"})


def test_the_documents_chart_is_that_of_the_committed_runs(root, tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    results = root / "bench" / "results" / "zen4-2-cores"
    committed = (results / "latency.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}" not in committed:
        pytest.skip("drawn with another matplotlib")
    first, more = (json.loads((results / f"{name}.json").read_text()) for name in ("all-0.5b", "latency-0.5b-runtimes"))
    monkeypatch.setattr("plot.CHARTS", {"latency": CHARTS["latency"]})
    draw_all(with_another_run(first, more), tmp_path)
    assert (tmp_path / "latency.svg").read_text() == committed


@pytest.mark.slow
def test_what_was_measured_stays_when_it_is_interrupted(root, tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, str(root / "bench" / "run.py"), "all", "--quick", "--json", str(path)]
    command += ["--only", "transformers_static"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=take_interrupts) as process:
        until = time.monotonic() + 100
        while not path.exists() and time.monotonic() < until:  # written after the first section
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(path.read_text())
    assert {"cold_ms", "vs_transformers_static", "seconds"} <= found.keys()
    assert "train_vs_text" not in found
    assert "interrupted: the rest was not measured" in out


def test_what_takes_longer_than_there_is_time_is_ended():
    """Also where a library tries another way for every Exception."""
    clock, handler = Clock.of(0.1), signal.getsignal(signal.SIGALRM)
    with pytest.raises(OutOfTime), clock.interrupting():
        while True:
            try:
                time.sleep(5)
            except Exception:
                continue
    assert -1 < clock.left <= 0 and signal.getsignal(signal.SIGALRM) is handler
    with Clock.of(0.02).interrupting():
        pass
    time.sleep(0.05)  # nothing rings any more


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("nonsense",), "is not known; choose latency"),
        (("latency", "--shape", "9b"), "is not known; choose one of tiny"),
        (("latency", "--only", "nobody"), "no such contender; there are transformers"),
        (("latency", "--dtype", "int3"), "is none of bfloat16"),
        (("latency", "--waiting", "still"), "'still' is none of sleep, spin"),
        (("cache", "--engine", "nowhere", "--shape", "tiny"), "not both"),
        (("host", "--engine", "nowhere"), "host measures no engine's weights; leave it out"),
        (("cache", "--seconds", "-1"), "-1: a time above 0 is needed"),
        (("cache", "--seconds", "nan"), "nan: a time above 0 is needed"),
        (("cache", "--seconds", "0"), "0: a time above 0 is needed"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(root, options, says):
    done = script(root / "bench" / "run.py", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert says in " ".join(done.stderr.replace("│", " ").split())


def test_threads_that_spin_are_a_matter_of_a_new_process(root, monkeypatch):
    """OpenMP reads its environment when torch is imported."""
    started = []

    def start(program, arguments, environment):
        started.append((program, arguments[1:], environment["GOMP_SPINCOUNT"]))
        raise SystemExit(7)

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setattr("os.execve", start)
    monkeypatch.setattr("sys.orig_argv", ["python", "bench/run.py", "cache"])
    assert script(root / "bench" / "run.py", "cache", "--waiting", "spin").returncode == 7
    assert started == [(sys.executable, ["bench/run.py", "cache"], "300000")]
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    wait_by("spin")
    assert len(started) == 1 and spinning()


def test_an_engine_that_cannot_be_loaded_is_said_before_anything_is_measured(root, tmp_path):
    done = run(root, "all", "--engine", tmp_path / "nowhere")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"bench/run.py: no engine directory: {tmp_path / 'nowhere'} is not a folder")


def test_interleave_takes_turns_and_leaves_preparation_out():
    order = []
    timed = {
        "a": Timed(lambda at: order.append(("a", at))),
        "b": Timed(lambda at: time.sleep(0.001), lambda at: (time.sleep(0.02), order.append(("b", at)))),
        "heavy": Timed(lambda at: order.append(("heavy", at)), every=2),
    }
    timings = interleave(timed, 4, Clock.of(60))
    assert [name for name, at in order if at == 0] == ["a", "b", "heavy"]
    assert [name for name, at in order if at == 2] == ["heavy", "a", "b"]
    assert [at for name, at in order if name == "a"] == [-2, -1, 0, 1, 2, 3]
    assert [at for name, at in order if name == "heavy"] == [-2, -1, 0, 2]
    assert sorted(timings["a"].seconds) == [0, 1, 2, 3]
    assert sorted(timings["heavy"].seconds) == [0, 2]
    assert 0.001 <= timings["b"].p50 < 0.02


def test_interleave_pauses_before_what_is_prepared(monkeypatch):
    order = []
    monkeypatch.setattr("measure.time.sleep", order.append)
    timed = Timed(lambda at: order.append("call"), lambda at: order.append("before"))
    interleave({"a": timed}, 1, Clock.of(60), warm_ups=0, pause=0.1)
    assert order == [0.1, "before", "call"]


def test_interleave_finishes_one_round_and_stops_when_the_time_is_up():
    timings = interleave({"a": Timed(lambda _: time.sleep(0.01)), "b": Timed(lambda _: None)}, 100, Clock.of(0.0))
    assert {name: timing.count for name, timing in timings.items()} == {"a": 1, "b": 1}


def test_quantiles_and_ratios_of_hand_made_timings():
    timing = Timing({at: float(at + 1) for at in range(100)})
    assert (timing.p50, *timing.tails, timing.count) == (50.5, 96.0, 100.0, 100)
    # in rounds 0 and 2 three times as long; round 1, which the other lacks, doesn't count
    assert Timing({0: 3.0, 1: 100.0, 2: 30.0}).over(Timing({0: 1.0, 2: 10.0})) == 3.0
    # a machine that is ten times slower in the second round changes no ratio
    assert Timing({0: 2.0, 1: 20.0, 2: 2.0}).over(Timing({0: 1.0, 1: 10.0, 2: 1.0})) == 2.0


def test_percentiles_are_of_runs_that_have_a_word_on_them():
    """Of twelve runs p95 and p99 are one and the same: the slowest."""
    few, some, many = (Timing(dict.fromkeys(range(count), 0.002)) for count in (19, 20, 100))
    row = Row("ours", few, some, 1.0, 1.5)
    assert row.cells(warm=False) == ["ours", 2.0, None, None, 19, 1.0]
    assert row.cells(warm=True) == ["ours", 2.0, 2.0, None, 20, 1.5]
    assert [list(each.milliseconds) for each in (few, some, many)] == [["p50"], ["p50", "p95"], ["p50", "p95", "p99"]]


def test_the_limit_is_the_longer_of_reading_and_multiplying():
    limits = Limits(torch.device("cpu"), small=True)
    limits.probes = {"read": Probe(lambda: None, 100.0), "matmul_float32": Probe(lambda: None, 1000.0)}
    probes = {"read": Timing({0: 1.0, 1: 2.0}), "matmul_float32": Timing({0: 1.0, 1: 1.0})}
    step = Timing({0: 4.0, 1: 8.0})
    # 200 bytes at 100 and 50 a second are 2 s and 4 s; 500 operations at 1000 a second half a second
    assert limits.over_limit(step, probes, Work(200.0, 500.0)) == 2.0
    assert limits.over_limit(step, probes, Work(0.0, 4000.0)) == 1.5  # median of 1 and 2
    assert limits.best == {"read": 100.0, "matmul_float32": 1000.0}


def test_what_a_chip_only_emulates_is_bounded_by_what_it_multiplies():
    limits = Limits(torch.device("cpu"), small=True)
    limits.best = {"matmul_float32": 100.0, "matmul_bfloat16": 0.3}
    assert limits.matmul("bfloat16") == limits.matmul("float32") == "matmul_float32"
    assert set(limits.pair("bfloat16")) == {"read", "matmul_float32"}
    limits.best["matmul_bfloat16"] = 300.0
    assert limits.matmul("bfloat16") == "matmul_bfloat16"


@pytest.mark.parametrize(("seconds", "side"), [(1e-4, 2048), (0.01, 512), (0.3, 256), (9.0, 256)])
def test_a_product_that_is_emulated_is_probed_in_small(monkeypatch, seconds, side):
    monkeypatch.setattr("limits.clocked", lambda call: seconds)
    found = bearable(lambda side: Probe(lambda: None, side), 2048, torch.device("cpu"))
    assert found.amount == side


def test_products_of_a_step_are_those_of_the_decoder():
    model = random_parts("tiny", num_items=10).model
    products = step_products(model.decoder, rows=50, reads=21)
    tiny = SHAPES["tiny"]
    layer = sum(part.weight.numel() for part in (model.decoder.layers[0].qkv, model.decoder.layers[0].out))
    layer += sum(part.weight.numel() for part in (model.decoder.layers[0].gate_up, model.decoder.layers[0].down))
    key_value = 2 * tiny.num_kv_heads * tiny.head_dim * tiny.hidden_size
    work = work_of(products)
    assert work.num_bytes == 4 * tiny.num_layers * layer
    assert work.flops == 2 * (50 * layer * (tiny.num_layers - 1) + 50 * key_value + 21 * (layer - key_value))
    found = interleave(forms(products), 1, Clock.of(60))
    assert set(found) == {"gemm_plain", "gemm_packed"}


def test_products_are_packed_where_the_machine_can(monkeypatch):
    """bf16's packed form needs AVX-512; the plain one runs everywhere."""
    model = random_parts("tiny", num_items=10).model.to(torch.bfloat16)
    products = step_products(model.decoder, rows=2, reads=1)
    expected = {"gemm_plain"} | ({"gemm_packed"} if packs(torch.bfloat16) else set())
    assert set(interleave(forms(products), 1, Clock.of(60))) == expected

    def refuse(*_):
        raise RuntimeError("bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr("torch.ops.mkldnn._reorder_linear_weight", refuse)
    assert not packs(torch.bfloat16) and set(forms(products)) == {"gemm_plain"}


def test_events_of_a_session_move_the_window_or_do_not():
    from sections.sessions import histories

    layout = PromptLayout(random_parts("tiny", num_items=10).config.prompt)
    for length in (10, 50, 200):
        found = histories(layout, length)
        before, after = found["append"]
        assert len(after) == len(before) + 1 >= length + 1
        assert layout.start(len(before)) == layout.start(len(after))
        before, after = found["slide"]
        assert layout.start(len(before)) < layout.start(len(after))
        before, after = found["correction"]
        assert [old == new for old, new in zip(before, after, strict=True)].count(False) == 1
        assert found["same"][0] == found["same"][1] == found["cold"][1]


def test_a_report_is_flat_rounded_and_ends_with_one_line_of_json(tmp_path, capsys):
    report = Report(tmp_path / "deep" / "found.json")
    report.put("cold_ms", 1.23456789)
    report.put("runs", 40)
    report.describe({"cores": 2})
    report.table("a table", ("", "p50"), [["ours", 0.123456], ["theirs", None], ["rows", 12345]])
    report.note("something was left out")
    report.show(Console(width=80))
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"cold_ms": 1.235, "runs": 40, "machine_cores": 2}
    assert json.loads((tmp_path / "deep" / "found.json").read_text()) == json.loads(last)
    shown = "\n".join(lines)
    assert all(part in shown for part in ("a table", "0.123", "12,345", "something was left out"))


def test_a_report_takes_no_key_twice_and_no_nan():
    report = Report()
    report.put("key", 1)
    with pytest.raises(ValueError, match="measured twice"):
        report.put("key", 2)
    with pytest.raises(ValueError, match="other: nan"):
        report.put("other", float("nan"))


COMMITTED = {"cold_over_gemm": 1.0, "vs_transformers": 2.0}


@pytest.mark.parametrize(
    ("measured", "worse"),
    [
        ({"cold_over_gemm": 1.24, "vs_transformers": 1.61}, []),
        ({"cold_over_gemm": 1.26, "vs_transformers": 2.0}, ["cold_over_gemm"]),  # lower is better
        ({"cold_over_gemm": 0.1, "vs_transformers": 1.59}, ["vs_transformers"]),  # higher is better
        ({"cold_over_gemm": 1.0, "vs_transformers": 9.0, "train_vs_text": 0.1}, []),  # not committed
    ],
)
def test_the_guard_fails_what_is_a_quarter_worse(measured, worse):
    assert [each.key for each in guard.compare(COMMITTED, measured)] == worse


def test_the_guard_measures_again_what_looks_worse_and_keeps_the_best():
    calls = []

    def measure(name):
        calls.append(name)
        noisy = 3.0 if calls.count("latency") == 1 else 1.1
        return {"cold_over_gemm": noisy, "vs_transformers": 2.0} if name == "latency" else {}

    assert guard.measure_until_fine(COMMITTED, measure)["cold_over_gemm"] == 1.1
    assert [calls.count(name) for name in guard.RATIOS] == [2, 1, 1, 1]
    calls.clear()

    def slower(name):
        calls.append(name)
        return {"cold_over_gemm": 3.0} if name == "latency" else {}

    slow = guard.measure_until_fine(COMMITTED, slower)
    assert calls.count("latency") == guard.ATTEMPTS
    assert str(guard.compare(COMMITTED, slow)[0]) == "cold_over_gemm: 3, committed 1"
    assert guard.missing(COMMITTED, slow) == ["vs_transformers"]


def test_the_guard_commits_to_medians():
    values = iter([1.0, 9.0, 2.0])
    found = guard.measure_medians(lambda name: {"cold_over_gemm": next(values)} if name == "latency" else {}, 3)
    assert found == {"cold_over_gemm": 2.0}


def test_the_guard_fails_with_the_key_and_both_figures(tmp_path, monkeypatch, capsys):
    place = tmp_path / "guard.json"
    found = {"cold_over_gemm": 2.0}
    monkeypatch.setattr(guard, "measure_section", lambda name: found if name == "latency" else {})
    monkeypatch.setattr(guard, "count_instructions", lambda: ("g++ 1", 1000))
    with pytest.raises(typer.Exit) as nothing:
        guard.main(place=place)
    guard.main(update=True, place=place)
    with pytest.raises(typer.Exit) as same:
        guard.main(place=place)
    found["cold_over_gemm"] = 2.6
    capsys.readouterr()
    with pytest.raises(typer.Exit) as worse:
        guard.main(place=place)
    assert [each.value.exit_code for each in (nothing, same, worse)] == [1, 0, 1]
    assert capsys.readouterr().out.splitlines()[-1] == "WORSE cold_over_gemm: 2.6, committed 2"


def test_the_guard_compares_machines_of_the_same_kind(tmp_path, monkeypatch, capsys):
    place, measured = tmp_path / "guard.json", []

    def measure(name):
        measured.append(name)
        return {"cold_over_gemm": 9.0} if name == "latency" else {}

    monkeypatch.setattr(guard, "measure_section", measure)
    monkeypatch.setattr(guard, "count_instructions", lambda: ("g++ 1", 1000))
    monkeypatch.setattr(guard, "kind_of_machine", lambda: "float32, AVX2")
    other = {"bfloat16, AVX512": {"cold_over_gemm": 1.0}}
    place.write_text(json.dumps({"ratios": other, "compiler": "g++ 1", guard.INSTRUCTIONS: 1000}))
    with pytest.raises(typer.Exit) as end:
        guard.main(place=place)
    said = capsys.readouterr()
    assert end.value.exit_code == 0 and measured == []
    assert said.err.splitlines() == [
        "ratios: committed with bfloat16, AVX512, here is float32, AVX2: not compared; --update commits these"
    ]
    guard.main(update=True, place=place)
    assert json.loads(place.read_text())["ratios"] == other | {"float32, AVX2": {"cold_over_gemm": 9.0}}
    with pytest.raises(typer.Exit) as end:
        guard.main(place=place)
    assert end.value.exit_code == 0 and len(measured) > 0


def test_the_guards_committed_figures_say_of_which_machines_they_are():
    committed = json.loads(guard.PLACE.read_text())
    known = {key for keys in guard.RATIOS.values() for key in keys}
    assert all(kind.split(", ")[0] in ("bfloat16", "float32") for kind in committed["ratios"])
    assert all(ratios.keys() == known for ratios in committed["ratios"].values())


def test_the_guard_counts_instructions_of_the_same_compiler(capsys):
    committed = {"compiler": "g++ 1", guard.INSTRUCTIONS: 1000}
    assert guard.guard_instructions(committed, ("g++ 1", 1029)) is None
    assert guard.guard_instructions(committed, ("g++ 1", 1031)).measured == 1031
    assert guard.guard_instructions(committed, ("g++ 2", 9999)) is None
    assert "not compared" in capsys.readouterr().err
    assert guard.guard_instructions(committed, None) is None


def test_instructions_of_the_cache_manager_are_the_same_every_time():
    first, second = guard.count_instructions(), guard.count_instructions()
    if first is None:
        pytest.skip("no compiler or no valgrind here")
    assert first == second
    assert first[1] > 1e6
