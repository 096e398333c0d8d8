"""One user at a time: a cold one, and one who returns with one new item; beside the step's own products, the machine's
limits, and every alternative on the same users."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, fields

from baselines.base import Baseline, Unavailable
from baselines.registry import BASELINES, EAGER, make
from context import Bench
from gemm import forms, step_products, work_of
from machine import peak_mib, reset_peak
from measure import Clock, OutOfTime, Timed, Timing, interleave, median_of
from ours import Ours
from workload import BenchUser

from speeder_engine import EngineConfig

NUM_USERS = 8
HEAVY_EVERY = 2  # rounds
SLOW = ("onnxruntime", "openvino", "llama_cpp", "transformers_compiled")  # to make
OWN_SHARE = 0.15  # of the section's time


@dataclass(frozen=True)
class Row:
    """One contender's line: its own seconds, and how many times ours they are."""

    label: str
    cold: Timing | None
    warm: Timing | None
    cold_ratio: float | None = None
    warm_ratio: float | None = None

    def has(self, warm: bool) -> bool:
        return (self.warm if warm else self.cold) is not None

    def cells(self, warm: bool) -> list[object]:
        """p50, p95 and p99 in ms, as far as the runs say them, and of how many."""
        timing, ratio = (self.warm, self.warm_ratio) if warm else (self.cold, self.cold_ratio)
        assert timing is not None
        return [self.label, *timing.cells(1e3), ratio]


def measure(bench: Bench, clock: Clock) -> None:
    users = bench.users(NUM_USERS)
    reset_peak(bench.device)
    ours = Ours(bench.subject)
    rows: list[Row] = []
    try:
        rows.append(own_row(bench, ours, users, Clock.of(OWN_SHARE * clock.left)))
        rows += quantized_rows(bench, ours, users, clock)
        alternatives(bench, ours, users, rows, clock)
    finally:
        ours.close()
        show(bench, rows)


def show(bench: Bench, rows: list[Row]) -> None:
    columns = ("", "p50 ms", "p95", "p99", "runs", "times ours")
    for warm, what in ((False, "a cold user, 30 items"), (True, "a returning user, one new item")):
        title = f"{bench.subject_name}: {what} and 20 candidates"
        if cells := [row.cells(warm) for row in rows if row.has(warm)]:
            bench.report.table(title, columns, cells)


def calls(contender: Baseline, users: list[BenchUser], warm: bool, every: int = 1) -> Timed:
    """Each round another user, the same for all contenders."""

    def user(at: int) -> BenchUser:
        return users[at % len(users)]

    if not warm:
        return Timed(lambda at: contender.answer(user(at)), every=every)
    return Timed(lambda at: contender.answer_warm(user(at)), lambda at: contender.warm_up(user(at)), every)


def own_row(bench: Bench, ours: Ours, users: list[BenchUser], clock: Clock) -> Row:
    """Our step beside its own products and the machine's limits."""
    timings: dict[str, Timing] = {}
    for name, rows, answer in (
        ("cold", bench.workload.cold_rows, ours.answer),
        ("warm", bench.workload.warm_rows, ours.answer_warm),
    ):
        check_rows(ours, users[0], name, rows, answer)
        share = Clock.of(clock.left / (2 - len(timings)))
        timings[name] = beside_products(bench, ours, users, name, rows, share)
    bench.report.put("host_us", host_us(ours, users, bench.rounds(20, 60)))
    bench.report.put("peak_mib", peak_mib(bench.device))
    bench.report.table(
        "our step, and what bounds it",
        ("", "ms", "own products, ms", "/ products", "/ limit"),
        [
            [name, *(bench.report.values[f"{name}_{key}"] for key in ("ms", "gemm_ms", "over_gemm", "over_limit"))]
            for name in timings
        ],
    )
    return Row(ours.label, timings["cold"], timings["warm"], 1.0, 1.0)


def check_rows(ours: Ours, user: BenchUser, name: str, rows: int, answer: Callable[[BenchUser], object]) -> None:
    """What is timed is what the workload says. Raises RuntimeError if the engine computes other rows."""
    ours.warm_up(user)
    computed = ours.rows(lambda: answer(user))
    if computed != rows:
        raise RuntimeError(f"a {name} user takes {computed} rows, the workload says {rows}")


def beside_products(bench: Bench, ours: Ours, users: list[BenchUser], name: str, rows: int, clock: Clock) -> Timing:
    decoder, report = bench.subject.model.decoder, bench.report
    products = step_products(decoder, rows, bench.workload.warm_rows)
    work = work_of(products)
    timed = {"speeder": calls(ours, users, name == "warm"), **forms(products), **bench.limits.pair(bench.dtype)}
    timings = interleave(timed, bench.rounds(25, 40), clock, bench.device, pause=bench.pause)
    best = min((each for key, each in timings.items() if key.startswith("gemm")), key=lambda each: each.p50)
    ours_timing = timings["speeder"]
    for percentile, value in ours_timing.milliseconds.items():
        report.put(f"{name}_ms" if percentile == "p50" else f"{name}_{percentile}_ms", value)
    report.put(f"{name}_runs", ours_timing.count)
    report.put(f"{name}_gemm_ms", best.p50 * 1e3)
    report.put(f"{name}_over_gemm", ours_timing.over(best))
    report.put(f"{name}_over_limit", bench.limits.over_limit(ours_timing, timings, work))
    return ours_timing


