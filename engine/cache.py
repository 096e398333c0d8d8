"""KVCache: the blocks of keys and values on the device, and the face of the native BlockManager that plans them.

A session is compared with every request by the exact (row, version) array it was computed from, so that a corrected
history or a re-embedded item can't read stale keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine import _C
from speeder_engine.config import DecoderConfig, EngineConfig, parse_bytes
from speeder_engine.errors import CacheExhausted
from speeder_engine.prompt import PromptLayout

KEY_WIDTH = 2  # (row, version)
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class CachePlan:
    """What one step reads and writes. The arrays are copies: they outlive the next plan."""

    step: int
    cached_len: Ints  # [B] history positions that need no row
    extend_len: Ints  # [B] history positions that do
    session_slots: Ints  # [B] where h(last) is kept, -1 for none
    block_tables: Ints  # [B, blocks] each sequence's history blocks, 0 where unused
    slot_mapping: Ints  # [new rows] where their keys go: block * block_size + offset
    copies: Ints  # [c, 3] source block, target block, positions: before anything is written

    def __str__(self) -> str:
        reused, new = int(self.cached_len.sum()), int(self.extend_len.sum())
        return f"step {self.step}: {len(self.cached_len)} sequences, {reused} positions reused, {new} new"


class KVCache:
    """Keys and values [layers, blocks, block_size, H_kv, D], and h(last) of every session."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: DecoderConfig,
        layout: PromptLayout,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block_size = config.block_size
        window = layout.config.window
        self.blocks_per_sequence = -(-window // self.block_size)
        num_shared = -(-layout.instruction_len // self.block_size)
        shape = (self.block_size, decoder.num_kv_heads, decoder.head_dim)
        block_bytes = 2 * decoder.num_layers * int(np.prod(shape)) * dtype.itemsize
        budget = parse_bytes(config.kv_budget)
        # one step's working blocks come on top of what sessions may keep
        num_blocks = num_shared + config.max_batch_users * self.blocks_per_sequence + budget // block_bytes
        self.num_bytes = num_blocks * block_bytes
        self.keys = torch.zeros(decoder.num_layers, num_blocks, *shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        max_sessions = num_blocks if budget else config.max_batch_users
        self.last_hidden = torch.zeros(max_sessions, decoder.hidden_size, device=device, dtype=dtype)
        self.manager = _C.BlockManager(
            num_blocks=num_blocks,
            block_size=self.block_size,
            shared_len=layout.instruction_len,
            max_seq_len=window,
            key_width=KEY_WIDTH,
            max_sessions=max_sessions,
            retain=budget > 0,
        )
        self.shared_blocks = torch.arange(num_shared, device=device)
        self._buffers = _PlanBuffers(config.max_batch_users, window, self.blocks_per_sequence)

    def plan(self, users: Sequence[str | None], keys: Sequence[Ints]) -> CachePlan:
        """Plans one step: `keys` [n, 2] are (row, version) of each user's window, oldest first.

        Reserves blocks until `commit` or `release`. Raises CacheExhausted with the cache as it was.
        """
        buffers, size = self._buffers, len(users)
        lengths = [len(each) for each in keys]
        buffers.offsets[: size + 1] = [0, *accumulate(lengths)]
        if any(lengths):
            np.concatenate(keys, out=buffers.keys[: sum(lengths)])
        try:
            step, num_new_rows, num_copies = self.manager.plan(
                list(users),
                buffers.offsets,
                buffers.keys,
                buffers.cached_len,
                buffers.session_slots,
                buffers.block_tables,
                buffers.slot_mapping,
                buffers.copies,
            )
        except _C.CacheExhausted as error:
            raise CacheExhausted(f"kv_budget: {error}; raise it, or send fewer users at once") from None
        cached_len = buffers.cached_len[:size].copy()
        return CachePlan(
            step=step,
            cached_len=cached_len,
            extend_len=np.array(lengths, dtype=np.int32) - cached_len,
            session_slots=buffers.session_slots[:size].copy(),
            block_tables=np.maximum(buffers.block_tables[:size], 0),
            slot_mapping=buffers.slot_mapping[:num_new_rows].copy(),
            copies=buffers.copies[:num_copies].copy(),
        )

    def copy_blocks(self, copies: Ints) -> None:
        """Copies the kept positions of blocks that are about to be written differently."""
        for source, target, positions in copies.tolist():
            self.keys[:, target, :positions] = self.keys[:, source, :positions]
            self.values[:, target, :positions] = self.values[:, source, :positions]

    def store(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [n, H_kv, D] of one layer at `slots` [n]."""
        self.keys[layer].flatten(0, 1)[slots] = keys.to(self.keys.dtype)
        self.values[layer].flatten(0, 1)[slots] = values.to(self.values.dtype)

    def keep_last_hidden(self, plan: CachePlan, last_hidden: Tensor) -> None:
        """Keeps h(last) [B, d] with the sessions that were extended: the same history again costs no row."""
        kept = np.flatnonzero((plan.session_slots >= 0) & (plan.extend_len > 0))
        if len(kept):
            slots = torch.from_numpy(plan.session_slots[kept].astype(np.int64)).to(last_hidden.device)
            self.last_hidden[slots] = last_hidden[torch.from_numpy(kept).to(last_hidden.device)]

    def commit(self, plan: CachePlan) -> None:
        self.manager.commit(plan.step)

    def release(self, plan: CachePlan) -> None:
        """Gives the step's blocks back; every session is as it was."""
        self.manager.release(plan.step)


class _PlanBuffers:
    """The int32 arrays the native planner writes into, made once."""

    def __init__(self, max_users: int, window: int, blocks_per_sequence: int) -> None:
        self.offsets = np.zeros(max_users + 1, np.int32)
        self.keys = np.zeros((max_users * window, KEY_WIDTH), np.int32)
        self.cached_len = np.zeros(max_users, np.int32)
        self.session_slots = np.zeros(max_users, np.int32)
        self.block_tables = np.zeros((max_users, blocks_per_sequence), np.int32)
        self.slot_mapping = np.zeros(max_users * window, np.int32)
        self.copies = np.zeros((max_users, 3), np.int32)
