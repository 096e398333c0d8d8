"""What a step costs beside its pass over tensors: `pytest bench/bench_step.py`. Tiny, so that the host shows."""

from collections.abc import Iterator
from typing import Any

import pytest
from ours import Ours
from subject import Subject
from workload import BenchUser, make_users

BATCHES = (1, 8, 64)


@pytest.fixture(scope="module")
def ours() -> Iterator[Ours]:
    made = Ours(Subject.random("tiny", num_items=1000, dtype="float32", device="cpu"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def users(ours: Ours) -> list[BenchUser]:
    return make_users(max(BATCHES), ours.subject.num_items, ours.subject.workload, seed=0)


def test_request(benchmark: Any, ours: Ours, users: list[BenchUser]) -> None:
    """Making and checking one."""
    benchmark(ours.warm_request, users[0])


@pytest.mark.parametrize("size", BATCHES)
def test_same_again(benchmark: Any, ours: Ours, users: list[BenchUser], size: int) -> None:
    """Requests whose sessions are complete: no row is computed, what remains are plan, heads and answers."""
    asked = [ours.request(user, user.history, user.user_id) for user in users[:size]]
    histories = [ours.subject.item_ids(user.history) for user in users[:size]]
    for user, history in zip(users, histories, strict=False):
        ours.engine.warm(user.user_id, history)
    assert len(ours.engine.recommend_many(asked)) == size
    vectors = benchmark.pedantic(
        lambda: [ours.engine.warm(user.user_id, each) for user, each in zip(users, histories, strict=False)], rounds=50
    )
    assert vectors == [0] * size


@pytest.mark.parametrize("size", BATCHES)
def test_returning(benchmark: Any, ours: Ours, users: list[BenchUser], size: int) -> None:
    """One new item and 20 candidates each; `host_us`: microseconds a request outside the pass."""
    taken = users[:size]
    asked = [ours.warm_request(user) for user in taken]

    def before() -> None:
        for user in taken:
            ours.warm_up(user)

    with ours.watched():
        ours.pass_seconds = 0.0
        benchmark.pedantic(ours.engine.recommend_many, args=(asked,), setup=before, rounds=30, warmup_rounds=0)
        passes = ours.pass_seconds
    benchmark.extra_info["pass_seconds_a_round"] = passes / 30
    assert passes > 0
