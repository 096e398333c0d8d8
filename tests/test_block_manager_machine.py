"""The block manager's rules in combination, against a model of what each user's session must hold.

A fake key/value store takes the place of the tensors: every new row writes a fingerprint of its prefix, copies are
carried out, and each plan must read back exactly its own history. So a leak between users, a wrong reuse, a stale or
overwritten key shows, whichever rule let it through. Failed steps write too, as a failing forward pass may.
"""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from speeder_engine import _C

WINDOW = 12
USERS = ("ann", "bob", "cid", "dan", "eve")
History = tuple[int, ...]


def fingerprints(history: History) -> list[int]:
    return [hash(history[: end + 1]) for end in range(len(history))]


@dataclass
class Planned:
    user: str | None
    history: History
    cached_len: int
    slot: int
    table: list[int]


@dataclass
class Step:
    step: int
    sequences: list[Planned]


class FakeEngine:
    """Plans and carries out steps on arrays of fingerprints instead of tensors."""

    def __init__(self, manager: _C.BlockManager, num_blocks: int, block_size: int, max_sessions: int) -> None:
        self.manager = manager
        self.block_size = block_size
        self.store = np.zeros(num_blocks * block_size, np.int64)
        self.last = np.zeros(max_sessions, np.int64)

    def plan(self, batch: Sequence[tuple[str | None, History]]) -> Step:
        """Plans, checks what is reused, and writes all that the step computes."""
        lengths = [len(history) for _, history in batch]
        cached_len, slots = np.empty((2, len(batch)), np.int32)
        tables = np.empty((len(batch), self.manager.max_blocks_per_seq), np.int32)
        mapping = np.empty(len(batch) * WINDOW, np.int32)
        copies = np.empty((len(batch), 3), np.int32)
        step, num_rows, num_copies = self.manager.plan(
            [user for user, _ in batch],
            np.cumsum([0, *lengths], dtype=np.int32),
            np.array([item for _, history in batch for item in history], np.int32).reshape(-1, 1),
            cached_len,
            slots,
            tables,
            mapping,
            copies,
        )
        sequences = [
            Planned(user, history, int(cached), int(slot), [block for block in row if block != -1])
            for (user, history), cached, slot, row in zip(batch, cached_len, slots, tables.tolist(), strict=True)
        ]
        for source, target, length in copies[:num_copies].tolist():
            source, target = source * self.block_size, target * self.block_size
            self.store[target : target + length] = self.store[source : source + length]
        for each in sequences:
            assert self.read(each)[: each.cached_len] == fingerprints(each.history)[: each.cached_len]
        rows = [row for each in sequences for row in fingerprints(each.history)[each.cached_len :]]
        assert len(rows) == num_rows
        self.store[mapping[:num_rows]] = rows
        for each in sequences:
            self.serve_last_hidden(each)
        self.check_rows(sequences)
        return Step(step, sequences)

    def read(self, sequence: Planned) -> list[int]:
        rows = [block * self.block_size + offset for block in sequence.table for offset in range(self.block_size)]
        return [int(row) for row in self.store[rows[: len(sequence.history)]]]

    def serve_last_hidden(self, sequence: Planned) -> None:
        if sequence.slot < 0:
            return
        if sequence.cached_len < len(sequence.history):
            self.last[sequence.slot] = hash(sequence.history)
        assert self.last[sequence.slot] == hash(sequence.history)

    def check_rows(self, sequences: Sequence[Planned]) -> None:
        for each in sequences:
            assert self.read(each) == fingerprints(each.history)


@dataclass
class Known:
    """What the model knows of a session."""

    history: History
    slot: int
    has_last: bool = True


