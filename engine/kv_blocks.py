"""KVBlocks: keys and values by block on one device, in the model's type or in 8 bits with their scales.

Blocks travel to the host tier and back as rows of bytes, one a block: scales first, then keys and values of all layers.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speeder_engine.config import DecoderConfig
from speeder_engine.memory import refuse_beyond_memory, zeros
from speeder_engine.triton_kernels.compressed_attention import QUANTIZED, Scales
from speeder_engine.triton_kernels.qk_norm_rope_store import quantize

JUNK = 3e4  # finite in every dtype: rows behind a history's end are read with weight zero
JUNK_BYTE = 126  # of an 8-bit element: 448 in fp8, the largest that is finite


class KVLayer(NamedTuple):
    """One layer's keys and values [blocks, block_size, H_kv, D], and their scales [blocks, block_size, H_kv]."""

    keys: Tensor
    values: Tensor
    scales: Scales | None


class KVBlocks:
    """Keys and values [layers, blocks, block_size, H_kv, D]; where they are int8 or fp8, fp32 scales [layers, blocks,
    block_size, H_kv] too, one a position and head. None of them ever moves."""

    def __init__(
        self, decoder: DecoderConfig, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (decoder.num_layers, num_blocks, block_size, decoder.num_kv_heads)
        wanted = "kv_budget, max_batch_users: keys and values"
        where: dict[str, Any] = {"device": device}
        refuse_beyond_memory(wanted, num_blocks * block_size * self.position_bytes(decoder, dtype), device)
        self.keys, self.values = (zeros(wanted, *shape, decoder.head_dim, dtype=dtype, **where) for _ in range(2))
        self._scales: tuple[Tensor, ...] = ()
        if dtype in QUANTIZED:
            self._scales = tuple(zeros(wanted, *shape, dtype=torch.float32, **where) for _ in range(2))
        # torch gathers and scatters no fp8: 8-bit elements are moved as bytes
        self._moved = tuple(movable(tensor) for tensor in (self.keys, self.values))

    @staticmethod
    def position_bytes(decoder: DecoderConfig, dtype: torch.dtype) -> int:
        """Of one position's keys and values in all layers, with their scales."""
        head = decoder.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in QUANTIZED else 0)
        return 2 * decoder.num_layers * decoder.num_kv_heads * head

    def layer(self, index: int) -> KVLayer:
        scales = (self._scales[0][index], self._scales[1][index]) if self._scales else None
        return KVLayer(self.keys[index], self.values[index], scales)

    def store(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Writes keys and values [n, H_kv, D] of one layer at `slots` [n]."""
        for i, given in enumerate((keys, values)):
            kept = given.to(self.keys.dtype)
            if self._scales:
                kept, scale = quantize(given, self.keys.dtype)
                self._scales[i][layer].flatten(0, 1)[slots] = scale
            self._moved[i][layer].flatten(0, 1)[slots] = movable(kept)

    def copy(self, source: int, target: int, num_positions: int) -> None:
        """The first positions of one block into another."""
        for tensor in (*self._moved, *self._scales):
            tensor[:, target, :num_positions] = tensor[:, source, :num_positions]

    def pack(self, blocks: Tensor) -> Tensor:
        """int64 [n] -> bytes [n, block bytes], int8."""
        parts = []
        for tensors in (self._scales, self._moved):
            if tensors:
                chosen = torch.stack([tensor[:, blocks] for tensor in tensors], dim=2)  # [layers, n, 2, ...]
                parts.append(chosen.transpose(0, 1).contiguous().flatten(1).view(torch.int8))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unpack(self, packed: Tensor, blocks: Tensor) -> None:
        """What `pack` made, into blocks int64 [n]."""
        start = 0
        for tensors in (self._scales, self._moved):
            if tensors:
                layers, _, *shape = tensors[0].shape
                end = start + 2 * layers * prod(shape) * tensors[0].itemsize
                part = packed[:, start:end].contiguous().view(tensors[0].dtype).view(-1, layers, 2, *shape)
                for i, tensor in enumerate(tensors):
                    tensor[:, blocks] = part[:, :, i].transpose(0, 1)
                start = end

    def spoil(self, blocks: Tensor) -> None:
        """Fills blocks int64 [n] with junk, so that whoever still reads one is found out."""
        for tensor in self._moved:
            tensor[:, blocks] = JUNK_BYTE if self._scales else JUNK
        for tensor in self._scales:
            tensor[:, blocks] = JUNK


def movable(tensor: Tensor) -> Tensor:
    """The same memory as a type that torch can gather and scatter."""
    return tensor.view(torch.int8) if tensor.dtype in QUANTIZED else tensor
