"""The block manager's rules in combination, against a model that states them in plain words.

Fake key/value stores take the place of the tensors, one for the device and one for the host: every new row writes a
fingerprint of its user and prefix, restores, copies and offloads are carried out, freed blocks are filled with junk,
and each plan must read back exactly its own history. So a leak between users, a wrong reuse, a stale or overwritten key
shows, whichever rule let it through. Failed steps write too, as a failing forward pass may.
"""

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from speeder_engine import _C

WINDOW = 12
JUNK = -1
USERS = ("ann", "bob", "cid", "dan", "eve")
ANYONE = (*USERS, None)
TIMES = 10 if os.environ.get("FULL") else 1  # as for the sanitizers
History = tuple[int, ...]
Batch = Sequence[tuple[str | None, History]]


@dataclass
class Planned:
    user: str | None  # None: without a session
    owner: int  # who may read what the sequence writes
    history: History
    cached_len: int
    slot: int
    table: list[int]

    def fingerprints(self) -> list[int]:
        return [hash((self.owner, self.history[: end + 1])) for end in range(len(self.history))]


@dataclass
class Step:
    step: int
    sequences: list[Planned]
    num_restores: int
    offloads: list[list[int]] = field(default_factory=list)


class FakeEngine:
    """Plans and carries out steps on arrays of fingerprints instead of tensors."""

    def __init__(self, **config: int) -> None:
        self.manager = _C.BlockManager(max_seq_len=WINDOW, key_width=1, **config)
        self.device = np.full((config["num_blocks"], config["block_size"]), JUNK, np.int64)
        self.host = np.full((config["num_host_blocks"], config["block_size"]), JUNK, np.int64)
        self.last = np.full(config["num_slots"], JUNK, np.int64)
        self.anonymous = count(len(USERS))

    def peek(self, batch: Batch) -> list[int]:
        cached_len = np.empty(len(batch), np.int32)
        self.manager.peek(*self.request(batch), cached_len)
        return cached_len.tolist()

    def request(self, batch: Batch) -> tuple[list[str | None], np.ndarray, np.ndarray]:
        offsets = np.cumsum([0, *(len(history) for _, history in batch)], dtype=np.int32)
        keys = np.array([item for _, history in batch for item in history], np.int32).reshape(-1, 1)
        return [user for user, _ in batch], offsets, keys

    def plan(self, batch: Batch) -> Step:
        """Plans, checks what is reused, and writes all that the step computes."""
        cached_len, slots = np.empty((2, len(batch)), np.int32)
        tables = np.empty((len(batch), self.manager.max_blocks_per_seq), np.int32)
        mapping = np.empty(len(batch) * WINDOW, np.int32)
        copies, restores = np.empty((len(batch), 3), np.int32), np.empty((tables.size, 2), np.int32)
        out = (cached_len, slots, tables, mapping, copies, restores)
        step, num_rows, num_copies, num_restores = self.manager.plan(*self.request(batch), *out)
        for host, target in restores[:num_restores].tolist():
            self.device[target] = self.host[host]
        for source, target, length in copies[:num_copies].tolist():
            self.device[target, :length] = self.device[source, :length]
        sequences = [
            Planned(*self.owner(user, slot), history, cached, slot, [block for block in row if block != -1])
            for (user, history), cached, slot, row in zip(
                batch, cached_len.tolist(), slots.tolist(), tables.tolist(), strict=True
            )
        ]
        for each in sequences:
            assert self.read(each)[: each.cached_len] == each.fingerprints()[: each.cached_len]
        rows = [row for each in sequences for row in each.fingerprints()[each.cached_len :]]
        assert len(rows) == num_rows
        self.device.reshape(-1)[mapping[:num_rows]] = rows
        for each in sequences:
            self.serve_last_hidden(each)
        self.check_rows(sequences)
        return Step(step, sequences, num_restores)

    def owner(self, user: str | None, slot: int) -> tuple[str | None, int]:
        return (user, USERS.index(user)) if user is not None and slot >= 0 else (None, next(self.anonymous))

    def read(self, sequence: Planned) -> list[int]:
        return self.device[sequence.table].reshape(-1)[: len(sequence.history)].tolist()

    def serve_last_hidden(self, sequence: Planned) -> None:
        if sequence.slot < 0:
            return
        if sequence.cached_len < len(sequence.history):
            self.last[sequence.slot] = sequence.fingerprints()[-1]
        assert self.last[sequence.slot] == sequence.fingerprints()[-1]

    def check_rows(self, sequences: Sequence[Planned]) -> None:
        for each in sequences:
            assert self.read(each) == each.fingerprints()

    def commit(self, step: Step, max_offloads: int) -> None:
        offloads = np.empty((max_offloads, 2), np.int32)
        num_offloads = self.manager.commit(step.step, offloads)
        step.offloads = offloads[:num_offloads].tolist()

    def offload(self, step: Step, moved: bool) -> None:
        for source, host in step.offloads:
            self.host[host] = self.device[source] if moved else JUNK

    def junk_freed(self) -> None:
        self.device[self.manager.take_freed()] = JUNK