@dataclass
class Model:
    """Sessions in order of last use. `usable` is the rule of reuse in plain words."""

    block_size: int
    sessions: dict[str, Known] = field(default_factory=dict)
    writers: dict[str, int] = field(default_factory=dict)  # user -> the open step that writes the session

    def usable(self, user: str, history: History) -> int:
        known = self.sessions.get(user)
        if known is None or not history:
            return 0
        if known.history == history and known.has_last:
            return len(history)
        common = 0
        for stored, sent in zip(known.history, history, strict=False):
            if stored != sent:
                break
            common += 1
        return min(common, len(history) - 1)

    def blocks(self, length: int) -> int:
        return -(-length // self.block_size)

    def writing(self, batch: Sequence[tuple[str | None, History]]) -> dict[int, str]:
        """Which sequences may use a session: one writer per user and step."""
        chosen: dict[int, str] = {}
        for index, (user, history) in enumerate(batch):
            if user is not None and history and user not in self.writers and user not in chosen.values():
                chosen[index] = user
        return chosen

    def least_need(self, batch: Sequence[tuple[str | None, History]]) -> int:
        """Blocks a step needs beyond what its own sessions hold, with nothing copied."""
        writing = self.writing(batch)
        own = sum(self.blocks(len(self.sessions[user].history)) for user in writing.values() if user in self.sessions)
        return sum(self.blocks(len(history)) for _, history in batch) - own

    def idle(self, batch: Sequence[tuple[str | None, History]]) -> list[str]:
        taken = set(self.writing(batch).values())
        return [user for user in self.sessions if user not in self.writers and user not in taken]


histories = st.lists(st.integers(0, 2), max_size=WINDOW).map(tuple)
edits = st.tuples(
    st.sampled_from(["same", "append", "cut", "change"]),
    st.integers(0, WINDOW),
    st.lists(st.integers(0, 2), max_size=5),
)


class Machine(RuleBasedStateMachine):
    """Batches, ends of steps in any order, closes; the integrity and the model compared after each."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 5]),
        shared_len=st.sampled_from([0, 3]),
        spare=st.integers(0, 12),
        max_sessions=st.sampled_from([1, 2, 3, 8]),
    )
    def make(self, block_size: int, shared_len: int, spare: int, max_sessions: int) -> None:
        self.model = Model(block_size)
        self.private = self.model.blocks(WINDOW) + spare
        num_blocks = self.private + self.model.blocks(shared_len)
        self.manager = _C.BlockManager(
            num_blocks=num_blocks,
            block_size=block_size,
            shared_len=shared_len,
            max_seq_len=WINDOW,
            key_width=1,
            max_sessions=max_sessions,
        )
        self.engine = FakeEngine(self.manager, num_blocks, block_size, max_sessions)
        self.open: list[Step] = []
        self.closing: set[str] = set()  # sessions that go when their step ends

    def edited(self, user: str | None, edit: tuple[str, int, list[int]]) -> History:
        kind, at, items = edit
        stored = self.model.sessions[user].history if user in self.model.sessions else ()
        if kind == "same":
            return stored
        if kind == "append":
            return (*stored, *items)[:WINDOW]
        if kind == "cut":
            return stored[:at]
        return (*stored[:at], *items, *stored[at + len(items) :])[:WINDOW]

    @rule(batch=st.lists(st.tuples(st.sampled_from([*USERS, None]), edits), max_size=4), finish=st.booleans())
    def follow_up(self, batch: list[tuple[str | None, tuple[str, int, list[int]]]], finish: bool) -> None:
        self.plan([(user, self.edited(user, edit)) for user, edit in batch], finish)

    @rule(batch=st.lists(st.tuples(st.sampled_from([*USERS, None]), histories), max_size=3), finish=st.booleans())
    def unrelated(self, batch: list[tuple[str | None, History]], finish: bool) -> None:
        self.plan(batch, finish)

    def plan(self, batch: list[tuple[str | None, History]], finish: bool) -> None:
        before = self.manager.stats()
        idle, writing, need = self.model.idle(batch), self.model.writing(batch), self.model.least_need(batch)
        expected = {index: self.model.usable(user, batch[index][1]) for index, user in writing.items()}
        evictable = sum(self.model.blocks(len(self.model.sessions[user].history)) for user in idle)
        obtainable = before["num_free_blocks"] + evictable
        try:
            step = self.engine.plan(batch)
        except _C.CacheExhausted:
            assert need > obtainable
            assert self.manager.stats() == before
            return
        assert need <= obtainable
        after = self.manager.stats()
        assert [each.cached_len for each in step.sequences] == [expected.get(i, 0) for i in range(len(batch))]
        victims = idle[: after["evictions"] - before["evictions"]]
        for user in victims:
            del self.model.sessions[user]
        self.note_writers(step, writing)
        if after["trims"] > before["trims"]:
            self.note_trims(step)
        self.open.append(step)
        if finish:
            self.commit(len(self.open) - 1)

    def note_writers(self, step: Step, writing: dict[int, str]) -> None:
        for index, each in enumerate(step.sequences):
            if each.slot >= 0:
                self.model.writers[writing[index]] = step.step
            else:
                # without a session only where a new user found no slot
                assert index not in writing or writing[index] not in self.model.sessions

    def note_trims(self, step: Step) -> None:
        for each in step.sequences:
            known = self.model.sessions.get(each.user or "")
            if each.slot >= 0 and known is not None and each.cached_len < len(known.history):
                known.history, known.has_last = known.history[: each.cached_len], False

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9))
    def commit(self, which: int) -> None:
        step = self.open.pop(which % len(self.open))
        self.engine.check_rows(step.sequences)
        self.manager.commit(step.step)
        for each in step.sequences:
            if each.slot >= 0 and each.user is not None:
                self.model.sessions.pop(each.user, None)
                del self.model.writers[each.user]
                if each.user not in self.closing:
                    self.model.sessions[each.user] = Known(each.history, each.slot)
                self.closing.discard(each.user)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        step = self.open.pop(which % len(self.open))
        self.manager.release(step.step)
        for each in step.sequences:
            if each.slot >= 0 and each.user is not None:
                del self.model.writers[each.user]
                known = self.model.sessions.get(each.user)
                if known is not None and each.slot == known.slot and each.cached_len < len(each.history):
                    known.has_last = False
                if known is not None and (not known.history or each.user in self.closing):
                    del self.model.sessions[each.user]
                self.closing.discard(each.user)

    @rule(user=st.sampled_from(USERS))
    def close(self, user: str) -> None:
        there = user in self.model.sessions or user in self.model.writers
        assert self.manager.close(user) == (there and user not in self.closing)
        self.forget(user)

    @rule()
    def clear(self) -> None:
        self.manager.clear()
        for user in USERS:
            self.forget(user)

    def forget(self, user: str) -> None:
        if user in self.model.writers:
            self.closing.add(user)
        else:
            self.model.sessions.pop(user, None)

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        alive = {user for user in USERS if user in self.manager}
        assert alive == set(self.model.sessions) - self.closing
        assert self.manager.num_sessions == len(alive)
        free = self.manager.stats()["num_free_blocks"]
        held = sum(self.model.blocks(len(known.history)) for known in self.model.sessions.values())
        assert free <= self.private - held
        if not self.open:
            assert free == self.private - held


Machine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


@pytest.mark.parametrize("max_sessions", [3, 32])
def test_four_threads_on_one_manager(max_sessions: int) -> None:
    num_blocks = 44
    manager = _C.BlockManager(
        num_blocks=num_blocks, block_size=3, shared_len=4, max_seq_len=WINDOW, key_width=1, max_sessions=max_sessions
    )
    engine = FakeEngine(manager, num_blocks, 3, max_sessions)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(2000):
                users = draw.choices([*USERS, None], k=draw.randint(0, 3))
                step = engine.plan([(user, tuple(draw.choices((0, 0, 1), k=draw.randint(0, 9)))) for user in users])
                engine.check_rows(step.sequences)
                (manager.commit if draw.random() < 0.8 else manager.release)(step.step)
                if draw.random() < 0.05:
                    manager.close(draw.choice(USERS))
                manager.check_integrity()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    manager.clear()
    manager.check_integrity()
    stats = manager.stats()
    assert (stats["num_open_steps"], stats["num_sessions"], stats["num_free_blocks"]) == (0, 0, num_blocks - 2)
    assert stats["positions_reused"] > 0
