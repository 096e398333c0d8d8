"""Timing, the same for every benchmark: medians, device events where there is a device, ceilings of the chip itself."""

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
CPU = torch.device("cpu")
REPEATS = 20  # calls of a kernel in one graph, at least
MOST_COPIES = 64  # the smallest weights, those of 0.5B's queries, keys and values, take 50 to 61
WARM_SECONDS = 0.05
NEVER = 1e6  # seconds: a clock that never ends, as a timer takes it


class OutOfTime(Exception):
    """A section's time is up; what it has measured stands."""


class _Alarm(BaseException):
    """No Exception: a library that goes another way where one fails would go on."""


@dataclass
class Clock:
    """How much of a benchmark's time is left."""

    seconds: float
    started: float

    @classmethod
    def of(cls, seconds: float) -> "Clock":
        return cls(seconds, time.monotonic())

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def check(self) -> None:
        if self.left <= 0:
            raise OutOfTime

    @contextmanager
    def limited(self, seconds: float) -> Iterator["Clock"]:
        """A part of it, no longer than what is left."""
        yield Clock.of(min(seconds, self.left))

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Whatever Python runs inside when the time is up ends in OutOfTime; a native call is finished before. In the
        main thread alone, as signals are."""

        def stop(*_: object) -> None:
            raise _Alarm

        before = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, min(max(self.left, 1e-3), NEVER))
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Alarm:
            raise OutOfTime from None
        finally:
            signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def num_copies(num_bytes: float, l2_bytes: int) -> int:
    """Of what a call reads, so that one after the other they are twice what the L2 cache holds: a pass finds no weight
    there. One where that would take more than MOST_COPIES: what is so small are rows, which the kernel before has left
    in the cache in a pass too."""
    copies = max(math.ceil(2 * l2_bytes / num_bytes), 1)
    return copies if copies <= MOST_COPIES else 1


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def device_seconds(calls: Sequence[Call], device: torch.device, repeats: int = REPEATS, rounds: int = 7) -> float:
    """Median seconds of one of the calls, which are alike, on the device, launches left out: in turns in a CUDA graph,
    whose replays are timed by events. On a CPU, the clock."""
    if device.type != "cuda":
        return statistics.median(clocked(calls[0]) for _ in range(3))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in (*calls, calls[0], calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, turns = torch.cuda.CUDAGraph(), -(-repeats // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    return replay_seconds(graph.replay, rounds) / (turns * len(calls))


def replay_seconds(replay: Call, rounds: int = 20) -> float:
    """Median seconds between two events around one call that launches work. Behind WARM_SECONDS of the same, so that
    clocks have risen; each round behind another call, so that the device does not wait for the launch."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARM_SECONDS:
        replay()
        torch.cuda.synchronize()
    timed = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        before.record()
        replay()
        after.record()
        after.synchronize()
        timed.append(float(before.elapsed_time(after)) / 1e3)
    return statistics.median(timed)


