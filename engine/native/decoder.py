"""NativeDecoder: a decoder's weights, packed, and whole passes over them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speeder_engine import _cpu
from speeder_engine.cache import KVCache
from speeder_engine.config import MOST_INT32
from speeder_engine.models.decoder import Decoder, DecoderLayer
from speeder_engine.native.support import NUMBERS
from speeder_engine.triton_kernels.compressed_attention import AttentionRows


@dataclass(frozen=True)
class OwnKeys:
    """Keys and values [layers, slots, H_kv, D] that are kept elsewhere than in the cache, and each row's slot [N]."""

    slots: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class NativeRows:
    """N rows, those of one sequence side by side; all int64 but `candidate`.

    A row sees the shared keys, the first `visible` of its sequence's blocks, and its path: a candidate itself, the
    last T rows those of `paths` (own slots; without `own` these are rows), any other row nothing more.
    """

    positions: Tensor  # [N] into cos and sin
    cos: Tensor  # fp32 [positions, D]
    sin: Tensor
    slot_mapping: Tensor  # [at most N] where keys are written, -1 for nowhere
    sequence: Tensor  # [N]
    visible: Tensor  # [N]
    candidate: Tensor  # bool [N]
    block_tables: Tensor  # [B, blocks]
    shared_blocks: Tensor  # [blocks]
    shared_len: int
    read_rows: Tensor  # [R]
    paths: Tensor | None = None  # [T, P], -1 for none
    own: OwnKeys | None = None

    @classmethod
    def of(cls, attention: AttentionRows, **more: Any) -> "NativeRows":
        """What rows see, as it stands in `attention`; `more`: the other fields."""
        return cls(
            sequence=attention.sequence,
            visible=attention.visible,
            candidate=attention.candidate,
            block_tables=attention.block_tables,
            shared_blocks=attention.shared_blocks,
            shared_len=attention.shared_len,
            **more,
        )

    def with_text(self, prefix: AttentionRows, paths: Tensor) -> "NativeRows":
        """With the rows of text behind those of items; their sequences are counted anew, behind the items'."""
        return replace(
            self,
            sequence=torch.cat([self.sequence, self.block_tables.shape[0] + prefix.sequence]),
            visible=torch.cat([self.visible, prefix.visible]),
            candidate=torch.cat([self.candidate, prefix.candidate]),
            block_tables=torch.cat([self.block_tables, prefix.block_tables]),
            paths=paths,
        )


class NativeDecoder:
    """Final (normed) hidden states of rows, as `Decoder` computes them; sums between layers stay in fp32."""

    def __init__(
        self, decoder: Decoder, dtype: torch.dtype, weights: str, kernels: str, kept_rows: int = MOST_INT32
    ) -> None:
        """dtype: of activations and cache, fp32 or bf16. weights: "auto" packs them in dtype, "int8" with one scale an
        output, activations then with one scale a row. kernels: as `pick_kernels` found. kept_rows: activations of so
        many rows are kept for the next pass, those of a larger one given back."""
        config = decoder.config
        self.dtype = dtype
        self._native = _cpu.Decoder(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            eps=config.rms_norm_eps,
            weights=NUMBERS[dtype] if weights == "auto" else weights,
            cache=NUMBERS[dtype],
            isa=kernels,
            threads=torch.get_num_threads(),
        )
        layers: list[Any] = list(decoder.layers)
        for layer in layers:
            self._add(layer)
        norm = _floats(decoder.norm.weight)
        self._native.set_norm(_address(norm))
        self._native.kept_rows = min(kept_rows, MOST_INT32)

    @property
    def weight_bytes(self) -> int:
        """Of the packed weights."""
        return int(self._native.weight_bytes)

    @property
    def scratch_bytes(self) -> int:
        """Of activations that are kept for the next pass."""
        return int(self._native.scratch_bytes)

    def _add(self, layer: DecoderLayer) -> None:
        linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
        weights = [_packable(linear.weight) for linear in linears]
        biases = [None if linear.bias is None else _floats(linear.bias) for linear in linears]
        norms = [_floats(norm) for norm in (layer.input_norm.weight, layer.post_norm.weight, *layer.head_norms)]
        qkv, out, gate_up, down = (
            (_address(weight), NUMBERS[weight.dtype], weight.shape[0], weight.shape[1]) for weight in weights
        )
        self._native.add_layer(
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            biases=[_address(bias) for bias in biases],
            norms=[_address(norm) for norm in norms],
        )

    def forward(self, embedded: Tensor, rows: NativeRows, cache: KVCache) -> Tensor:
        """embedded [N, d] -> [R, d] of the rows read. Keys and values of rows with a slot are in the cache then."""
        out = torch.empty(rows.read_rows.shape[0], embedded.shape[1], dtype=self.dtype)
        assert rows.sequence.shape == rows.visible.shape == rows.candidate.shape == rows.positions.shape
        assert embedded.shape[0] == rows.positions.shape[0] >= rows.slot_mapping.shape[0]
        assert cache.keys.dtype == self.dtype and rows.candidate.dtype == torch.bool
        self._native.threads = torch.get_num_threads()
        self._native.forward(
            {
                "num_rows": embedded.shape[0],
                "rows": _address(embedded),
                "rows_type": NUMBERS[embedded.dtype],
                "positions": _ints(rows.positions),
                "cos": _address(rows.cos),
                "sin": _address(rows.sin),
                "num_positions": rows.cos.shape[0],
                "slot_mapping": _ints(rows.slot_mapping),
                "num_mapped": rows.slot_mapping.shape[0],
                "sequence": _ints(rows.sequence),
                "visible": _ints(rows.visible),
                "candidate": _address(rows.candidate),
                **_path_arguments(rows.paths),
                "block_tables": _ints(rows.block_tables),
                "table_width": rows.block_tables.shape[1],
                "num_sequences": rows.block_tables.shape[0],
                "shared_blocks": _ints(rows.shared_blocks),
                "shared_len": rows.shared_len,
                "block_size": cache.block_size,
                "keys": _address(cache.keys),
                "values": _address(cache.values),
                "layer_bytes": _layer_bytes(cache.keys),
                **_own_arguments(rows.own),
                "read_rows": _ints(rows.read_rows),
                "num_reads": rows.read_rows.shape[0],
                "out": _address(out),
                "out_type": NUMBERS[self.dtype],
            }
        )
        return out


def _path_arguments(paths: Tensor | None) -> dict[str, int]:
    if paths is None:
        return {"paths": 0, "num_pathed": 0, "path_width": 0}
    return {"paths": _ints(paths), "num_pathed": paths.shape[0], "path_width": paths.shape[1]}


def _own_arguments(own: OwnKeys | None) -> dict[str, int]:
    if own is None:
        return dict.fromkeys(("own_slots", "own_keys", "own_values", "own_layer_bytes"), 0)
    keys, values = _address(own.keys), _address(own.values)
    return {
        "own_slots": _ints(own.slots),
        "own_keys": keys,
        "own_values": values,
        "own_layer_bytes": _layer_bytes(own.keys),
    }


def _layer_bytes(tensor: Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


def _address(tensor: Tensor | None) -> int:
    """Where a tensor begins; its memory must be one piece, on the CPU. 0 for none."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def _ints(tensor: Tensor) -> int:
    assert tensor.dtype == torch.int64
    return _address(tensor)


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _packable(weight: Tensor) -> Tensor:
    """As it is where it can be read as it is: a weight that is mapped from a file is copied nowhere but into panels."""
    kept = weight.detach().contiguous()
    return kept if kept.dtype in NUMBERS else kept.float()