@dataclass
class Known:
    history: History = ()
    has_last: bool = False
    tier: str = "new"  # then device, moving, host
    pinned: bool = False
    step: int = 0  # the step that writes or moves it
    closed: bool = False  # goes with that step


@dataclass
class Model:
    """Sessions in order of last use: a commit, a change of pin and an arrival on the host put one at the end."""

    block_size: int
    budget: int
    max_sessions: int
    quota: int
    num_host_blocks: int
    sessions: dict[str, Known] = field(default_factory=dict)

    def blocks(self, history: History) -> int:
        return -(-len(history) // self.block_size)

    def held(self, *tiers: str, closed: bool = False, idle: bool = False, pinned: bool | None = None) -> int:
        found = [each for each in self.sessions.values() if each.tier in tiers and (closed or not each.closed)]
        found = [each for each in found if pinned in (None, each.pinned) and not (idle and each.step)]
        return sum(self.blocks(each.history) for each in found)

    def usable(self, user: str | None, history: History) -> int:
        known = self.sessions.get(user or "", Known())
        if known.step or not history or (known.history == history and known.has_last):
            return 0 if known.step else len(history)
        pairs = zip(known.history, history, strict=False)
        return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), len(history) - 1)

    def oldest(self, *tiers: str) -> str:
        found = [(user, each) for user, each in self.sessions.items() if each.tier in tiers and not each.step]
        return min(found, key=lambda pair: (pair[1].pinned, tiers.index(pair[1].tier)))[0]

    def use(self, user: str, **changes: object) -> None:
        self.sessions[user] = replace(self.sessions.pop(user), **changes)

    def commit(self, step: int, histories: dict[str, History], rows: int) -> None:
        for user, history in histories.items():
            kept = history[: self.quota * self.block_size or WINDOW]
            self.use(user, history=kept, has_last=kept == history, tier="device", step=0)
            if self.sessions[user].closed:
                del self.sessions[user]
        while sum(each.tier != "new" and not each.closed for each in self.sessions.values()) > self.max_sessions:
            del self.sessions[self.oldest("host", "device")]
        while self.held("device") > self.budget:
            size = self.blocks(self.sessions[user := self.oldest("device")].history)
            free = self.num_host_blocks - self.held("host", "moving", closed=True)
            if size > rows or size > free + self.held("host", idle=True, pinned=False):
                del self.sessions[user]
            elif size > free:
                del self.sessions[self.oldest("host")]
            else:
                self.use(user, tier="moving", step=step)
                rows -= size

    def end(self, step: int, moved: bool | None = None) -> None:
        for user in [user for user, each in self.sessions.items() if each.step == step]:
            known = self.sessions[user]
            if known.closed or known.tier == "new" or moved is False:
                del self.sessions[user]
            elif known.tier == "moving":
                self.use(user, tier="host", step=0)
            else:
                known.step = 0


histories = st.lists(st.integers(0, 2), max_size=WINDOW).map(tuple)
appended = st.lists(st.integers(0, 2), max_size=5)
edits = st.tuples(st.sampled_from(["same", "append", "cut", "change"]), st.integers(0, WINDOW), appended)
max_offloads = st.sampled_from([40, 40, 40, 2, 0, -1])
users = st.sampled_from(USERS)
anyone = st.sampled_from(ANYONE)
SIZES = {
    "block_size": [1, 2, 4, 5],
    "budget": [6, 4, 3, 10, 2, 0],
    "spare": [40, 20, 6, 0],
    "num_slots": [20, 20, 20, 2],
    "max_sessions": [8, 8, 3, 2, 1],
    "quota": [0, 0, 0, 3, 1],
    "num_host_blocks": [20, 10, 6, 3, 0],
}


