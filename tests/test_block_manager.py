"""Each rule of the native block manager, one by one. The rules in combination: test_block_manager_machine.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from speeder_engine import _C

BLOCK = 4
WINDOW = 16


def made(budget_blocks: int = 40, **settings: Any) -> _C.BlockManager:
    """2 shared blocks, `budget_blocks` for sessions and 20 for open steps."""
    defaults: dict[str, Any] = {"block_size": BLOCK, "shared_len": 6, "max_seq_len": WINDOW, "key_width": 2}
    defaults |= {"num_blocks": 22 + budget_blocks, "budget_blocks": budget_blocks, "num_slots": 24}
    return _C.BlockManager(**{**defaults, **settings})


def history(*items: int, version: int = 0) -> list[tuple[int, int]]:
    return [(item, version) for item in items]


@dataclass
class Planned:
    step: int
    cached_len: list[int]
    slots: list[int]
    tables: list[list[int]]
    rows: list[int]
    copies: list[list[int]]
    restores: list[list[int]]
    offloads: list[list[int]] = field(default_factory=list)


def arguments(users: Sequence[str | None], histories: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
    lengths = [len(each) for each in histories]
    rows = [key for each in histories for key in each]
    return {
        "users": list(users),
        "offsets": np.cumsum([0, *lengths], dtype=np.int32),
        "keys": np.array(rows, dtype=np.int32).reshape(-1, 2),
        "cached_len": np.full(len(users), -7, np.int32),
        "session_slots": np.full(len(users), -7, np.int32),
        "block_tables": np.full((len(users), WINDOW // BLOCK), -7, np.int32),
        "slot_mapping": np.full(sum(lengths), -7, np.int32),
        "copies": np.full((len(users), 3), -7, np.int32),
        "restores": np.full((len(users) * (WINDOW // BLOCK), 2), -7, np.int32),
    }


def plan(manager: _C.BlockManager, **histories: Sequence[tuple[int, int]]) -> Planned:
    """Plans one step; the keyword `anonymous` stands for None."""
    users = [None if user == "anonymous" else user for user in histories]
    return plan_batch(manager, users, list(histories.values()))


def plan_batch(
    manager: _C.BlockManager, users: Sequence[str | None], histories: Sequence[Sequence[tuple[int, int]]]
) -> Planned:
    out = arguments(users, histories)
    step, num_rows, num_copies, num_restores = manager.plan(**out)
    manager.check_integrity()
    tables = [[block for block in row if block != -1] for row in out["block_tables"].tolist()]
    return Planned(
        step,
        out["cached_len"].tolist(),
        out["session_slots"].tolist(),
        tables,
        out["slot_mapping"][:num_rows].tolist(),
        out["copies"][:num_copies].tolist(),
        out["restores"][:num_restores].tolist(),
    )


def commit(manager: _C.BlockManager, step: int, max_offloads: int = 64) -> list[list[int]]:
    offloads = np.full((max_offloads, 2), -7, np.int32)
    num_offloads = manager.commit(step, offloads)
    manager.check_integrity()
    assert (offloads[num_offloads:] == -7).all()
    return offloads[:num_offloads].tolist()


def run(manager: _C.BlockManager, **histories: Sequence[tuple[int, int]]) -> Planned:
    """Plans and commits one step; its offloads succeed."""
    planned = plan(manager, **histories)
    planned.offloads = commit(manager, planned.step)
    if planned.offloads:
        manager.finish(planned.step, True)
        manager.check_integrity()
    return planned


def alive(manager: _C.BlockManager, *users: str) -> list[str]:
    return [user for user in users if user in manager]


def steps_aside(stats: dict[str, int]) -> dict[str, int]:
    """What a released step must leave as it was."""
    counted = {"steps_planned", "steps_released", "positions_planned"}
    return {name: value for name, value in stats.items() if name not in counted}


def test_shared_blocks_are_held_and_never_handed_out() -> None:
    manager = made()
    assert manager.num_shared_blocks == 2
    assert manager.max_blocks_per_seq == WINDOW // BLOCK
    planned = run(manager, ann=history(1, 2, 3, 4, 5))
    assert set(planned.tables[0]).isdisjoint({0, 1})
    manager.clear()
    assert manager.stats()["num_free_blocks"] == 60


def test_new_history_starts_in_a_block_of_its_own() -> None:
    planned = plan(made(), ann=history(1, 2, 3, 4, 5), bob=history(1, 2))
    (a, b), (c,) = planned.tables
    assert len({a, b, c}) == 3
    assert planned.cached_len == [0, 0]
    assert planned.rows == [a * BLOCK, a * BLOCK + 1, a * BLOCK + 2, a * BLOCK + 3, b * BLOCK, c * BLOCK, c * BLOCK + 1]
    assert planned.copies == []


def test_same_history_again_costs_no_row_and_keeps_its_slot() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4, 5))
    again = run(manager, ann=history(1, 2, 3, 4, 5))
    assert (again.cached_len, again.rows, again.copies) == ([5], [], [])
    assert (again.slots, again.tables) == (first.slots, first.tables)


def test_append_goes_on_in_the_last_block() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3))
    more = run(manager, ann=history(1, 2, 3, 4, 5))
    assert more.cached_len == [3]
    assert more.copies == []
    assert more.tables[0][0] == first.tables[0][0]
    assert more.rows == [more.tables[0][0] * BLOCK + 3, more.tables[0][1] * BLOCK]


def test_append_behind_a_full_block() -> None:
    manager = made()
    run(manager, ann=history(1, 2, 3, 4))
    more = run(manager, ann=history(1, 2, 3, 4, 5))
    assert (more.cached_len, more.copies, more.rows) == ([4], [], [more.tables[0][1] * BLOCK])


def test_proper_prefix_computes_its_last_row_in_a_copy() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4, 5, 6, 7))
    cut = run(manager, ann=history(1, 2, 3, 4, 5, 6))
    assert cut.cached_len == [5]
    assert cut.tables[0][0] == first.tables[0][0]
    assert cut.copies == [[first.tables[0][1], cut.tables[0][1], 1]]
    assert cut.rows == [cut.tables[0][1] * BLOCK + 1]
    # what was cut off is forgotten
    assert run(manager, ann=history(1, 2, 3, 4, 5, 6, 7)).cached_len == [6]


def test_corrected_past_copies_on_write() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4, 5, 6, 7))
    corrected = plan(manager, ann=history(1, 2, 3, 4, 5, 9, 7))
    (old_full, old_part), (new_full, new_part) = first.tables[0], corrected.tables[0]
    assert corrected.cached_len == [5]
    assert new_full == old_full
    assert new_part != old_part
    assert corrected.copies == [[old_part, new_part, 1]]
    assert corrected.rows == [new_part * BLOCK + 1, new_part * BLOCK + 2]


def test_divergence_at_a_block_border_copies_nothing() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4, 5, 6))
    corrected = run(manager, ann=history(1, 2, 3, 4, 9, 6))
    assert (corrected.cached_len, corrected.copies) == ([4], [])
    assert corrected.tables[0][1] != first.tables[0][1]


@pytest.mark.parametrize("column", [0, 1])
def test_every_column_of_the_key_counts(column: int) -> None:
    manager = made()
    run(manager, ann=history(1, 2, 3))
    changed = history(1, 2, 3)
    changed[1] = (2, 1) if column else (7, 0)
    assert run(manager, ann=changed).cached_len == [1]


def test_other_users_history_is_never_reused() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4))
    other = run(manager, bob=history(1, 2, 3, 4))
    assert other.cached_len == [0]
    assert set(other.tables[0]).isdisjoint(first.tables[0])
    assert other.slots != first.slots


def test_anonymous_leaves_nothing_behind() -> None:
    manager = made()
    before = manager.stats()["num_free_blocks"]
    planned = plan(manager, anonymous=history(1, 2, 3, 4, 5))
    assert planned.slots == [-1]
    assert manager.stats()["num_free_blocks"] == before - 2
    commit(manager, planned.step)
    assert (manager.stats()["num_free_blocks"], manager.num_sessions) == (before, 0)


def test_empty_history_makes_no_session_and_leaves_one_alone() -> None:
    manager = made()
    nothing = run(manager, ann=[])
    assert (nothing.cached_len, nothing.slots, nothing.tables, nothing.rows) == ([0], [-1], [[]], [])
    assert "ann" not in manager
    run(manager, ann=history(1, 2))
    run(manager, ann=[])
    assert run(manager, ann=history(1, 2)).cached_len == [2]


def test_empty_batch() -> None:
    planned = run(made())
    assert (planned.cached_len, planned.rows) == ([], [])


def test_same_user_twice_in_a_batch_is_anonymous_the_second_time() -> None:
    manager = made()
    run(manager, ann=history(1, 2))
    planned = plan_batch(manager, ["ann", "new", "ann", "new"], [history(1, 2, 3), history(5), history(8), history(6)])
    assert planned.cached_len == [2, 0, 0, 0]
    assert planned.slots[2:] == [-1, -1]
    assert min(planned.slots[:2]) >= 0
    commit(manager, planned.step)
    again = plan_batch(manager, ["ann", "new"], [history(1, 2, 3), history(5)])
    assert again.cached_len == [3, 1]


def test_user_in_another_open_step_is_anonymous() -> None:
    manager = made()
    run(manager, ann=history(1, 2))
    first = plan(manager, ann=history(1, 2, 3))
    second = plan(manager, ann=history(1, 2, 4))
    assert (second.cached_len, second.slots) == ([0], [-1])
    commit(manager, second.step)
    commit(manager, first.step)
    assert run(manager, ann=history(1, 2, 3)).cached_len == [3]


@pytest.mark.parametrize("failed", [history(1, 2, 3, 4, 5, 6), history(1, 9), history(1, 2), history(7, 7, 7, 7, 7)])
@pytest.mark.parametrize("budget_blocks", [40, 2])
def test_release_leaves_everything_as_it_was(failed: list[tuple[int, int]], budget_blocks: int) -> None:
    manager = made(budget_blocks, num_host_blocks=4)
    for user in ("cid", "bob", "ann"):
        first = run(manager, **{user: history(1, 2, 3, 4, 5)})
    before = manager.stats()
    # bob is in the host tier if the budget is small
    planned = plan(manager, ann=failed, bob=failed, new=history(*range(16)), anonymous=history(1))
    # the failed step may write its h(last) without harm
    assert planned.slots[0] != first.slots[0]
    manager.release(planned.step)
    manager.check_integrity()
    assert steps_aside(manager.stats()) == steps_aside(before)
    again = plan(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5), cid=history(1, 2, 3, 4, 5))
    assert (again.cached_len, again.tables[0], again.slots[0]) == ([5, 5, 5], first.tables[0], first.slots[0])


def test_release_of_a_first_step_leaves_no_session() -> None:
    manager = made()
    planned = plan(manager, ann=history(1, 2))
    assert ("ann" in manager, manager.num_sessions) == (False, 0)
    manager.release(planned.step)
    assert ("ann" in manager, manager.stats()["num_free_blocks"]) == (False, 60)


def test_release_of_a_committed_step_is_refused() -> None:
    manager = made(2, num_host_blocks=4)
    run(manager, ann=history(1, 2, 3, 4, 5))
    planned = plan(manager, bob=history(1))
    assert len(commit(manager, planned.step)) == 2
    for end in ("commit", "release"):
        with pytest.raises(ValueError, match=f"{end}: step 2 is already committed and waits for finish"):
            ends[end](manager, planned.step)
    manager.finish(planned.step, True)
    with pytest.raises(ValueError, match="release: step 2 is already finished"):
        manager.release(planned.step)


ends: dict[str, Callable[[_C.BlockManager, int], Any]] = {"commit": commit, "release": _C.BlockManager.release}


@pytest.mark.parametrize("end", ["commit", "release"])
def test_a_step_ends_once(end: str) -> None:
    manager = made()
    planned = plan(manager, ann=history(1))
    with pytest.raises(ValueError, match=rf"finish: step {planned.step} is not committed yet"):
        manager.finish(planned.step, True)
    ends[end](manager, planned.step)
    with pytest.raises(ValueError, match=rf"{end}: step {planned.step} is already finished"):
        ends[end](manager, planned.step)
    with pytest.raises(ValueError, match=rf"finish: step {planned.step} is already finished"):
        manager.finish(planned.step, True)
    for unknown in (0, -1, 99):
        with pytest.raises(ValueError, match=rf"{end}: step {unknown} was never planned"):
            ends[end](manager, unknown)
    manager.check_integrity()


@pytest.mark.parametrize("offloads", [np.zeros((4, 3), np.int32), np.zeros((4, 2), np.int64), np.zeros(8, np.int32)])
def test_offloads_that_do_not_fit_leave_the_step_open(offloads: Any) -> None:
    manager = made()
    planned = plan(manager, ann=history(1))
    with pytest.raises(ValueError, match=r"^offloads: must"):
        manager.commit(planned.step, offloads)
    commit(manager, planned.step)
    assert "ann" in manager


def test_plan_evicts_nothing() -> None:
    manager = made(4)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    planned = plan(manager, cid=history(*range(16)), dan=history(*range(16)))
    assert alive(manager, "ann", "bob") == ["ann", "bob"]
    manager.release(planned.step)
    assert (alive(manager, "ann", "bob"), manager.stats()["evictions"]) == (["ann", "bob"], 0)


def test_eviction_takes_the_longest_unused_first() -> None:
    manager = made(6)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    run(manager, ann=history(1, 2, 3, 4, 5))
    run(manager, dan=history(1, 2))
    assert alive(manager, "ann", "bob", "cid", "dan") == ["ann", "cid", "dan"]
    assert manager.stats()["evictions"] == 1


def test_eviction_spares_open_steps() -> None:
    manager = made(6)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    open_step = plan(manager, ann=history(1, 2, 3, 4, 5))
    run(manager, dan=history(1, 2))
    assert alive(manager, "ann", "bob", "cid") == ["ann", "cid"]
    commit(manager, open_step.step)
    assert alive(manager, "ann", "cid", "dan") == ["ann", "cid", "dan"]


@pytest.mark.parametrize("num_host_blocks", [0, 3])
@pytest.mark.parametrize("pinned", ["", "ann", "dan"])
def test_the_budget_is_never_exceeded(num_host_blocks: int, pinned: str) -> None:
    manager = made(5, num_host_blocks=num_host_blocks)
    for length in (3, 9, 5, 16, 1, 12, 20):
        for users in (["ann", "bob"], ["cid"], ["dan", "ann", "eve"]):
            run(manager, **{user: history(*range(min(length + len(user), 16))) for user in users})
            stats = manager.stats()
            assert stats["session_blocks"] <= 5
            assert stats["num_free_blocks"] == 25 - stats["session_blocks"]
            manager.pin(pinned)


def test_a_session_larger_than_the_budget_does_not_stay() -> None:
    manager = made(2)
    run(manager, ann=history(*range(12)))
    assert (manager.num_sessions, manager.stats()["num_free_blocks"]) == (0, 22)


def test_nothing_is_retained_without_a_budget() -> None:
    manager = made(0, num_host_blocks=8)
    assert run(manager, ann=history(1, 2)).slots == [-1]
    assert run(manager, ann=history(1, 2)).cached_len == [0]
    assert (manager.num_sessions, manager.stats()["num_free_blocks"]) == (0, 20)


def test_max_sessions_holds_at_commit() -> None:
    manager = made(max_sessions=2)
    for user in ("ann", "bob"):
        run(manager, **{user: history(1)})
    planned = plan(manager, cid=history(1))
    assert alive(manager, "ann", "bob") == ["ann", "bob"]
    commit(manager, planned.step)
    assert alive(manager, "ann", "bob", "cid") == ["bob", "cid"]
    run(manager, dan=history(1), eve=history(1), fay=history(1))
    assert alive(manager, "bob", "cid", "dan", "eve", "fay") == ["eve", "fay"]


def test_max_sessions_takes_from_the_host_tier_first() -> None:
    manager = made(4, max_sessions=3, num_host_blocks=8)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    run(manager, bob=history(1, 2, 3, 4, 5))
    assert manager.stats()["num_host_sessions"] == 1
    # cid is used less lately than bob, but ann is in the host tier
    run(manager, dan=history(1))
    assert alive(manager, "ann", "bob", "cid", "dan") == ["bob", "cid", "dan"]
    # no host session is left: cid went there for the budget
    assert manager.stats()["num_host_sessions"] == 1
    planned = plan(manager, cid=history(1, 2, 3, 4, 5))
    run(manager, eve=history(1))
    # cid is busy
    assert alive(manager, "bob", "cid", "dan", "eve") == ["cid", "dan", "eve"]
    manager.release(planned.step)
    assert manager.stats()["offloads"] == 4


def test_sessions_dropped_for_their_number_are_not_moved_first() -> None:
    manager = made(2, max_sessions=1, num_host_blocks=4)
    run(manager, ann=history(1, 2, 3, 4, 5))
    assert run(manager, bob=history(1, 2, 3, 4, 5)).offloads == []
    assert alive(manager, "ann", "bob") == ["bob"]


def test_blocks_run_out_without_a_trace() -> None:
    manager = made(4, num_blocks=2 + 8)
    histories = {"ann": history(1, 2, 3, 4, 5), "bob": history(4, 5)}
    for user, each in histories.items():
        run(manager, **{user: each})
    held = plan(manager, ann=histories["ann"])
    before = manager.stats()
    with pytest.raises(_C.CacheExhausted, match="the step needs 6 more blocks, 5 of 10 are free"):
        plan(manager, bob=history(4, 5, 6), cid=history(*range(8)), dan=history(*range(12)), anonymous=history(1))
    manager.check_integrity()
    assert manager.stats() == before
    assert issubclass(_C.CacheExhausted, RuntimeError)
    commit(manager, held.step)
    for user, each in histories.items():
        assert run(manager, **{user: each}).cached_len == [len(each)]


def test_slots_run_out_without_a_trace() -> None:
    manager = made(num_slots=3)
    run(manager, ann=history(1), bob=history(1))
    before = manager.stats()
    with pytest.raises(_C.CacheExhausted, match="the step needs 2 more slots, 1 of 3 are free"):
        plan(manager, ann=history(1), bob=history(1, 2), cid=history(1))
    manager.check_integrity()
    assert manager.stats() == before
    # the same history again and an anonymous one need no slot
    planned = run(manager, ann=history(1, 2), bob=history(1), anonymous=history(1))
    assert planned.slots == [2, 1, -1]
    assert run(manager, cid=history(1)).slots == [0]


def test_a_step_writes_h_last_to_a_slot_of_its_own() -> None:
    manager = made()
    first = run(manager, ann=history(1, 2))
    planned = plan(manager, ann=history(1, 2, 3))
    assert planned.slots != first.slots
    manager.release(planned.step)
    assert run(manager, ann=history(1, 2)).slots == first.slots
    assert run(manager, ann=history(1, 2, 3)).slots == planned.slots


def test_quota_keeps_leading_blocks_without_h_last() -> None:
    manager = made(max_blocks_per_user=2, num_slots=1)
    first = run(manager, ann=history(*range(10)))
    assert (first.slots, len(first.tables[0])) == ([0], 3)
    stats = manager.stats()
    assert (stats["session_blocks"], stats["truncations"]) == (2, 1)
    # the last position of what is kept is computed anew: h(last) is gone, and its one slot free
    kept = run(manager, ann=history(*range(8)))
    assert (kept.cached_len, kept.slots) == ([7], [0])
    assert run(manager, ann=history(*range(8))).cached_len == [8]
    assert manager.stats()["truncations"] == 1


def test_quota_prefix_serves_longer_histories() -> None:
    manager = made(max_blocks_per_user=2)
    for _ in range(2):
        again = run(manager, ann=history(*range(12)))
    assert (again.cached_len, again.copies) == ([8], [])


def test_evicted_session_moves_to_the_host_and_is_restored() -> None:
    manager = made(2, num_host_blocks=4)
    first = run(manager, ann=history(1, 2, 3, 4, 5))
    moving = run(manager, bob=history(1, 2, 3, 4, 5))
    assert [device for device, _ in moving.offloads] == first.tables[0]
    stats = manager.stats()
    assert (stats["num_sessions"], stats["num_host_sessions"], stats["host_blocks_used"]) == (2, 1, 2)
    assert (stats["offloads"], stats["evictions"], stats["session_blocks"]) == (2, 0, 2)
    back = plan(manager, ann=history(1, 2, 3, 4, 5))
    assert (back.cached_len, back.rows, back.copies, back.slots) == ([5], [], [], first.slots)
    hosts = [host for _, host in moving.offloads]
    assert back.restores == [[host, device] for host, device in zip(hosts, back.tables[0], strict=True)]
    # the host blocks stay until the commit
    assert manager.stats()["host_blocks_used"] == 2
    swapped = commit(manager, back.step)
    assert [device for device, _ in swapped] == moving.tables[0]
    manager.finish(back.step, True)
    assert (manager.stats()["restores"], manager.stats()["num_host_sessions"]) == (2, 1)


def test_restore_brings_back_what_the_history_uses_only() -> None:
    manager = made(4, num_host_blocks=8)
    run(manager, ann=history(*range(16)))
    hosts = [host for _, host in run(manager, bob=history(*range(16))).offloads]
    changed = plan(manager, ann=history(*range(6), 99, 98, 97))
    # the second block is restored whole and then written from its third position on
    assert (changed.cached_len, changed.copies) == ([6], [])
    assert changed.restores == [[hosts[0], changed.tables[0][0]], [hosts[1], changed.tables[0][1]]]
    assert changed.rows[0] == changed.tables[0][1] * BLOCK + 2
    manager.release(changed.step)
    manager.check_integrity()
    assert plan(manager, ann=history(*range(16))).cached_len == [16]
    assert plan(manager, ann=history(*range(16))).cached_len == [0]


def test_restore_of_an_unrelated_history_copies_nothing() -> None:
    manager = made(2, num_host_blocks=4)
    run(manager, ann=history(1, 2, 3))
    run(manager, bob=history(1, 2, 3, 4, 5))
    assert manager.stats()["num_host_sessions"] == 1
    assert run(manager, ann=history(9)).restores == []
    assert run(manager, ann=history(9)).cached_len == [1]


def test_half_open_step_locks_the_moving_session() -> None:
    manager = made(2, num_host_blocks=4)
    first = run(manager, ann=history(1, 2, 3, 4, 5))
    free = manager.stats()["num_free_blocks"]
    planned = plan(manager, bob=history(1, 2, 3, 4, 5))
    commit(manager, planned.step)
    stats = manager.stats()
    assert (stats["num_open_steps"], stats["num_free_blocks"], stats["session_blocks"]) == (1, free - 2, 2)
    assert alive(manager, "ann", "bob") == ["ann", "bob"]
    during = plan(manager, ann=history(1, 2, 3, 4, 5))
    assert (during.cached_len, during.slots) == ([0], [-1])
    manager.release(during.step)
    manager.finish(planned.step, True)
    manager.check_integrity()
    assert (manager.stats()["num_open_steps"], manager.stats()["num_free_blocks"]) == (0, free)
    assert run(manager, ann=history(1, 2, 3, 4, 5)).slots == first.slots


def test_failed_offloads_drop_their_sessions() -> None:
    manager = made(4, num_host_blocks=8)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1))
    planned = plan(manager, cid=history(*range(16)))
    assert len(commit(manager, planned.step)) == 3
    manager.finish(planned.step, False)
    manager.check_integrity()
    stats = manager.stats()
    assert alive(manager, "ann", "bob", "cid") == ["cid"]
    assert (stats["host_blocks_used"], stats["num_free_blocks"], stats["evictions"], stats["offloads"]) == (0, 20, 2, 0)


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_close_of_a_moving_session_takes_effect_at_finish(moved: bool, all_of_them: bool) -> None:
    manager = made(2, num_host_blocks=4)
    run(manager, ann=history(1, 2, 3, 4, 5))
    planned = plan(manager, bob=history(1, 2, 3, 4, 5))
    commit(manager, planned.step)
    manager.clear() if all_of_them else manager.close("ann")
    manager.check_integrity()
    assert not manager.close("ann")
    assert alive(manager, "ann", "bob") == ([] if all_of_them else ["bob"])
    assert manager.stats()["host_blocks_used"] == 2
    manager.finish(planned.step, moved)
    manager.check_integrity()
    stats = manager.stats()
    assert (stats["host_blocks_used"], stats["num_free_blocks"] + stats["session_blocks"]) == (0, 22)
    assert run(manager, ann=history(1, 2, 3, 4, 5)).cached_len == [0]


@pytest.mark.parametrize(("max_offloads", "survivors"), [(0, "cid"), (1, "cid"), (2, "ann cid"), (4, "ann bob cid")])
def test_sessions_without_offload_rows_are_dropped(max_offloads: int, survivors: str) -> None:
    manager = made(4, num_host_blocks=8)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    planned = plan(manager, cid=history(*range(16)))
    if commit(manager, planned.step, max_offloads):
        manager.finish(planned.step, True)
    manager.check_integrity()
    assert alive(manager, "ann", "bob", "cid") == survivors.split()


def test_host_tier_drops_its_oldest_to_make_room() -> None:
    manager = made(2, num_host_blocks=4)
    for user in ("ann", "bob", "cid", "dan"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    assert alive(manager, "ann", "bob", "cid", "dan") == ["bob", "cid", "dan"]
    assert manager.stats()["evictions"] == 1


def test_host_tier_spares_busy_and_pinned_sessions() -> None:
    manager = made(2, num_host_blocks=4)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    assert manager.pin("ann")
    busy = plan(manager, bob=history(1, 2, 3, 4, 5))
    run(manager, dan=history(1, 2, 3, 4, 5))
    # the host tier holds nothing that may go: cid is dropped
    assert alive(manager, "ann", "bob", "cid", "dan") == ["ann", "bob", "dan"]
    manager.release(busy.step)
    run(manager, eve=history(1))
    assert alive(manager, "ann", "bob", "dan", "eve") == ["ann", "dan", "eve"]


def test_nothing_is_dropped_in_vain_for_room_in_the_host_tier() -> None:
    manager = made(4, num_host_blocks=3)
    run(manager, ann=history(1), bob=history(2))
    run(manager, cid=history(*range(12)))
    assert manager.stats()["num_host_sessions"] == 1
    assert alive(manager, "ann", "bob", "cid") == ["ann", "bob", "cid"]
    run(manager, dan=history(*range(16)))
    # bob moved there beside ann; cid's 3 blocks found no room even in ann's place
    assert alive(manager, "ann", "bob", "cid", "dan") == ["ann", "bob", "dan"]
    run(manager, eve=history(1))
    # dan's 4 blocks are more than the tier has
    assert alive(manager, "ann", "bob", "dan", "eve") == ["ann", "bob", "eve"]


def test_pinned_sessions_are_evicted_last() -> None:
    manager = made(4)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    assert manager.pin("ann")
    assert manager.stats()["num_pinned"] == 1
    run(manager, cid=history(1, 2, 3, 4, 5))
    assert alive(manager, "ann", "bob", "cid") == ["ann", "cid"]
    # a commit of the user leaves the pin; where nothing else is left, the budget is harder
    run(manager, ann=history(*range(16)))
    assert alive(manager, "ann", "cid") == ["ann"]
    run(manager, bob=history(1))
    assert alive(manager, "ann", "bob") == ["ann"]
    assert manager.pin("ann", False)
    run(manager, bob=history(1))
    assert alive(manager, "ann", "bob") == ["bob"]


def test_pinned_sessions_go_when_nothing_else_is_left() -> None:
    manager = made(4)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    assert manager.pin("ann")
    assert manager.pin("bob")
    run(manager, bob=history(*range(12)))
    assert alive(manager, "ann", "bob") == ["bob"]
    assert manager.stats()["num_pinned"] == 1


def test_pins_are_bounded_by_the_budget() -> None:
    manager = made(4, num_host_blocks=4)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    assert manager.pin("ann")
    run(manager, cid=history(1, 2, 3, 4, 5))
    assert manager.stats()["num_host_sessions"] == 1
    # bob's two blocks count in the host tier too
    assert (manager.pin("bob"), manager.pin("cid"), manager.pin("ann")) == (True, False, True)
    assert (manager.pin("ann", False), manager.pin("cid", False), manager.pin("nobody", False)) == (True, True, False)
    assert (manager.stats()["num_pinned"], manager.pin("nobody")) == (1, False)
    planned = plan(manager, new=history(1))
    assert not manager.pin("new")
    commit(manager, planned.step)
    assert manager.pin("new")


def test_pin_ends_with_close_and_holds_while_a_session_moves() -> None:
    manager = made(2, num_host_blocks=2)
    run(manager, ann=history(1, 2, 3, 4, 5))
    planned = plan(manager, bob=history(1, 2, 3, 4, 5))
    commit(manager, planned.step)
    assert manager.pin("ann")
    assert manager.stats()["num_pinned"] == 1
    manager.finish(planned.step, True)
    manager.check_integrity()
    run(manager, cid=history(1))
    assert alive(manager, "ann", "bob", "cid") == ["ann", "cid"]
    assert manager.close("ann")
    assert manager.stats()["num_pinned"] == 0
    run(manager, ann=history(1))
    assert manager.stats()["num_pinned"] == 0


def test_a_change_of_pin_is_a_use() -> None:
    manager = made(4)
    run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1, 2, 3, 4, 5))
    assert manager.pin("ann")
    assert manager.pin("ann", False)
    run(manager, cid=history(1))
    assert alive(manager, "ann", "bob", "cid") == ["ann", "cid"]


def test_peek_tells_what_plan_would() -> None:
    manager = made(4, num_host_blocks=8)
    run(manager, host=history(1, 2, 3, 4, 5))
    run(manager, ann=history(1, 2, 3), bob=history(4, 5), cid=history(6), busy=history(7))
    assert manager.stats()["num_host_sessions"] == 1
    held = plan(manager, busy=history(7))
    users = ["ann", "host", "busy", "ann", None, "bob", "new", "new", "cid", "cid"]
    histories = [history(1, 2, 9), history(1, 2, 3, 4, 5), history(7), history(1, 2), history(1), history(4, 5)]
    histories += [history(1), history(1), [], history(6)]
    before = manager.stats()
    given = arguments(users, histories)
    peeked = {name: given[name] for name in ("users", "offsets", "keys", "cached_len")}
    manager.peek(**peeked)
    manager.peek(**peeked)
    manager.check_integrity()
    assert manager.stats() == before
    assert given["cached_len"].tolist() == plan_batch(manager, users, histories).cached_len
    assert given["cached_len"].tolist() == [2, 5, 0, 0, 0, 2, 0, 0, 0, 1]
    commit(manager, held.step)


def test_peek_checks_its_arguments() -> None:
    manager = made()
    users, offsets, keys = ["ann", "bob"], np.array([0, 1, 2], np.int32), np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match=r"^cached_len: has 1 entries for 2 users"):
        manager.peek(users, offsets, keys, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match=r"^keys: has 1 rows, offsets end at 2"):
        manager.peek(users, offsets, keys[:1], np.zeros(2, np.int32))
    out = np.full(3, -7, np.int32)
    manager.peek(users, offsets, keys, out)
    assert out.tolist() == [0, 0, -7]


def test_freed_blocks_are_told_once_and_only_while_free() -> None:
    manager = made(4, track_freed=True)
    assert manager.take_freed() == []
    tables = run(manager, ann=history(1, 2, 3, 4, 5), bob=history(1)).tables
    assert manager.take_freed() == []
    manager.close("ann")
    assert sorted(manager.take_freed()) == tables[0]
    assert manager.take_freed() == []
    manager.close("bob")
    taken = plan(manager, anonymous=history(1)).tables
    assert (taken, manager.take_freed()) == ([tables[1]], [])
    assert made().take_freed() == []


def test_close_forgets_an_idle_session_at_once() -> None:
    manager = made()
    run(manager, ann=history(1, 2))
    assert manager.close("ann")
    assert not manager.close("ann")
    assert ("ann" in manager, manager.stats()["num_free_blocks"]) == (False, 60)


@pytest.mark.parametrize("end", ["commit", "release"])
@pytest.mark.parametrize("known", [True, False])
def test_close_during_a_step_takes_effect_when_it_ends(end: str, known: bool) -> None:
    manager = made()
    if known:
        run(manager, ann=history(1))
    planned = plan(manager, ann=history(1, 2))
    assert manager.close("ann")
    assert not manager.close("ann")
    assert ("ann" in manager, manager.num_sessions) == (False, 0)
    assert plan(manager, ann=history(1, 2)).slots == [-1]
    ends[end](manager, planned.step)
    manager.check_integrity()
    assert "ann" not in manager
    assert run(manager, ann=history(1, 2)).cached_len == [0]


def test_clear_closes_all() -> None:
    manager = made()
    run(manager, ann=history(1), bob=history(2), cid=history(3))
    planned = plan(manager, bob=history(2, 3), dan=history(1))
    manager.clear()
    manager.check_integrity()
    assert manager.num_sessions == 0
    commit(manager, planned.step)
    manager.check_integrity()
    assert (manager.num_sessions, manager.stats()["num_free_blocks"]) == (0, 60)


def test_user_names_are_any_text() -> None:
    manager = made()
    for user in ("", "jürgen\0null", "用户"):
        run(manager, **{user: history(1, 2)})
        assert run(manager, **{user: history(1, 2)}).cached_len == [2]
    assert "jürgen" not in manager
    assert manager.num_sessions == 3


def test_stats_count() -> None:
    manager = made()
    run(manager, ann=history(1, 2, 3, 4, 5))
    manager.release(plan(manager, ann=history(1, 2, 7)).step)
    manager.release(plan(manager, ann=history(1, 2, 7)).step)
    assert (manager.stats()["positions_reused"], manager.stats()["copies"]) == (0, 0)  # steps that failed
    run(manager, ann=history(1, 2, 7))
    zeros = ("num_host_sessions", "num_pinned", "num_open_steps", "host_blocks_used", "num_host_blocks")
    zeros += ("evictions", "offloads", "restores", "truncations")
    expected = {"num_blocks": 62, "num_free_blocks": 59, "session_blocks": 1, "num_sessions": 1, "copies": 1}
    expected |= {"steps_planned": 4, "steps_committed": 2, "steps_released": 2}
    expected |= {"positions_planned": 8, "positions_reused": 2, **dict.fromkeys(zeros, 0)}
    assert manager.stats() == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cached_len", np.zeros(1, np.int32), "has 1 entries for 2 users"),
        ("cached_len", np.zeros(2, np.int64), "must be a C-contiguous int32 array"),
        ("session_slots", np.zeros(1, np.int32), "has 1 entries for 2 users"),
        ("block_tables", np.zeros((2, 3), np.int32), "has 3 columns, the longest history has 4 blocks"),
        ("block_tables", np.zeros((2, 0), np.int32), "columns"),
        ("block_tables", np.zeros((1, 4), np.int32), "has 1 rows for 2 users"),
        ("block_tables", np.zeros(8, np.int32), "of 2 dimension"),
        ("block_tables", np.zeros((4, 2), np.int32).T, "must be a C-contiguous int32 array"),
        ("slot_mapping", np.zeros(4, np.int32), "has 4 entries, the batch has 5 new rows"),
        ("copies", np.zeros((1, 3), np.int32), "has 1 rows for 2 users"),
        ("copies", np.zeros((2, 2), np.int32), "must have 3 columns, not 2"),
        ("restores", np.zeros((7, 2), np.int32), "has 7 rows, 2 users of up to 4 blocks need 8"),
        ("restores", np.zeros((8, 3), np.int32), "must have 2 columns, not 3"),
        ("keys", np.zeros((5, 3), np.int32), "must have 2 columns, not 3"),
        ("keys", np.zeros((4, 2), np.int32), "has 4 rows, offsets end at 5"),
        ("keys", np.zeros((5, 2), np.float32), "must be a C-contiguous int32 array"),
        ("offsets", np.array([0, 3], np.int32), "has 2 entries, 2 users need 3"),
        ("offsets", np.array([1, 3, 5], np.int32), "must start at 0, not 1"),
        ("offsets", np.array([0, 3, 2], np.int32), "falls from 3 to 2 at user 1"),
        ("offsets", np.array([0, 3, 20], np.int32), "user 1 has 17 positions, max_seq_len is 16"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, value: object, message: str) -> None:
    manager = made()
    before = manager.stats()
    given = arguments(["ann", "bob"], [history(1, 2, 3), history(4, 5)])
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        manager.plan(**{**given, name: value})
    assert manager.stats() == before
    manager.check_integrity()
    manager.plan(**given)


def test_read_only_output_is_refused() -> None:
    given = arguments(["ann"], [history(1)])
    frozen = np.zeros(1, np.int32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="cached_len: is read-only"):
        made().plan(**{**given, "cached_len": frozen})


def test_user_that_is_no_text_is_refused() -> None:
    given = arguments(["ann"], [history(1)])
    with pytest.raises(TypeError, match=r"users\[1\]: must be a str or None, not int"):
        made().plan(**{**given, "users": ["ann", 3]})


def test_entries_past_the_batch_stay_untouched() -> None:
    given = arguments(["ann", "bob", "cid"], [history(1, 2), history(3), []])
    given["users"] = ["ann"]
    assert made().plan(**given) == (1, 2, 0, 0)
    for name in ("cached_len", "session_slots", "block_tables"):
        assert (given[name][1:] == -7).all()
    assert given["slot_mapping"].tolist()[2:] == [-7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "block_size: must be at least 1, not 0"),
        ({"shared_len": -1}, "shared_len: must be at least 0, not -1"),
        ({"max_seq_len": 0}, "max_seq_len: must be at least 1"),
        ({"key_width": 0}, "key_width: must be at least 1"),
        ({"budget_blocks": -1}, "budget_blocks: must be at least 0, not -1"),
        ({"max_sessions": 0}, "max_sessions: must be at least 1"),
        ({"num_slots": 0}, "num_slots: must be at least 1"),
        ({"max_blocks_per_user": -1}, "max_blocks_per_user: must be at least 0"),
        ({"num_host_blocks": -1}, "num_host_blocks: must be at least 0"),
        ({"num_blocks": 15, "budget_blocks": 10}, "num_blocks: 15 blocks of 4 positions can't hold .* at least 16"),
        ({"num_blocks": 2**30}, "num_blocks: .* can't be numbered in int32"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        made(**settings)
