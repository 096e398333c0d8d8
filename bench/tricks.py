"""What each trick is worth: one switched off at a time, in turn with all of them on, on the CPU.

python bench/tricks.py --shape 0.5b
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import ctypes
from dataclasses import dataclass, replace

import torch
import typer
from measure import Clock, Timed, Timing, interleave
from ours import Ours
from report import Report
from subject import Subject
from torch import Tensor
from workload import BenchUser, Workload, make_users

from speeder_engine.native.decoder import NativeDecoder

NUM_USERS, BATCH = 8, 16
PR_SET_THP_DISABLE = 41


@dataclass(frozen=True)
class Trick:
    """`off` does without it what `on` does with it; `other` is an engine made for it."""

    name: str
    on: Timed
    off: Timed
    other: Ours | None = None


def main(
    shape: Annotated[str, typer.Option(help="random weights: tiny, 0.5b, 1.5b or 7b")] = "0.5b",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="of each pair")] = 15,
    seconds: Annotated[float, typer.Option(help="for all of it")] = 300.0,
) -> None:
    """A table, and one line of JSON last: how many times longer a request takes without each trick."""
    subject = Subject.random(shape, num_items=10_000, dtype=dtype, device="cpu")
    users = make_users(BATCH, subject.num_items, subject.workload, 0)
    report = Report()
    rows, clock, ours = [], Clock.of(seconds), Ours(subject)
    for done, make in enumerate(TRICKS):
        trick = make(ours, users)
        share = Clock.of(clock.left / (len(TRICKS) - done))
        timings = interleave({"on": trick.on, "off": trick.off}, rounds, share)
        if trick.other is not None:
            trick.other.close()
        rows.append(row(trick.name, timings["on"], timings["off"]))
        report.put(f"without_{make.__name__}", timings["off"].over(timings["on"]))
    report.put("shape", shape)
    report.table(
        f"{shape}, {dtype}, cpu: without a trick", ("", "with it, ms", "without, ms", "runs", "times longer"), rows
    )
    report.show()


def row(name: str, on: Timing, off: Timing) -> list[object]:
    return [name, on.p50 * 1e3, off.p50 * 1e3, off.count, off.over(on)]


def warm(ours: Ours, users: list[BenchUser]) -> Timed:
    """A returning user: one new item and the candidates."""
    return Timed(lambda at: ours.answer_warm(of(users, at)), lambda at: ours.warm_up(of(users, at)))


def cold(ours: Ours, users: list[BenchUser]) -> Timed:
    return Timed(lambda at: ours.answer(of(users, at)))


def of(users: list[BenchUser], at: int) -> BenchUser:
    return users[at % NUM_USERS]


def sessions(ours: Ours, users: list[BenchUser]) -> Trick:
    return Trick("a returning user's keys are kept: 21 rows, not 51", warm(ours, users), cold(ours, grown(users)))


def grown(users: list[BenchUser]) -> list[BenchUser]:
    return [replace(user, history=user.grown) for user in users]


def one_pass(ours: Ours, users: list[BenchUser]) -> Trick:
    """Each candidate by itself, though behind a session that is warm."""

    def alone(at: int) -> None:
        request = ours.warm_request(of(users, at))
        for item_id in request.candidates or ():
            ours.engine.recommend_many([replace(request, candidates=[item_id])])

    off = Timed(alone, lambda at: ours.warm_up(of(users, at)))
    return Trick("20 candidates in one pass, not one each", warm(ours, users), off)


def native_kernels(ours: Ours, users: list[BenchUser]) -> Trick:
    """Torch's pad and attend in fp64, to be exact: what transformers takes is a contender of run.py's."""
    plain = Ours(ours.subject, cpu_path="torch")
    return Trick("native passes, not torch's exact ones", warm(ours, users), warm(plain, users), plain)


def all_threads(ours: Ours, users: list[BenchUser]) -> Trick:
    before = torch.get_num_threads()

    def single(at: int) -> None:
        torch.set_num_threads(1)
        try:
            ours.answer_warm(of(users, at))
        finally:
            torch.set_num_threads(before)

    off = Timed(single, lambda at: ours.warm_up(of(users, at)))
    return Trick(f"{before} threads, not one", warm(ours, users), off)


def last_layer(ours: Ours, users: list[BenchUser]) -> Trick:
    """Matters where history is computed that nobody reads."""
    forward = NativeDecoder.forward

    def whole(self: NativeDecoder, embedded: Tensor, rows: Any, cache: Any) -> Tensor:
        every = replace(rows, read_rows=torch.arange(embedded.shape[0]))
        return forward(self, embedded, every, cache)[rows.read_rows]

    def unreduced(at: int) -> None:
        NativeDecoder.forward = whole  # type: ignore[method-assign]
        try:
            ours.answer(of(users, at))
        finally:
            NativeDecoder.forward = forward  # type: ignore[method-assign]

    return Trick("the last layer computes what is read (cold)", cold(ours, users), Timed(unreduced))


def batching(ours: Ours, users: list[BenchUser]) -> Trick:
    requests = [ours.warm_request(user) for user in users]

    def before(_: int) -> None:
        for user in users:
            ours.warm_up(user)

    together = Timed(lambda _: ours.engine.recommend_many(requests), before)
    singly = Timed(lambda _: [ours.engine.recommend_many([request]) for request in requests], before)
    return Trick(f"{BATCH} returning users in one step, not one by one", together, singly)


def int8_weights(ours: Ours, users: list[BenchUser]) -> Trick:
    small = Ours(ours.subject, weights="int8")
    return Trick("int8 weights (off unless asked for), not the dtype's", warm(small, users), warm(ours, users), small)


def huge_pages(ours: Ours, users: list[BenchUser]) -> Trick:
    with no_huge_pages():
        scattered = Ours(ours.subject)
    return Trick("weights in huge pages", warm(ours, users), warm(scattered, users), scattered)


@contextmanager
def no_huge_pages() -> Iterator[None]:
    """What is mapped inside gets small pages, as long as it is first written inside."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def shared_instruction(ours: Ours, users: list[BenchUser]) -> Trick:
    """Without it the instruction's rows stand in every prompt, as so many more items of the history do."""
    subject = ours.subject
    standard, dtype = subject.workload, str(subject.dtype).removeprefix("torch.")
    longer = Workload(
        instruction_len=1,
        history_len=standard.instruction_len - 1 + standard.history_len,
        window=standard.window + standard.instruction_len,
    )
    whole = Ours(Subject.random(subject.config.decoder, num_items=10_000, dtype=dtype, device="cpu", workload=longer))
    unshared = make_users(BATCH, whole.subject.num_items, longer, 0)
    return Trick("the instruction is computed once (cold)", cold(ours, users), cold(whole, unshared), whole)


TRICKS: tuple[Callable[[Ours, list[BenchUser]], Trick], ...] = (
    sessions,
    shared_instruction,
    one_pass,
    native_kernels,
    int8_weights,
    huge_pages,
    all_threads,
    last_layer,
    batching,
)

if __name__ == "__main__":
    typer.run(main)
