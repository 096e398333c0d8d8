"""The native cache manager alone: planning, and the pool of blocks in a C++ loop."""

import native
import numpy as np
from context import Bench
from measure import ROW_US, Clock, Timed, interleave
from plan_batch import HISTORY, Batch

USERS = (1, 8, 64, 256)
OTHERS = 50_000  # sessions beside the batch's


def measure(bench: Bench, clock: Clock) -> None:
    cases = {str(users): Batch(users) for users in USERS}
    if not bench.quick:
        cases["64_of_50000"] = Batch(64, num_cold_sessions=OTHERS)
    timed = {name: planning(batch) for name, batch in cases.items()}
    timings = interleave(timed, bench.rounds(300, 2000), Clock.of(clock.left / 2), warm_ups=20)
    for name, timing in timings.items():
        bench.report.put(f"plan_us_{name}", timing.p50 * 1e6)
    rows = [[name.replace("_of_", " users of "), *timing.cells(1e6)] for name, timing in timings.items()]
    title = f"planning one new item for warm users with {HISTORY} items, one native call"
    bench.report.table(title, ("users", *ROW_US), rows)
    block_pool(bench)


def planning(batch: Batch) -> Timed:
    """Each round plans the same append: releasing the step leaves the sessions as they were."""
    arguments = batch.arguments(batch.users, HISTORY + 1)
    steps: list[int] = []

    def release(_: int) -> None:
        while steps:
            batch.manager.release(steps.pop())

    def plan(_: int) -> None:
        steps.append(batch.manager.plan(*arguments)[0])

    return Timed(plan, release)


def block_pool(bench: Bench) -> None:
    """Allocating and freeing blocks: operations a second."""
    try:
        program = native.build("block_pool", "-O3")
    except native.MissingTool as error:
        bench.report.note(f"block_ops_per_s: {error}")
        return
    rates = [float(native.run(program)) for _ in range(bench.rounds(1, 3))]
    rate = float(np.median(rates))
    bench.report.put("block_ops_per_s", rate)
    bench.report.table("pool of 100,000 blocks", ("", "million operations/s"), [["allocate, free", rate / 1e6]])
