"""Each rule of the native block manager, one by one. The rules in combination: test_block_manager_machine.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from speeder_engine import _C

BLOCK = 4
WINDOW = 16


def made(num_blocks: int = 64, **settings: Any) -> _C.BlockManager:
    defaults: dict[str, Any] = {"block_size": BLOCK, "shared_len": 6, "max_seq_len": WINDOW, "key_width": 2}
    return _C.BlockManager(num_blocks=num_blocks, **{**defaults, **settings})


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
    }


def plan(manager: _C.BlockManager, **histories: Sequence[tuple[int, int]]) -> Planned:
    """Plans one step; the keyword `anonymous` stands for None."""
    users = [None if user == "anonymous" else user for user in histories]
    return plan_batch(manager, users, list(histories.values()))


def plan_batch(
    manager: _C.BlockManager, users: Sequence[str | None], histories: Sequence[Sequence[tuple[int, int]]]
) -> Planned:
    out = arguments(users, histories)
    step, num_rows, num_copies = manager.plan(**out)
    manager.check_integrity()
    tables = [[block for block in row if block != -1] for row in out["block_tables"].tolist()]
    return Planned(
        step,
        out["cached_len"].tolist(),
        out["session_slots"].tolist(),
        tables,
        out["slot_mapping"][:num_rows].tolist(),
        out["copies"][:num_copies].tolist(),
    )


def run(manager: _C.BlockManager, **histories: Sequence[tuple[int, int]]) -> Planned:
    planned = plan(manager, **histories)
    manager.commit(planned.step)
    manager.check_integrity()
    return planned


def test_shared_blocks_are_held_and_never_handed_out() -> None:
    manager = made()
    assert manager.num_shared_blocks == 2
    assert manager.max_blocks_per_seq == WINDOW // BLOCK
    planned = run(manager, ann=history(1, 2, 3, 4, 5))
    assert set(planned.tables[0]).isdisjoint({0, 1})
    manager.clear()
    assert manager.stats()["num_free_blocks"] == 62


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
    manager.commit(planned.step)
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
    manager.commit(planned.step)
    again = plan_batch(manager, ["ann", "new"], [history(1, 2, 3), history(5)])
    assert again.cached_len == [3, 1]


def test_user_in_another_open_step_is_anonymous() -> None:
    manager = made()
    run(manager, ann=history(1, 2))
    first = plan(manager, ann=history(1, 2, 3))
    second = plan(manager, ann=history(1, 2, 4))
    assert (second.cached_len, second.slots) == ([0], [-1])
    manager.commit(second.step)
    manager.commit(first.step)
    assert run(manager, ann=history(1, 2, 3)).cached_len == [3]


@pytest.mark.parametrize("failed", [history(1, 2, 3, 4, 5, 6), history(1, 9), history(1, 2), history(7, 7, 7, 7, 7)])
def test_release_leaves_the_session_as_it_was(failed: list[tuple[int, int]]) -> None:
    manager = made()
    first = run(manager, ann=history(1, 2, 3, 4, 5))
    free = manager.stats()["num_free_blocks"]
    planned = plan(manager, ann=failed)
    # the failed step may write its h(last) without harm
    assert planned.slots != first.slots
    manager.release(planned.step)
    manager.check_integrity()
    assert manager.stats()["num_free_blocks"] == free
    again = run(manager, ann=history(1, 2, 3, 4, 5))
    assert (again.cached_len, again.tables, again.slots) == ([5], first.tables, first.slots)


def test_release_of_a_first_step_leaves_no_session() -> None:
    manager = made()
    planned = plan(manager, ann=history(1, 2))
    assert ("ann" in manager, manager.num_sessions) == (False, 0)
    manager.release(planned.step)
    assert ("ann" in manager, manager.stats()["num_free_blocks"]) == (False, 62)


def test_release_without_a_spare_slot_distrusts_the_last_hidden_state() -> None:
    manager = made(max_sessions=1)
    first = run(manager, ann=history(1, 2, 3))
    planned = plan(manager, ann=history(1, 2, 3, 4))
    assert planned.slots == first.slots
    manager.release(planned.step)
    assert run(manager, ann=history(1, 2, 3)).cached_len == [2]
    assert run(manager, ann=history(1, 2, 3)).cached_len == [3]


@pytest.mark.parametrize("end", ["commit", "release"])
def test_a_step_ends_once(end: str) -> None:
    manager = made()
    planned = plan(manager, ann=history(1))
    finish: Callable[[int], None] = getattr(manager, end)
    finish(planned.step)
    with pytest.raises(ValueError, match=rf"{end}: step {planned.step} is already finished"):
        finish(planned.step)
    for unknown in (0, -1, 99):
        with pytest.raises(ValueError, match=rf"{end}: step {unknown} was never planned"):
            finish(unknown)
    manager.check_integrity()


def test_eviction_takes_the_longest_unused_first() -> None:
    manager = made(num_blocks=2 + 6)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    run(manager, ann=history(1, 2, 3, 4, 5))
    run(manager, dan=history(1, 2))
    assert [user in manager for user in ("ann", "bob", "cid", "dan")] == [True, False, True, True]
    assert manager.stats()["evictions"] == 1


def test_eviction_spares_open_steps() -> None:
    manager = made(num_blocks=2 + 6)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1, 2, 3, 4, 5)})
    open_step = plan(manager, ann=history(1, 2, 3, 4, 5))
    run(manager, dan=history(1, 2))
    assert [user in manager for user in ("ann", "bob", "cid")] == [True, False, True]
    manager.commit(open_step.step)


def test_slots_run_out_before_blocks_do() -> None:
    manager = made(max_sessions=2)
    for user in ("ann", "bob", "cid"):
        run(manager, **{user: history(1)})
    assert [user in manager for user in ("ann", "bob", "cid")] == [False, True, True]
    planned = run(manager, dan=history(1), eve=history(1), fay=history(1))
    assert sorted(planned.slots[:2]) == [0, 1]
    assert planned.slots[2] == -1
    assert "fay" not in manager


def test_exhaustion_changes_nothing() -> None:
    manager = made(num_blocks=2 + 6)
    histories = {"ann": history(1, 2, 3, 4, 5), "bob": history(4, 5)}
    for user, each in histories.items():
        run(manager, **{user: each})
    held = plan(manager, ann=histories["ann"])
    before = manager.stats()
    with pytest.raises(_C.CacheExhausted, match="needs 6 more blocks, 3 of 8 are free or in idle sessions"):
        plan(manager, bob=history(4, 5, 6), cid=history(*range(8)), dan=history(*range(12)), anonymous=history(1))
    manager.check_integrity()
    assert manager.stats() == before
    assert issubclass(_C.CacheExhausted, RuntimeError)
    manager.commit(held.step)
    for user, each in histories.items():
        assert run(manager, **{user: each}).cached_len == [len(each)]


def test_one_request_always_fits_even_into_its_own_sessions_place() -> None:
    manager = made(num_blocks=2 + WINDOW // BLOCK)
    run(manager, ann=history(*range(16)))
    corrected = plan(manager, ann=history(*range(10), *range(30, 36)))
    # cut to what is reused and extended in place, instead of copied
    assert (corrected.cached_len, corrected.copies) == ([10], [])
    assert manager.stats()["trims"] == 1
    manager.release(corrected.step)
    manager.check_integrity()
    assert run(manager, ann=history(*range(10))).cached_len == [9]


def test_nothing_is_retained_without_a_budget() -> None:
    manager = made(retain=False)
    assert run(manager, ann=history(1, 2)).slots == [-1]
    assert run(manager, ann=history(1, 2)).cached_len == [0]
    assert (manager.num_sessions, manager.stats()["num_free_blocks"]) == (0, 62)


def test_close_forgets_an_idle_session_at_once() -> None:
    manager = made()
    run(manager, ann=history(1, 2))
    assert manager.close("ann")
    assert not manager.close("ann")
    assert ("ann" in manager, manager.stats()["num_free_blocks"]) == (False, 62)


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
    getattr(manager, end)(planned.step)
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
    manager.commit(planned.step)
    manager.check_integrity()
    assert (manager.num_sessions, manager.stats()["num_free_blocks"]) == (0, 62)


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
    stats = manager.stats()
    expected = {"steps_planned": 2, "steps_committed": 1, "steps_released": 1, "num_open_steps": 0, "copies": 1}
    expected |= {"positions_planned": 6, "positions_reused": 2, "num_blocks": 64, "num_free_blocks": 60}
    assert {name: stats[name] for name in expected} == expected


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
    step, num_rows, num_copies = made().plan(**given)
    assert (step, num_rows, num_copies) == (1, 2, 0)
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
        ({"max_sessions": 0}, "max_sessions: must be at least 1"),
        ({"num_blocks": 5}, "num_blocks: 5 blocks of 4 positions can't hold .* at least 6 are needed"),
        ({"num_blocks": 2**30}, "num_blocks: .* can't be numbered in int32"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        made(**settings)
