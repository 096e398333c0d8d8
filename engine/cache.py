"""KVCache: the blocks of keys and values on the device, and the face of the native BlockManager that plans them.

A session is compared with every request by the exact (row, version, time bucket) array it was computed from, so that
a corrected history or a re-embedded item can't read stale keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine import _C
from speeder_engine.config import DecoderConfig, EngineConfig, check, parse_bytes
from speeder_engine.errors import CacheExhausted, ConfigError
from speeder_engine.kv_blocks import KVBlocks, KVLayer
from speeder_engine.memory import zeros
from speeder_engine.prompt import PromptLayout

KEY_WIDTH = 3  # (row, version, time bucket)
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class CachePlan:
    """What one step reads and writes. The arrays are the planner's own: they hold until the next plan."""

    step: int
    offsets: Ints  # [B + 1] of the windows in `keys`
    keys: Ints  # [n, 3] of their positions
    cached_len: Ints  # [B] history positions that need no row
    extend_len: Ints  # [B] history positions that do
    session_slots: Ints  # [B] where h(last) is kept, -1 for none
    block_tables: Ints  # [B, blocks] each sequence's history blocks, 0 where unused
    slot_mapping: Ints  # [new rows] where their keys go: block * block_size + offset
    copies: Ints  # [c, 3] source block, target block, positions: before anything is written
    restores: Ints  # [r, 2] host block, device block: before the copies

    @classmethod
    def of_nobody(cls, size: "CacheSize") -> "CachePlan":
        """The plan of a step without any sequence."""
        none, tables = np.zeros(0, np.int32), np.zeros((0, size.blocks_per_sequence), np.int32)
        pairs, keys = np.zeros((0, 2), np.int32), np.zeros((0, KEY_WIDTH), np.int32)
        return cls(0, np.zeros(1, np.int32), keys, none, none, none, tables, none, keys, pairs)

    def lay_out(
        self,
        num_ranked: Ints,
        candidates: Ints,
        numbers: tuple[int, int, int, int],
        ints: tuple[Longs, Longs, Longs],
        flags: tuple[Flags, Flags, Flags],
    ) -> None:
        """Writes the rows that are left to compute, and the candidates behind them: `_C.lay_out`, whose arguments these
        are."""
        _C.lay_out(
            self.offsets, self.keys, self.cached_len, self.session_slots, self.slot_mapping, num_ranked, candidates,
            *numbers, *ints, *flags,
        )  # fmt: skip

    def __str__(self) -> str:
        reused, new = int(self.cached_len.sum()), int(self.extend_len.sum())
        return f"step {self.step}: {len(self.cached_len)} sequences, {reused} positions reused, {new} new"