class Machine(RuleBasedStateMachine):
    """Batches, ends of steps in any order, pins, closes; the integrity and the model compared after each."""

    @initialize(**{name: st.sampled_from(values) for name, values in SIZES.items()})
    def make(
        self, block_size: int, budget: int, spare: int, num_slots: int, max_sessions: int, quota: int, **host: int
    ) -> None:
        self.model = Model(block_size, budget, max_sessions, quota, **host)
        self.private = self.model.blocks((0,) * WINDOW) + budget + spare
        self.num_slots = num_slots
        self.engine = FakeEngine(
            num_blocks=self.private + self.model.blocks((0,) * 3),
            block_size=block_size,
            shared_len=3,
            budget_blocks=budget,
            max_sessions=max_sessions,
            num_slots=num_slots,
            max_blocks_per_user=quota,
            track_freed=True,
            **host,
        )
        self.manager = self.engine.manager
        self.open: dict[int, tuple[Step, int, int]] = {}  # with the blocks and slots that the step took
        self.half_open: dict[int, tuple[Step, bool]] = {}  # with whether the offloads are still to be carried out

    def edited(self, user: str | None, edit: tuple[str, int, list[int]]) -> History:
        kind, at, items = edit
        stored = self.model.sessions.get(user or "", Known()).history or tuple(range(7))
        if kind == "same":
            return stored
        if kind == "append":
            return (*stored, *items)[:WINDOW]
        if kind == "cut":
            return stored[:at]
        return (*stored[:at], *items, *stored[at + len(items) :])[:WINDOW]

    @rule(batch=st.lists(st.tuples(users, appended), min_size=1, max_size=3), rows=max_offloads)
    def come_back(self, batch: list[tuple[str, list[int]]], rows: int) -> None:
        self.plan([(user, self.edited(user, ("append", 0, items))) for user, items in batch], rows)

    @precondition(lambda self: self.hosted())
    @rule(which=st.integers(0, 9), edit=edits, rows=max_offloads)
    def come_back_from_host(self, which: int, edit: tuple[str, int, list[int]], rows: int) -> None:
        user = self.hosted()[which % len(self.hosted())]
        self.plan([(user, self.edited(user, edit))], rows)

    def hosted(self) -> list[str]:
        return sorted(user for user, each in self.model.sessions.items() if each.tier == "host")

    @rule(batch=st.lists(st.tuples(anyone, edits), max_size=4), rows=max_offloads)
    def follow_up(self, batch: list[tuple[str | None, tuple[str, int, list[int]]]], rows: int) -> None:
        self.plan([(user, self.edited(user, edit)) for user, edit in batch], rows)

    @rule(batch=st.lists(st.tuples(anyone, histories), max_size=3), rows=max_offloads)
    def unrelated(self, batch: list[tuple[str | None, History]], rows: int) -> None:
        self.plan(batch, rows)

    def plan(self, batch: Batch, rows: int) -> None:
        """Plans a step; with `rows` for offloads commits it, with -1 leaves it open."""
        writing = dict(self.writing(batch))
        expected = [self.model.usable(*batch[i]) if i in writing else 0 for i in range(len(batch))]
        kept = [self.kept(writing.get(i), cached) for i, cached in enumerate(expected)]
        need = sum(self.model.blocks(history) for _, history in batch) - sum(kept)
        slots = sum(expected[i] < len(batch[i][1]) for i in writing)
        before = self.manager.stats()
        assert self.engine.peek(batch) == expected
        try:
            step = self.engine.plan(batch)
        except _C.CacheExhausted:
            assert need > before["num_free_blocks"] or slots > self.free_slots()
            assert self.manager.stats() == before
            return
        assert need <= before["num_free_blocks"]
        assert slots <= self.free_slots()
        assert [each.cached_len for each in step.sequences] == expected
        assert {i for i, each in enumerate(step.sequences) if each.user is not None} == set(writing)
        hosted = self.hosted()
        restored = [self.model.blocks((0,) * expected[i]) for i, user in writing.items() if user in hosted]
        assert step.num_restores == sum(restored)
        for user in writing.values():
            self.model.sessions.setdefault(user, Known()).step = step.step
        self.open[step.step] = step, need, slots
        if rows >= 0:
            self.commit_step(step.step, rows)

    def writing(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """Which sequences have a session: one writer per user and step."""
        seen: set[str] = set()
        for index, (user, history) in enumerate(batch):
            idle = user not in self.model.sessions or not self.model.sessions[user].step
            if self.model.budget and user is not None and history and idle and user not in seen:
                seen.add(user)
                yield index, user

    def kept(self, user: str | None, cached_len: int) -> int:
        """Blocks that a sequence shares with its session: all of them for an append, else the full ones."""
        known = self.model.sessions.get(user or "", Known())
        if user is None or known.tier != "device":
            return 0
        whole = cached_len == len(known.history)
        return self.model.blocks(known.history) if whole else cached_len // self.model.block_size

    def free_slots(self) -> int:
        held = sum(each.has_last for each in self.model.sessions.values())
        return self.num_slots - held - sum(slots for _, _, slots in self.open.values())

    @precondition(lambda self: self.open or self.half_open)
    @rule(which=st.integers(0, 9), fails=st.sampled_from([False, False, True]), rows=st.sampled_from([40, 40, 2, 0]))
    def end(self, which: int, fails: bool, rows: int) -> None:
        """Ends any step in any order."""
        step_id = sorted([*self.open, *self.half_open])[which % (len(self.open) + len(self.half_open))]
        if step_id in self.half_open:
            self.finish(step_id, not fails)
        elif fails:
            self.release(step_id)
        else:
            self.commit_step(step_id, rows)

    def commit_step(self, step_id: int, rows: int) -> None:
        step, *_ = self.open.pop(step_id)
        self.engine.check_rows(step.sequences)
        self.engine.commit(step, rows)
        self.model.commit(step_id, {each.user: each.history for each in step.sequences if each.user}, rows)
        moving = [user for user, each in self.model.sessions.items() if each.step == step_id]
        assert len(step.offloads) == sum(self.model.blocks(self.model.sessions[user].history) for user in moving)
        if step.offloads:
            at_once = step_id % 2 == 0
            if at_once:
                self.engine.offload(step, True)
            self.half_open[step_id] = step, not at_once

    def finish(self, step_id: int, moved: bool) -> None:
        for refused in (self.manager.release, lambda step: self.engine.commit(step_of(step), 0)):
            with pytest.raises(ValueError, match="already committed"):
                refused(step_id)
        step, waits = self.half_open.pop(step_id)
        if waits or not moved:
            self.engine.offload(step, moved)
        self.manager.finish(step_id, moved)
        self.model.end(step_id, moved)

    def release(self, step_id: int) -> None:
        del self.open[step_id]
        self.manager.release(step_id)
        self.model.end(step_id)

    @rule(user=users, act=st.sampled_from(["pin", "pin", "unpin", "close", "clear"]))
    def act_on(self, user: str, act: str) -> None:
        if act == "close":
            self.close(user)
        elif act == "clear":
            self.manager.clear()
            for each in USERS:
                self.forget(each)
        else:
            self.pin(user, act == "pin")

    def pin(self, user: str, pinned: bool) -> None:
        known = self.model.sessions.get(user)
        there = known is not None and known.tier != "new" and not known.closed
        total = self.model.held("device", "host", "moving", pinned=True)
        changes = there and known.pinned != pinned
        fits = not pinned or not changes or total + self.model.blocks(known.history) <= self.model.budget
        assert self.manager.pin(user, pinned) == (there and fits)
        if changes and fits:
            self.model.use(user, pinned=pinned)

    def close(self, user: str) -> None:
        known = self.model.sessions.get(user)
        assert self.manager.close(user) == (known is not None and not known.closed)
        self.forget(user)

    def forget(self, user: str) -> None:
        known = self.model.sessions.get(user)
        if known is not None and known.step:
            known.closed, known.pinned = True, False
        else:
            self.model.sessions.pop(user, None)

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        self.engine.junk_freed()
        model, stats = self.model, self.manager.stats()
        alive = {user for user, each in model.sessions.items() if each.tier != "new" and not each.closed}
        assert {user for user in USERS if user in self.manager} == alive
        assert stats["num_sessions"] == self.manager.num_sessions == len(alive) <= model.max_sessions
        assert stats["num_host_sessions"] == sum(model.sessions[user].tier in ("host", "moving") for user in alive)
        assert stats["num_pinned"] == sum(model.sessions[user].pinned for user in alive)
        assert stats["num_open_steps"] == len(self.open) + len(self.half_open)
        assert stats["session_blocks"] == model.held("device") <= model.budget
        assert stats["host_blocks_used"] == model.held("host", "moving", closed=True)
        taken = model.held("device", "moving", closed=True) + sum(need for _, need, _ in self.open.values())
        assert stats["num_free_blocks"] == self.private - taken


def step_of(step: int) -> Step:
    return Step(step, [], 0)


Machine.TestCase.settings = settings(
    max_examples=100 * TIMES, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


def drawn_edit(draw: random.Random) -> tuple[str, int, list[int]]:
    return draw.choice(["same", "append", "cut", "change"]), draw.randint(0, WINDOW), drawn_items(draw, 5)


def drawn_items(draw: random.Random, most: int) -> list[int]:
    return draw.choices(range(3), k=draw.randint(0, most))


def random_act(machine: Machine, draw: random.Random) -> None:
    """One of the machine's rules, as Hypothesis would draw it."""
    rows = draw.choice([40, 40, 40, 2, 0, -1])
    kind = draw.choice(["come_back", "come_back_from_host", "follow_up", "unrelated", "end", "act_on"])
    if kind == "come_back":
        machine.come_back([(draw.choice(USERS), drawn_items(draw, 5)) for _ in range(draw.randint(1, 3))], rows)
    elif kind == "come_back_from_host" and machine.hosted():
        machine.come_back_from_host(draw.randint(0, 9), drawn_edit(draw), rows)
    elif kind == "follow_up":
        machine.follow_up([(draw.choice(ANYONE), drawn_edit(draw)) for _ in range(draw.randint(0, 4))], rows)
    elif kind == "unrelated":
        machine.unrelated(
            [(draw.choice(ANYONE), tuple(drawn_items(draw, WINDOW))) for _ in range(draw.randint(0, 3))], rows
        )
    elif kind == "end" and (machine.open or machine.half_open):
        machine.end(draw.randint(0, 9), draw.random() < 1 / 3, draw.choice([40, 40, 2, 0]))
    elif kind == "act_on":
        machine.act_on(draw.choice(USERS), draw.choice(["pin", "pin", "unpin", "close", "clear"]))


@pytest.mark.parametrize("seed", range(4))
def test_the_machine_driven_at_random(seed: int) -> None:
    """Hypothesis finds the shortest way to a failure, and takes most of the time: most steps are drawn without it."""
    for example in range(300 * TIMES):
        draw, machine = random.Random(f"{seed} {example}"), Machine()
        machine.make(**{name: draw.choice(values) for name, values in SIZES.items()})
        for _ in range(50):
            random_act(machine, draw)
            machine.agrees()


@pytest.mark.parametrize("max_sessions", [3, 32])
@pytest.mark.parametrize("num_host_blocks", [0, 9])
def test_four_threads_on_one_manager(max_sessions: int, num_host_blocks: int) -> None:
    engine = FakeEngine(
        num_blocks=64,
        block_size=3,
        shared_len=4,
        budget_blocks=5,
        max_sessions=max_sessions,
        num_slots=max_sessions + 16,
        num_host_blocks=num_host_blocks,
    )
    manager = engine.manager
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(1000):
                users = draw.choices([*USERS, None], k=draw.randint(0, 3))
                step = engine.plan([(user, tuple(draw.choices((0, 0, 1), k=draw.randint(0, 9)))) for user in users])
                engine.check_rows(step.sequences)
                if draw.random() < 0.8:
                    engine.commit(step, 20)
                    moved = draw.random() < 0.9
                    engine.offload(step, moved)
                    if step.offloads:
                        manager.finish(step.step, moved)
                else:
                    manager.release(step.step)
                if draw.random() < 0.05:
                    manager.close(draw.choice(USERS))
                    manager.pin(draw.choice(USERS))
                manager.check_integrity()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = manager.stats()
    assert stats["positions_reused"] > 0
    assert (stats["restores"] > 0) == (num_host_blocks > 0)
    manager.clear()
    manager.check_integrity()
    stats = manager.stats()
    assert (stats["num_open_steps"], stats["num_sessions"], stats["num_free_blocks"]) == (0, 0, 62)
