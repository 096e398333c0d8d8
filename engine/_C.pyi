"""The native KV-cache manager: block ids, sessions and plans. It never sees a tensor."""

import numpy as np
from numpy.typing import NDArray

class CacheExhausted(RuntimeError):
    """Every idle session would not free enough blocks for this step. Nothing was changed, nothing was evicted."""

class BlockManager:
    """Plans batches on a paged KV cache of `num_blocks` blocks of `block_size` positions.

    A sequence is the shared instruction (blocks 0 to num_shared_blocks - 1, held for good) and a user's history, which
    starts in a block of its own. A session is what is cached of one user's history: the exact integer keys of its
    positions, its blocks, and a slot where the caller stores h(last), the hidden state of its last position.
    Histories are compared key by key, so anything a position's keys and values depend on belongs into its key.
    Safe to call from several threads; the GIL is released while it works.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        shared_len: int,
        max_seq_len: int,
        key_width: int = 2,
        max_sessions: int = 65536,
        retain: bool = True,
    ) -> None:
        """`shared_len`: positions of the instruction; `max_seq_len`: positions of the longest history; `key_width`:
        int32 a position; `retain=False`: nothing outlives its step.

        Raises ValueError (the message begins with the argument's name), also if the instruction and one longest history
        don't fit.
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
    ) -> tuple[int, int, int]:
        """Plans one step for B = len(users) histories: (step, num_new_rows, num_copies). The step is open until
        `commit(step)` or `release(step)`. User i's history is `keys[offsets[i]:offsets[i + 1]]`, oldest first.

        In: `offsets` [>= B + 1], `keys` [>= offsets[B], key_width]. Out, written in place, all C-contiguous int32,
        entries past the batch untouched:

        - `cached_len` [>= B]: leading positions whose keys and values are in the cache. All of them only if h(last) is
          in the user's slot too; otherwise at least the last row is to be computed.
        - `session_slots` [>= B], below max_sessions: where h(last) is (all positions cached) or is to be stored;
          -1 for a sequence without a session.
        - `block_tables` [>= B, >= max_blocks_per_seq]: the history's blocks in order, then -1.
        - `slot_mapping` [>= num_new_rows]: block * block_size + offset of each new position, users in order.
        - `copies` [>= B, 3]: source block, target block, number of leading positions; num_copies rows, to be carried
          out before the new rows are stored.

        None is an anonymous sequence, and so is a user who is already in this batch or in another open step, and new
        users beyond the free and evictable slots: they reuse nothing and leave nothing behind. An empty history makes
        no session and leaves an existing one alone.

        Idle sessions are evicted, longest unused first, as far as needed. If all of them are not enough, the batch's
        own sessions are cut to what their requests reuse (counted as `trims`; the part cut off does not come back
        with `release`). Raises CacheExhausted if that is not enough either, ValueError for an argument that does not
        fit; then nothing was changed.
        """

    def commit(self, step: int) -> None:
        """The step's rows and last hidden states are stored: its sessions take over keys and blocks and become the most
        recently used. Raises ValueError if the step is unknown or finished."""

    def release(self, step: int) -> None:
        """The step failed: its blocks are freed, its sessions are as before, whatever it has written. Raises ValueError
        if the step is unknown or finished."""

    def close(self, user: str) -> bool:
        """Forgets the user; a session in an open step is gone for callers now and freed when the step ends. False if
        there was none."""

    def clear(self) -> None:
        """Closes all sessions."""

    def __contains__(self, user: str) -> bool: ...
    def stats(self) -> dict[str, int]:
        """num_blocks, num_free_blocks, num_sessions, num_open_steps now; steps_planned, steps_committed,
        steps_released, positions_reused, positions_planned, copies, evictions, trims since the start."""

    def check_integrity(self) -> None:
        """Recomputes reference counts, free list, order of use, slots and index from the sessions and open steps; takes
        time in proportion to the cache. Raises RuntimeError that names what disagrees."""

    @property
    def num_sessions(self) -> int: ...
    @property
    def num_shared_blocks(self) -> int: ...
    @property
    def max_blocks_per_seq(self) -> int: ...