@dataclass(frozen=True)
class CacheSize:
    """Blocks and slots by what they are for. `block_bytes` counts a block's keys and values, with their scales where
    they are 8-bit, and one h(last)."""

    block_bytes: int
    num_shared: int  # the instruction
    budget: int  # what sessions may keep
    working: int  # one step's own, so that planning it never evicts anybody
    host: int
    quota: int  # of one user, 0 for none
    blocks_per_sequence: int
    max_sessions: int
    max_users: int  # of one step

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        decoder: DecoderConfig,
        layout: PromptLayout,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> "CacheSize":
        """dtype: of h(last); kv_dtype: of keys and values."""
        kept = decoder.hidden_size * dtype.itemsize
        block_bytes = KVBlocks.position_bytes(decoder, kv_dtype) * config.block_size + kept
        per_sequence = -(-layout.config.window // config.block_size)
        budget = _whole_blocks(config.kv_budget, "kv_budget", block_bytes)
        # no session is longer than a window
        quota = min(_whole_blocks(config.user_quota or "0", "user_quota", block_bytes), per_sequence)
        if 0 < budget < per_sequence:
            # a session that can't fit as a whole would drive out all others and then leave itself
            quota = min(quota or budget, budget)
        return cls(
            block_bytes=block_bytes,
            num_shared=-(-layout.instruction_len // config.block_size),
            budget=budget,
            working=config.max_batch_users * per_sequence,
            host=_whole_blocks(config.host_budget, "host_budget", block_bytes),
            quota=quota,
            blocks_per_sequence=per_sequence,
            max_sessions=config.max_sessions,
            max_users=config.max_batch_users,
        )

    @property
    def num_blocks(self) -> int:
        return self.num_shared + self.budget + self.working

    @property
    def most_sessions(self) -> int:
        """Every session holds a block at least."""
        return min(self.max_sessions, self.budget + self.host)

    @property
    def num_slots(self) -> int:
        return self.most_sessions + self.max_users


def _whole_blocks(size: str | int, where: str, block_bytes: int) -> int:
    """How many blocks a setting holds; ConfigError for one that is not nothing and yet holds none."""
    num_bytes = parse_bytes(size, where)
    remedy = f'holds not one block of {block_bytes:,} bytes; raise it, or set it to "0" to switch it off'
    check(num_bytes == 0 or num_bytes >= block_bytes, f"{where}: {size!r} {remedy}")
    return num_bytes // block_bytes


class KVCache:
    """Blocks of keys and values, h(last) of every session, and their host tier."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: DecoderConfig,
        layout: PromptLayout,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        """dtype: the model's, of h(last); kv_dtype: of keys and values, the same or int8 or fp8."""
        self.block_size = config.block_size
        self.dtype = dtype
        self.size = size = CacheSize.of(config, decoder, layout, dtype, kv_dtype)
        self.num_bytes = size.num_blocks * size.block_bytes
        self.blocks = KVBlocks(decoder, size.num_blocks, self.block_size, device, kv_dtype)
        self.keys, self.values = self.blocks.keys, self.blocks.values
        # behind the sessions' slots: the instruction's own, which is that of an empty history, and one for what nobody
        # keeps
        self.instruction_slot, self.scratch_slot = size.num_slots, size.num_slots + 1
        kept = size.num_slots + 2, decoder.hidden_size
        self.last_hidden = zeros("kv_budget, max_sessions: h(last) of sessions", *kept, device=device, dtype=dtype)
        # bytes, block-major: one block is one contiguous copy
        pinned = device.type == "cuda" and size.host > 0
        width = KVBlocks.position_bytes(decoder, kv_dtype) * self.block_size
        self.host = zeros("host_budget: it", size.host, width, dtype=torch.int8, pin_memory=pinned)
        try:
            self.manager = self._make_manager(config, layout)
            self._buffers = _PlanBuffers(size, layout.config.window)
        except MemoryError:
            sizes = f"kv_budget: {size.num_blocks:,} blocks, max_sessions: {size.max_sessions:,}"
            users = f"max_batch_users: {size.max_users:,}"
            raise ConfigError(f"{sizes}, {users}: the host has no room for their books; lower them") from None
        self.debug = config.debug
        self.shared_blocks = torch.arange(size.num_shared, device=device)

    def _make_manager(self, config: EngineConfig, layout: PromptLayout) -> _C.BlockManager:
        size = self.size
        return _C.BlockManager(
            num_blocks=size.num_blocks,
            block_size=self.block_size,
            shared_len=layout.instruction_len,
            max_seq_len=layout.config.window,
            key_width=KEY_WIDTH,
            budget_blocks=size.budget,
            max_sessions=max(size.most_sessions, 1),
            num_slots=size.num_slots,
            max_blocks_per_user=size.quota,
            num_host_blocks=size.host,
            track_freed=config.debug,
        )

    def plan(self, users: Sequence[str | None], keys: Sequence[Ints]) -> CachePlan:
        """Plans one step: `keys` [n, 3] are (row, version, time bucket) of each user's window, oldest first.

        Reserves blocks until `commit` or `release`, evicts nobody. Raises CacheExhausted with the cache as it was.
        """
        self._end_interrupted()
        buffers, size = self._buffers, len(users)
        buffers.fill(keys)
        try:
            step, num_new_rows, num_copies, num_restores = self.manager.plan(
                list(users),
                buffers.offsets,
                buffers.keys,
                buffers.cached_len,
                buffers.session_slots,
                buffers.block_tables,
                buffers.slot_mapping,
                buffers.copies,
                buffers.restores,
            )
        except _C.CacheExhausted as error:
            raise CacheExhausted(f"kv_budget: {error}; raise it, or send fewer users at once") from None
        tables, extend_len = buffers.block_tables[:size], buffers.extend_len[:size]
        np.subtract(np.diff(buffers.offsets[: size + 1]), buffers.cached_len[:size], out=extend_len)
        return CachePlan(
            step=step,
            offsets=buffers.offsets[: size + 1],
            keys=buffers.keys,
            cached_len=buffers.cached_len[:size],
            extend_len=extend_len,
            session_slots=buffers.session_slots[:size],
            block_tables=np.maximum(tables, 0, out=tables),
            slot_mapping=buffers.slot_mapping[:num_new_rows],
            copies=buffers.copies[:num_copies],
            restores=buffers.restores[:num_restores],
        )

    def cached_len(self, users: Sequence[str | None], keys: Sequence[Ints]) -> list[int]:
        """What `plan` would find cached of each window, changing nothing; for at most a step's users at once."""
        self._buffers.fill(keys)
        self.manager.peek(list(users), self._buffers.offsets, self._buffers.keys, self._buffers.cached_len)
        found: list[int] = self._buffers.cached_len[: len(users)].tolist()
        return found

    def prepare(self, plan: CachePlan) -> None:
        """Restores blocks from the host tier, then copies the kept positions of those about to be written otherwise."""
        if len(plan.restores):
            sources, targets = plan.restores.T.astype(np.int64)
            self.blocks.unpack(self._fetch(sources), torch.from_numpy(targets).to(self.keys.device))
        for source, target, positions in plan.copies.tolist():
            self.blocks.copy(source, target, positions)

    def _fetch(self, blocks: NDArray[np.int64]) -> Tensor:
        """Host blocks [n, bytes] on the device: on a GPU one asynchronous copy a block."""
        if self.keys.device.type == "cpu":
            return self.host[torch.from_numpy(blocks)]
        arrived = torch.empty(len(blocks), self.host.shape[1], device=self.keys.device, dtype=self.host.dtype)
        for i, block in enumerate(blocks.tolist()):
            arrived[i].copy_(self.host[block], non_blocking=True)
        return arrived

    def store(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [n, H_kv, D] of one layer at `slots` [n]."""
        self.blocks.store(layer, slots, keys, values)

    def layer(self, index: int) -> KVLayer:
        """What the kernels of one layer read and write."""
        return self.blocks.layer(index)

    def keep_instruction(self, last_hidden: Tensor) -> None:
        """h(last) [1, d] of an empty history."""
        self.last_hidden[self.instruction_slot] = last_hidden[0]

    def commit(self, plan: CachePlan) -> None:
        """Sessions take the step over; what is over budget then goes to the host tier or is forgotten."""
        num_offloads = self.manager.commit(plan.step, self._buffers.offloads)
        if num_offloads:
            moved = False
            try:
                self._offload(*self._buffers.offloads[:num_offloads].T.astype(np.int64))
                moved = True
            finally:
                self.manager.finish(plan.step, moved)
        self._check()

    def _offload(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        packed = self.blocks.pack(torch.from_numpy(sources).to(self.keys.device))
        if self.keys.device.type == "cpu":
            self.host[torch.from_numpy(targets)] = packed
            return
        for i, block in enumerate(targets.tolist()):
            # in stream order: nothing overwrites the blocks, or reads the host's, before this copy
            self.host[block].copy_(packed[i], non_blocking=True)

    def release(self, plan: CachePlan) -> None:
        """Gives the step's blocks back; every session is as it was."""
        if plan.step == self.manager.open_step:  # else a later step has begun, and ended this one
            self.manager.release(plan.step)
            self._check()

    def _end_interrupted(self) -> None:
        """Ends what a KeyboardInterrupt left open, beside the native calls. There is one step at a time: an open one is
        nobody's any more."""
        step = self.manager.open_step
        if step:
            try:
                self.manager.release(step)
            except ValueError:  # committed, and what was to leave for the host tier has not been copied
                self.manager.finish(step, False)
            self._check()

    def _check(self) -> None:
        """With `debug`: freed blocks turn to junk, so that whoever still reads one is found out; books are checked."""
        if not self.debug:
            return
        freed = torch.as_tensor(self.manager.take_freed(), dtype=torch.int64, device=self.keys.device)
        self.blocks.spoil(freed)
        self.manager.check_integrity()


class _PlanBuffers:
    """The int32 arrays the native planner reads and writes, made once."""

    def __init__(self, size: CacheSize, window: int) -> None:
        max_users, blocks = size.max_users, size.blocks_per_sequence
        self.offsets = np.zeros(max_users + 1, np.int32)
        self.keys = np.zeros((max_users * window, KEY_WIDTH), np.int32)
        self.cached_len = np.zeros(max_users, np.int32)
        self.extend_len = np.zeros(max_users, np.int32)
        self.session_slots = np.zeros(max_users, np.int32)
        self.block_tables = np.zeros((max_users, blocks), np.int32)
        self.slot_mapping = np.zeros(max_users * window, np.int32)
        self.copies = np.zeros((max_users, 3), np.int32)
        self.restores = np.zeros((max_users * blocks, 2), np.int32)
        # a step brings at most its own blocks over budget: as many may have to leave
        self.offloads = np.zeros((2 * max_users * blocks, 2), np.int32)

    def fill(self, keys: Sequence[Ints]) -> None:
        """Lays the windows' keys one behind the other."""
        lengths = [len(each) for each in keys]
        self.offsets[: len(keys) + 1] = [0, *accumulate(lengths)]
        if any(lengths):
            np.concatenate(keys, out=self.keys[: sum(lengths)])
