"""A batch of warm users as the native cache manager sees it, for what times its calls."""

from typing import Any

import numpy as np

from speeder_engine import _C

BLOCK_SIZE, HISTORY, WINDOW, KEY_WIDTH = 16, 30, 256, 3


class Batch:
    """`num_users` warm sessions of HISTORY items, and the arguments of the step that adds one item to each."""

    def __init__(self, num_users: int, num_cold_sessions: int = 0, **settings: Any) -> None:
        self.manager = _C.BlockManager(
            num_blocks=4 * (num_users + num_cold_sessions) + 40,
            block_size=BLOCK_SIZE,
            shared_len=40,
            max_seq_len=WINDOW,
            key_width=KEY_WIDTH,
            budget_blocks=2 * num_users + 3 * num_cold_sessions,
            num_slots=3 * num_users + num_cold_sessions,
            **settings,
        )
        rng = np.random.default_rng(0)
        self.keys = rng.integers(0, 1 << 20, (num_users, HISTORY + 1, KEY_WIDTH), dtype=np.int32)
        out = [np.empty(num_users, np.int32), np.empty(num_users, np.int32)]
        out.append(np.empty((num_users, self.manager.max_blocks_per_seq), np.int32))
        self.out = (*out, np.empty(num_users * WINDOW, np.int32), np.empty((num_users, 3), np.int32))
        self.out += (np.empty((out[-1].size, 2), np.int32),)
        self.offloads = np.empty((0, 2), np.int32)
        for start in range(0, num_cold_sessions, num_users):
            self.run(self.arguments([f"cold-{start + i}" for i in range(num_users)], HISTORY))
        self.users = [f"user-{i}" for i in range(num_users)]
        self.run(self.arguments(self.users, HISTORY))

    def arguments(self, users: list[str], length: int) -> tuple[Any, ...]:
        offsets = np.arange(len(users) + 1, dtype=np.int32) * np.int32(length)
        return (users, offsets, np.ascontiguousarray(self.keys[:, :length]).reshape(-1, KEY_WIDTH), *self.out)

    def run(self, arguments: tuple[Any, ...]) -> None:
        self.manager.commit(self.manager.plan(*arguments)[0], self.offloads)