def clocked(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def wall_seconds(calls: Sequence[Call], clock: Clock) -> list[float]:
    """Of each call, from before it to its answer; as many as the clock allows. Without garbage collection."""
    with quiet():
        return unquiet_seconds(calls, clock)


def unquiet_seconds(calls: Sequence[Call], clock: Clock) -> list[float]:
    """The same of calls that only come before those that count: nothing is collected for them."""
    found = []
    for call in calls:
        found.append(clocked(call))
        if clock.left <= 0:
            break
    return found


@dataclass(frozen=True)
class Timed:
    """Something to time: `call` is given the number of the round, as is `before`, which is not timed. `every`: in each
    so many rounds; more than one for what takes seconds."""

    call: Callable[[int], object]
    before: Callable[[int], object] | None = None
    every: int = 1


ROW_US = ("p50 us", "p95", "p99", "runs")
LEAST = {50: 1, 95: 20, 99: 100}  # percentile -> the fewest rounds that have a word on it


@dataclass(frozen=True)
class Timing:
    """Seconds by round."""

    seconds: dict[int, float] = field(default_factory=dict)

    def quantile(self, percent: int) -> float | None:
        """Seconds that this many percent of the rounds did not exceed; None of too few."""
        if self.count < LEAST[percent]:
            return None
        ordered = sorted(self.seconds.values())
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds.values())

    @property
    def tails(self) -> tuple[float | None, float | None]:
        """p95 and p99."""
        return self.quantile(95), self.quantile(99)

    def cells(self, unit: float) -> list[float | None]:
        """p50, p95 and p99 in units of which a second has so many, and of how many."""
        tails = (None if tail is None else tail * unit for tail in self.tails)
        return [self.p50 * unit, *tails, self.count]

    @property
    def milliseconds(self) -> dict[str, float]:
        """By "p50", "p95" and "p99"; those that so many rounds have no word on are left out, of no round all."""
        if not self.count:
            return {}
        found = zip(("p50", "p95", "p99"), self.cells(1e3), strict=False)
        return {name: value for name, value in found if value is not None}

    @property
    def count(self) -> int:
        return len(self.seconds)

    def over(self, other: "Timing") -> float:
        """Median of this one's seconds over the other's, round by round; nan without a common round."""
        return median_of(self.seconds[at] / other.seconds[at] for at in self.seconds if at in other.seconds)


def median_of(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def interleave(
    calls: Mapping[str, Timed],
    rounds: int,
    clock: Clock,
    device: torch.device = CPU,
    warm_ups: int = 2,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Times each call once a round, A B C, B C A, C A B and so on, after warm-ups that have negative round numbers.

    What is not timed in every round is warmed up once. Rounds end when `rounds` are done or the clock's time is up;
    the first round is finished whatever the clock says. On a device a call ends when its work does. `pause`: seconds
    before each call and what is done before it.
    """
    timings = {name: Timing() for name in calls}
    names = list(calls)
    with quiet():
        for at in range(-warm_ups, rounds):
            shift = at % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                timed = calls[name]
                if at % timed.every and at != -1:
                    continue
                if pause:
                    time.sleep(pause)
                if timed.before is not None:
                    timed.before(at)
                synchronize(device)
                started = time.perf_counter()
                timed.call(at)
                synchronize(device)
                if at >= 0:
                    timings[name].seconds[at] = time.perf_counter() - started
            if at >= 0 and clock.left <= 0:
                break
    return timings


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside, and none of what stands now for as long; what was frozen before stays so."""
    gc.collect()
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if freezes:
            gc.unfreeze()


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, and of how many; those that so many have no word on are left out."""
    timing = Timing(dict(enumerate(seconds)))
    return {f"{name}_ms": value for name, value in timing.milliseconds.items()} | {"count": timing.count}


@dataclass(frozen=True)
class Ceilings:
    """What the chip does at best, as measured: a large copy, a large bf16 product."""

    copy_bytes: float  # a second, read and written counted
    matmul_flops: float  # a second

    def fraction(self, num_bytes: float, flops: float, seconds: float) -> float:
        """Of the larger of the two times that this much work takes at the ceilings."""
        return max(num_bytes / self.copy_bytes, flops / self.matmul_flops) / seconds


def measure_ceilings(device: torch.device, small: bool) -> Ceilings:
    size, side = (1 << 22, 256) if small else (1 << 30, 8192)
    return Ceilings(2 * size / _copying(size, device), 2 * side**3 / _multiplying(side, device))


def _copying(size: int, device: torch.device) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return device_seconds([lambda: target.copy_(source)], device, repeats=2)


def _multiplying(side: int, device: torch.device) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a smoke test's: few CPUs multiply bf16
    # random data: zeros run faster than anything real
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    return device_seconds([lambda: torch.mm(left, right, out=product)], device, repeats=2)


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels and copies that one call puts on the device, by torch's profiler; None on a CPU. It slows down whatever
    this process launches afterwards."""
    if device.type != "cuda":
        call()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize(device)
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    on_device = [event for event in found.events() if event.device_type == cuda]
    return len(on_device)