def host_us(ours: Ours, users: list[BenchUser], rounds: int) -> float:
    """Microseconds of a warm request outside the pass over tensors."""
    spent: dict[int, float] = {}

    def call(at: int) -> None:
        ours.pass_seconds = 0.0
        ours.answer_warm(users[at % len(users)])
        spent[at] = ours.pass_seconds

    with ours.watched():
        timed = Timed(call, lambda at: ours.warm_up(users[at % len(users)]))
        timing = interleave({"warm": timed}, rounds, Clock.of(20.0))["warm"]
    return median_of((seconds - spent[at]) * 1e6 for at, seconds in timing.seconds.items())


def quantized_rows(bench: Bench, ours: Ours, users: list[BenchUser], clock: Clock) -> list[Row]:
    """The engine with int8 weights, where it has them, beside the one without."""
    if "weights" not in {field.name for field in fields(EngineConfig)}:
        bench.report.note("int8: this engine has no such weights")
        return []
    try:
        small = Ours(bench.subject, "speeder-engine, int8", weights="int8")
    except Exception as error:
        bench.report.note(f"int8: {first_line(error)}")
        return []
    try:
        row = paired(bench, ours, small, users, Clock.of(OWN_SHARE * clock.left))
    finally:
        small.close()
    assert row.cold is not None and row.warm is not None and row.cold_ratio and row.warm_ratio
    for name, timing in (("cold", row.cold), ("warm", row.warm)):
        bench.report.put(f"int8_{name}_ms", timing.p50 * 1e3)
        bench.report.put(f"int8_{name}_runs", timing.count)
    bench.report.put("int8_over_bf16", 1 / row.cold_ratio)
    bench.report.put("int8_over_bf16_warm", 1 / row.warm_ratio)
    return [row]


def paired(bench: Bench, ours: Ours, other: Baseline, users: list[BenchUser], clock: Clock) -> Row:
    """Another contender in turn with ours."""
    found: list[tuple[Timing, float] | None] = []
    for warm in (False, True):
        if warm and not other.has_warm:
            found.append(None)
            continue
        # in the tiny shape of a quick run nothing takes seconds
        rounds, every = (7, HEAVY_EVERY) if other.heavy and not bench.quick else (bench.rounds(15, 12), 1)
        timed = {"ours": calls(ours, users, warm), "other": calls(other, users, warm, every)}
        share = Clock.of(clock.left if warm or not other.has_warm else clock.left / 2)
        timings = interleave(timed, rounds, share, bench.device, bench.rounds(2, 1), bench.pause)
        found.append((timings["other"], timings["other"].over(timings["ours"])))
    (cold, cold_ratio), (warm_timing, warm_ratio) = (each or (None, None) for each in found)
    return Row(other.label, cold, warm_timing, cold_ratio, warm_ratio)


def alternatives(bench: Bench, ours: Ours, users: list[BenchUser], rows: list[Row], clock: Clock) -> None:
    """Each alternative alone with ours, so that none costs another memory; one that fails costs the others nothing."""
    chosen = choose(bench)
    ratios: dict[str, Row] = {}
    for done, key in enumerate(bench.track(chosen, "alternatives")):
        if clock.left <= 0:
            bench.report.note(f"{key}: not run, the time was up")
            continue
        try:
            with clock.interrupting():
                other = make(key, bench.subject)
        except Unavailable as error:
            bench.report.note(f"{key}: {first_line(error)}")
            continue
        except OutOfTime:
            bench.report.note(f"{key}: not run, the time was up before it was made")
            continue
        try:
            row = paired(bench, ours, other, users, Clock.of(clock.left / (len(chosen) - done)))
        except Exception as error:  # a library that fails on this machine must not end the run
            bench.report.note(f"{key}: failed: {type(error).__name__}: {first_line(error)}")
            continue
        finally:
            other.close()
            gc.collect()
        ratios[key] = row
        rows.append(row)
        put_row(bench, "transformers_uncached" if key == "transformers" else key, row)
    put_best_eager(bench, ratios)


def choose(bench: Bench) -> list[str]:
    """Keys of the alternatives, what takes long to make last; --quick has no time for those unless they are named."""
    if bench.only:
        return [key for key in BASELINES if key in bench.only]
    if bench.quick:
        bench.report.note(f"left out by --quick, they take long to make: {', '.join(SLOW)}; --only KEY runs one")
        return [key for key in BASELINES if key not in SLOW]
    return sorted(BASELINES, key=lambda key: key in SLOW)


def put_row(bench: Bench, key: str, row: Row) -> None:
    for name, timing, ratio in (("cold", row.cold, row.cold_ratio), ("warm", row.warm, row.warm_ratio)):
        if timing is not None and ratio is not None:
            bench.report.put(f"{key}_{name}_ms", timing.p50 * 1e3)
            bench.report.put(f"{key}_{name}_runs", timing.count)
            bench.report.put(f"vs_{key}" + "_warm" * (name == "warm"), ratio)


def put_best_eager(bench: Bench, rows: dict[str, Row]) -> None:
    """`vs_transformers`: the fastest of the uncompiled ways to run the same rows in transformers."""
    eager = [row for key, row in rows.items() if key in EAGER]
    for name in ("cold", "warm"):
        ratios = [ratio for row in eager if (ratio := getattr(row, f"{name}_ratio")) is not None]
        if ratios:
            bench.report.put("vs_transformers" + "_warm" * (name == "warm"), min(ratios))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
