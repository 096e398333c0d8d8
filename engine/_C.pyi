"""The native KV-cache manager: block ids, sessions and plans. It never sees a tensor."""

import numpy as np
from numpy.typing import NDArray

class CacheExhausted(RuntimeError):
    """Too few blocks or slots are free for this step; the message has the numbers. Nothing was changed."""

class BlockManager:
    """Plans batches on a paged KV cache of `num_blocks` blocks of `block_size` positions.

    A sequence is the shared instruction (blocks 0 to num_shared_blocks - 1, held for good) and a user's history, which
    starts in a block of its own. A session is what is cached of one user's history: the exact integer keys of its
    positions, its blocks, and a slot where the caller stores h(last), the hidden state of its last position.
    Histories are compared key by key, so anything a position's keys and values depend on belongs into its key.

    A session lives in device blocks or, evicted, in host blocks, from where the next plan restores it. Its slot stays.
    A step is `plan`, then `commit` or `release`, and after a commit that moves sessions to the host, `finish`.
    Only `commit` and `finish` evict. Safe to call from several threads; the GIL is released while it works.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        shared_len: int,
        max_seq_len: int,
        key_width: int = 3,
        budget_blocks: int,
        max_sessions: int = 65536,
        num_slots: int,
        max_blocks_per_user: int = 0,
        num_host_blocks: int = 0,
        track_freed: bool = False,
    ) -> None:
        """- `shared_len`: positions of the instruction; `max_seq_len`: positions of the longest history.
        - `key_width`: int32 a position.
        - `budget_blocks`: device blocks that sessions may keep between steps; 0: every sequence is anonymous.
        - `max_sessions`: committed sessions of both tiers.
        - `num_slots`: slots of h(last), at least 1. max_sessions plus the sequences of all open steps suffice, plus one
          for each session that is closed while its step is open.
        - `max_blocks_per_user`: leading blocks that a session may keep, 0 for no limit.
        - `num_host_blocks`: the host tier, 0 for none.
        - `track_freed`: remember which device blocks are freed, for `take_freed`.

        Raises ValueError (the message begins with the argument's name), also if num_blocks is less than the
        instruction, budget_blocks and one longest history together.
        """

    def plan(
        self,
        users: list[str | None],
        offsets: NDArray[np.int32],
        keys: NDArray[np.int32],
        cached_len: NDArray[np.int32],
        session_slots: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        slot_mapping: NDArray[np.int32],
        copies: NDArray[np.int32],
        restores: NDArray[np.int32],
    ) -> tuple[int, int, int, int]:
        """Plans one step for B = len(users) histories: (step, num_new_rows, num_copies, num_restores). The step is open
        until `commit(step)` or `release(step)`. User i's history is `keys[offsets[i]:offsets[i + 1]]`, oldest first.

        In: `offsets` [>= B + 1], `keys` [>= offsets[B], key_width]. Out, written in place, all C-contiguous int32,
        entries past the batch untouched:

        - `cached_len` [>= B]: leading positions whose keys and values are in the cache, after `restores` and `copies`.
          All of them only if h(last) is in the user's slot too; otherwise at least the last row is to be computed.
        - `session_slots` [>= B], below num_slots: where h(last) is (all positions cached) or is to be stored (a slot of
          this step's own); -1 for a sequence without a session.
        - `block_tables` [>= B, >= max_blocks_per_seq]: the history's blocks in order, then -1.
        - `slot_mapping` [>= num_new_rows]: block * block_size + offset of each new position, users in order.
        - `copies` [>= B, 3]: source block, target block, number of leading positions; num_copies rows, to be carried
          out before the new rows are stored.
        - `restores` [>= B * max_blocks_per_seq, 2]: host block, device block; num_restores rows, whole blocks to be
          copied before `copies`. A session of the host tier keeps its host blocks until the step is committed.

        None is an anonymous sequence, and so is a user who is already in this batch or in another open step, or whose
        session is being moved to the host: they reuse nothing and leave nothing behind. An empty history makes no
        session and leaves an existing one alone.

        Nothing is evicted and no session changed. Raises CacheExhausted if too few blocks or slots are free, ValueError
        for an argument that does not fit (the message begins with its name); then nothing was changed.
        """

    def peek(
        self,
        users: list[str | None],
        offsets: NDArray[np.int32],
        keys: NDArray[np.int32],
        cached_len: NDArray[np.int32],
    ) -> None:
        """Writes to `cached_len` [>= B] what `plan` would write there now, and changes nothing else. Arguments and
        errors are those of `plan`."""

    def commit(self, step: int, offloads: NDArray[np.int32]) -> int:
        """The step's rows and last hidden states are stored: its sessions take over keys and blocks, are cut to
        max_blocks_per_user (a session that is cut has no h(last) any more) and become the most recently used.

        Then sessions are evicted, longest unused first, until max_sessions and budget_blocks hold; sessions in other
        open steps are passed over, pinned ones go when nothing else is left. For max_sessions, sessions of the host
        tier are dropped before those on the device. For budget_blocks, a session moves to the host tier if it fits in
        there beside the pinned and busy ones (the oldest others are dropped to make room) and `offloads` has enough
        rows left; otherwise it is dropped.

        `offloads`: C-contiguous int32 [n >= 0, 2], written in place: device block, host block, to be copied whole. If
        their number, the result, is not 0, the step stays half open: the sessions that move are locked and keep both
        blocks until `finish(step, moved)`. Otherwise the step is closed.

        Raises ValueError, with nothing changed, if the step is unknown, finished or already committed.
        """

    def finish(self, step: int, moved: bool) -> None:
        """Ends a half-open step. `moved`: its offloads were carried out, and its sessions are in the host tier now, as
        the youngest there. Otherwise they are dropped. Raises ValueError if the step is not half open."""

    def release(self, step: int) -> None:
        """The step failed: its blocks and slots are freed, everything is as before, whatever it has written. Raises
        ValueError if the step is unknown, finished or already committed."""

    def pin(self, user: str, pinned: bool = True) -> bool:
        """Pinned sessions are evicted last. A pin holds until it is taken back, the user closed or the session dropped;
        setting it or taking it back makes the session the most recently used of its tier. False if the user has no
        session, or if all pinned sessions, this one with them, would have more than budget_blocks blocks."""

    def pinned(self) -> list[str]:
        """Users whose sessions are pinned, in no order."""

    def close(self, user: str) -> bool:
        """Forgets the user; a session in an open or half-open step is gone for callers now and freed when the step
        ends. False if there was none."""

    def clear(self) -> None:
        """Closes all sessions."""

    def __contains__(self, user: str) -> bool: ...
    def take_freed(self) -> list[int]:
        """Device blocks that were freed since the last call and still are free: whoever reads them is wrong, so a debug
        build may fill them with junk. Empty unless track_freed."""

    def stats(self) -> dict[str, int]:
        """Now: num_blocks, num_free_blocks, num_sessions (both tiers), num_host_sessions (in the host tier or on their
        way there), num_pinned, num_open_steps (half-open ones too), session_blocks (device blocks of sessions, without
        those on their way to the host), host_blocks_used, num_host_blocks.

        Since the start: steps_planned, positions_planned, steps_committed, steps_released; and of committed steps:
        positions_reused, copies, evictions (sessions dropped to make room, or because their move failed), offloads
        (blocks moved), restores (blocks), truncations (sessions cut to max_blocks_per_user).
        """

    def check_integrity(self) -> None:
        """Recomputes reference counts, free lists, tiers, orders of use, slots, index and budgets from the sessions and
        steps; takes time in proportion to the cache. Raises RuntimeError that names what disagrees."""

    @property
    def num_sessions(self) -> int: ...
    @property
    def open_step(self) -> int:
        """The newest step that is open or half open; 0: none is."""
    @property
    def num_shared_blocks(self) -> int: ...
    @property
    def max_blocks_per_seq(self) -> int: ...

def lay_out(
    offsets: NDArray[np.int32],
    keys: NDArray[np.int32],
    cached_len: NDArray[np.int32],
    session_slots: NDArray[np.int32],
    slot_mapping: NDArray[np.int32],
    num_ranked: NDArray[np.int32],
    candidates: NDArray[np.int32],
    instruction_len: int,
    instruction_slot: int,
    scratch_slot: int,
    nobody: int,
    rows: NDArray[np.int64],
    reads: NDArray[np.int64],
    users: NDArray[np.int64],
    candidate: NDArray[np.bool_],
    read_candidate: NDArray[np.bool_],
    is_new: NDArray[np.bool_],
) -> None:
    """Lays out the rows that a plan leaves to compute of B windows with `keys` [n, 3], `num_ranked` [B] candidates of
    each behind its new history. `engine/batch.py` names the fields; what is not filled is padding, of the sequence
    `nobody`. ValueError for what doesn't fit together or into the target, which is then as it was.
    """
