"""What planning costs: `pytest bench/bench_block_manager.py`.

The promises: at most 20 us to plan 64 warm users with 30-item histories and one new item each, and at least 5 million
block operations a second in the native pool.
"""

from typing import Any

import numpy as np
import pytest
from native import MissingTool, build, run
from plan_batch import HISTORY, Batch


def measure_plan(benchmark: Any, batch: Batch) -> None:
    """Each round plans the same append: releasing the step leaves the sessions as they were."""
    arguments = batch.arguments(batch.users, HISTORY + 1)
    steps: list[int] = []

    def plan() -> None:
        steps.append(batch.manager.plan(*arguments)[0])

    def release() -> None:
        while steps:
            batch.manager.release(steps.pop())

    benchmark.pedantic(plan, setup=release, rounds=2000, warmup_rounds=50)
    release()
    assert batch.out[0].tolist() == [HISTORY] * len(batch.users)


@pytest.mark.parametrize("num_users", [1, 8, 64, 256])
def test_plan(benchmark: Any, num_users: int) -> None:
    measure_plan(benchmark, Batch(num_users))
    if num_users == 64:
        assert benchmark.stats["median"] < 20e-6


def test_plan_among_many_sessions(benchmark: Any) -> None:
    """64 warm users in a table of 50,000 other sessions."""
    measure_plan(benchmark, Batch(64, num_cold_sessions=50_000))


@pytest.mark.parametrize("num_users", [1, 64])
def test_peek(benchmark: Any, num_users: int) -> None:
    batch = Batch(num_users)
    arguments = batch.arguments(batch.users, HISTORY + 1)[:4]
    benchmark.pedantic(batch.manager.peek, args=arguments, rounds=2000, warmup_rounds=50)
    assert batch.out[0].tolist() == [HISTORY] * num_users


@pytest.mark.parametrize("num_users", [1, 64])
def test_commit(benchmark: Any, num_users: int) -> None:
    """Each round commits an append or, every other time, the cut that undoes it."""
    batch = Batch(num_users)
    arguments = [batch.arguments(batch.users, HISTORY + extra) for extra in (1, 0)]

    def plan() -> tuple[tuple[int, np.ndarray], dict[str, Any]]:
        arguments.reverse()
        return (batch.manager.plan(*arguments[1])[0], batch.offloads), {}

    benchmark.pedantic(batch.manager.commit, setup=plan, rounds=2000)


def test_swap_with_the_host_tier(benchmark: Any) -> None:
    """Each round plans, commits and finishes a step of 64 users of the host tier, in whose place 64 others go there."""
    batch = Batch(64, num_host_blocks=2 * 64)
    others = [f"other-{i}" for i in range(64)]
    offloads = np.empty((2 * 64, 2), np.int32)
    arguments = [batch.arguments(users, HISTORY) for users in (others, batch.users)]

    def swap() -> None:
        arguments.reverse()
        step = batch.manager.plan(*arguments[1])[0]
        assert batch.manager.commit(step, offloads) == len(offloads)
        batch.manager.finish(step, True)

    benchmark.pedantic(swap, rounds=2000)
    assert batch.out[0].tolist() == [HISTORY] * 64


def test_block_pool(capsys: pytest.CaptureFixture[str]) -> None:
    """The native pool alone, in a C++ loop."""
    try:
        rate = float(run(build("block_pool", "-O3")))
    except MissingTool as error:
        pytest.skip(str(error))
    with capsys.disabled():
        print(f"\nblock pool: {rate / 1e6:.0f} million allocate and free operations a second")
    assert rate > 5e6
