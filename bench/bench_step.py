"""What a step costs beside its pass over tensors: `pytest bench/bench_step.py`. Tiny, so that the host shows."""

from collections.abc import Iterator
from typing import Any

import pytest
from ours import Ours
from subject import Subject
from workload import BenchUser, make_users

from speeder_engine import Request

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
    """Sessions that are complete: no row is computed; planning, the search of the catalogue and answers remain."""
    asked = [Request(ours.subject.item_ids(user.history), user_id=user.user_id) for user in users[:size]]
    ours.engine.recommend_many(asked)
    benchmark.pedantic(ours.engine.recommend_many, args=(asked,), rounds=50, warmup_rounds=2)
    assert ours.rows(lambda: ours.engine.recommend_many(asked)) == 0


@pytest.mark.parametrize("size", BATCHES)
def test_returning(benchmark: Any, ours: Ours, users: list[BenchUser], size: int) -> None:
    """One new item and 20 candidates each; `pass_us`: of the round's time, what the passes over tensors take."""
    asked = [ours.warm_request(user) for user in users[:size]]
    known = [Request(ours.subject.item_ids(user.history), user_id=user.user_id) for user in users[:size]]
    rounds = 30
    with ours.watched():
        ours.pass_seconds = 0.0

        def before() -> None:
            spent = ours.pass_seconds
            ours.engine.recommend_many(known)
            ours.pass_seconds = spent

        benchmark.pedantic(ours.engine.recommend_many, args=(asked,), setup=before, rounds=rounds)
    assert ours.pass_seconds > 0
    benchmark.extra_info["pass_us"] = ours.pass_seconds / rounds * 1e6
