"""What this machine does at best, measured: memory read and copied, matrices multiplied, with all threads."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import Clock, Timed, Timing, clocked, interleave, median_of
from torch import Tensor

from speeder_engine.native.support import advise_huge, read_memory

SMALL_SIDE, MOST_SECONDS = 256, 0.5  # of a product that is tried first, and of one that is kept


@dataclass(frozen=True)
class Work:
    """What a computation can't do without."""

    num_bytes: float  # read once
    flops: float


@dataclass(frozen=True)
class Probe:
    """A call that does nothing but one thing, and how much of it: bytes or operations."""

    call: Callable[[], object]
    amount: float

    @property
    def timed(self) -> Timed:
        return Timed(lambda _: self.call())

    def repeated(self, times: int) -> "Probe":
        """The same for longer: to be held against what takes seconds."""

        def calls() -> None:
            for _ in range(times):
                self.call()

        return Probe(calls, times * self.amount)


class Limits:
    """Probes by name ("copy", "read", "matmul_bfloat16", ...) and the best rates seen so far, a second."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device = device
        self.best: dict[str, float] = {}
        self.probes = make_probes(device, small)

    def measure(self, rounds: int, clock: Clock) -> None:
        """All probes in turn; what was better before stays."""
        timed = {name: probe.timed for name, probe in self.probes.items()}
        for name, timing in interleave(timed, rounds, clock, self.device).items():
            self.see(name, timing)

    def see(self, name: str, timing: Timing) -> None:
        """Timings of a probe that ran among other calls."""
        rate = self.probes[name].amount / min(timing.seconds.values())
        self.best[name] = max(rate, self.best.get(name, 0.0))

    def matmul(self, dtype: str) -> str:
        """The probe that bounds products in this dtype. Where the device doesn't multiply it, and torch emulates it
        slowly, numbers can be widened on their way: fp32's."""
        own, wide = f"matmul_{dtype}", "matmul_float32"
        return wide if self.best.get(wide, 0.0) > self.best.get(own, 0.0) else own

    def pair(self, dtype: str) -> dict[str, Timed]:
        """The two probes that bound a computation in this dtype, to be timed in turn with it."""
        return {name: self.probes[name].timed for name in ("read", self.matmul(dtype))}

    def over_limit(self, timing: Timing, probes: dict[str, Timing], work: Work) -> float:
        """How many times the physical limit a call took: the longer of reading its bytes and multiplying, each at the
        rate that its probe had in the same round; the median over the rounds."""
        multiplied = next(name for name in probes if name.startswith("matmul"))  # of `pair`
        read, matmul = (self._seconds_each(name, probes[name]) for name in ("read", multiplied))
        return median_of(
            seconds / max(work.num_bytes * read[at], work.flops * matmul[at])
            for at, seconds in timing.seconds.items()
            if at in read and at in matmul
        )

    def _seconds_each(self, name: str, timing: Timing) -> dict[int, float]:
        self.see(name, timing)
        return {at: seconds / self.probes[name].amount for at, seconds in timing.seconds.items()}


def make_probes(device: torch.device, small: bool) -> dict[str, Probe]:
    """Buffers far larger than caches, unless `small`; products large enough to be bound by arithmetic."""
    if device.type == "cuda":
        size, side = (1 << 26, 1024) if small else (1 << 30, 8192)
    else:
        size, side = (1 << 26, 768) if small else (1 << 28, 2048)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    probes = {
        "copy": Probe(lambda: target.copy_(source), 2 * size),
        "read": Probe(reading(source), size),
        "matmul_bfloat16": multiplying(side, torch.bfloat16, device),
        "matmul_float32": multiplying(side if device.type == "cpu" else side // 2, torch.float32, device),
    }
    if device.type == "cuda":
        probes["matmul_float16"] = multiplying(side, torch.float16, device)
    try:
        return {**probes, "matmul_int8": multiplying_int8(side, device)}
    except RuntimeError:  # a device without 8-bit products has no such ceiling
        return probes


def reading(source: Tensor) -> Callable[[], object]:
    """Every byte once. On a CPU by a loop that does nothing else: torch's sum is slower than memory."""
    if source.device.type == "cpu":
        advise_huge(source)
        return lambda: read_memory(source)
    words = source.view(torch.int32).view(torch.float32) if source.element_size() == 2 else source
    return lambda: words.sum()


def multiplying(side: int, dtype: torch.dtype, device: torch.device) -> Probe:
    def made(side: int) -> Probe:
        # random data: zeros run faster than anything real
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product: Tensor = torch.empty_like(left)
        return Probe(lambda: torch.mm(left, right, out=product), 2 * side**3)

    return bearable(made, side, device)


def multiplying_int8(side: int, device: torch.device) -> Probe:
    """RuntimeError where torch has no such product on the device."""

    def made(side: int) -> Probe:
        left, right = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
        return Probe(lambda: torch._int_mm(left, right.T), 2 * side**3)

    return bearable(made, side, device)


def bearable(made: Callable[[int], Probe], side: int, device: torch.device) -> Probe:
    """A product of matrices of this side, or of smaller ones where a CPU emulates it: a hundred times slower, a probe
    would take minutes."""
    small = made(SMALL_SIDE)
    small.call()  # of a kind that the device doesn't have, this raises
    if device.type != "cpu":
        return made(side)
    seconds = min(clocked(small.call) for _ in range(2))
    while side > SMALL_SIDE and seconds * (side / SMALL_SIDE) ** 3 > MOST_SECONDS:
        side //= 2
    return made(side)
