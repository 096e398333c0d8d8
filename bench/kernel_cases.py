"""Every kernel at the shapes of real steps: what it is called with, the bytes and operations it can't do without."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.config import CompressorConfig, DecoderConfig
from speeder_engine.models.compressor import Compressor
from speeder_engine.triton_kernels.add_rms_norm import Norm, add_rms_norm
from speeder_engine.triton_kernels.candidate_scores import CandidateTable, RankedRows, candidate_scores
from speeder_engine.triton_kernels.compressed_attention import AttentionRows, compressed_attention
from speeder_engine.triton_kernels.few_rows import MOST_ROWS, make_counters
from speeder_engine.triton_kernels.fused_linear import fused_linear
from speeder_engine.triton_kernels.fused_qkv import HeadsInto, fused_qkv
from speeder_engine.triton_kernels.item_embed import EmbedRows, EmbedTables, item_embed
from speeder_engine.triton_kernels.keep_last import keep_last
from speeder_engine.triton_kernels.linear_w8 import linear_w8, linear_w8_rows
from speeder_engine.triton_kernels.modality_experts import modality_experts
from speeder_engine.triton_kernels.qk_norm_rope_store import qk_norm_rope_store
from speeder_engine.triton_kernels.quantize_rows import quantize_rows, quantize_weight
from speeder_engine.triton_kernels.swiglu import swiglu
from speeder_engine.triton_kernels.top_scores import MAX_K, Answerable, top_scores
from speeder_engine.triton_kernels.top_scores_two_stage import CoarseTable, top_scores_two_stage

INSTRUCTION, HISTORY, BLOCK = 30, 30, 16
PARTS = ("qkv", "gate_up", "down")  # of a layer's matrices
WIDTHS = {"text": 384, "image": 256, "collaborative": 64}


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    num_bytes: float  # read and written once each
    flops: float


@dataclass(frozen=True)
class Maker:
    """Cases of one decoder's shape, for a number of rows."""

    shape: DecoderConfig
    num_rows: int
    device: torch.device
    dtype: torch.dtype

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)

    def caches(self, num_blocks: int) -> tuple[Tensor, Tensor]:
        size = num_blocks, BLOCK, self.shape.num_kv_heads, self.shape.head_dim
        return self.draw(*size), self.draw(*size)

    def below(self, most: int, *size: int) -> Tensor:
        return torch.randint(0, most, size, device=self.device)

    def case(self, name: str, call: Callable[[], object], num_bytes: float, flops: float = 0) -> Case:
        return Case(f"{name} {self.num_rows} rows", call, num_bytes, flops)

    def all(self, num_items: int) -> Iterator[Callable[[], Case]]:
        yield self.norm
        yield self.gated
        yield partial(self.embed, num_items)
        yield self.rope
        yield self.attention
        yield from (partial(self.linear, part) for part in PARTS)
        if self.num_rows <= MOST_ROWS:
            yield self.fused_heads
            yield from (partial(self.fused, part) for part in PARTS if part != "qkv")
            yield from (partial(self.fused, "gate_up", kind) for kind in ("int8", "fp8"))
        yield partial(self.small_linear, "int8")
        yield partial(self.small_linear, "fp8")
        yield partial(self.small_linear, "fp8", rows=True)
        yield self.experts
        yield self.last
        yield partial(self.ranked, num_items)

    def norm(self) -> Case:
        size, itemsize = self.shape.hidden_size, self.dtype.itemsize
        residual, x, weight = self.draw(self.num_rows, size), self.draw(self.num_rows, size), self.draw(size)
        return self.case(
            "add_rms_norm", lambda: add_rms_norm(residual, x, weight, 1e-6), 4 * residual.numel() * itemsize
        )

    def gated(self) -> Case:
        gate_up = self.draw(self.num_rows, 2 * self.shape.intermediate_size)
        return self.case("swiglu", lambda: swiglu(gate_up), 1.5 * gate_up.numel() * self.dtype.itemsize)

    def embed(self, num_items: int) -> Case:
        size, rows = self.shape.hidden_size, self.num_rows
        tables = EmbedTables(self.draw(num_items, size), self.draw(64, size), self.draw(size), self.draw(size), 1e-6)
        items = EmbedRows(
            self.below(num_items, rows),
            self.below(64, rows),
            self.below(1, rows),
            self.below(2, rows).bool(),
            None,
            rows,
        )
        return self.case("item_embed", lambda: item_embed(tables, items), 4 * rows * size * self.dtype.itemsize)

    def rope(self) -> Case:
        shape, rows = self.shape, self.num_rows
        heads = shape.num_heads + 2 * shape.num_kv_heads
        wide = self.draw(rows, heads, shape.head_dim)
        q, k, v = wide.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        angles = torch.randn(INSTRUCTION + HISTORY + 1, shape.head_dim, device=self.device)
        positions = self.below(len(angles), rows)
        caches, slots = self.caches(rows // BLOCK + 1), torch.arange(rows, device=self.device)
        cos, sin = angles.cos(), angles.sin()
        num_bytes = 2 * wide.numel() * self.dtype.itemsize + 2 * angles.numel() * 4

        def call() -> object:
            return qk_norm_rope_store(q, k, v, cos, sin, *caches, slots, positions=positions)

        return self.case("qk_norm_rope_store", call, num_bytes)

    def attention(self) -> Case:
        """Warm users: one new item and 20 candidates each, behind the instruction and 30 items."""
        shape, each = self.shape, 21
        users = -(-self.num_rows // each)
        rows = users * each
        width, shared = -(-(HISTORY + 1) // BLOCK), -(-INSTRUCTION // BLOCK)
        caches = self.caches(shared + users * width)
        local = torch.arange(rows, device=self.device) % each
        attention = AttentionRows(
            sequence=torch.arange(users, device=self.device).repeat_interleave(each),
            local=local,
            visible=torch.full_like(local, HISTORY + 1),
            candidate=local > 0,
            rows_per_sequence=32,
            block_tables=torch.arange(users * width, device=self.device).view(users, width) + shared,
            shared_blocks=torch.arange(shared, device=self.device),
            shared_len=INSTRUCTION,
        )
        q, k, v = (self.draw(rows, n, shape.head_dim) for n in (shape.num_heads, *[shape.num_kv_heads] * 2))
        keys = INSTRUCTION + users * (HISTORY + 1)
        row_bytes = (2 * q.numel() + 2 * k.numel()) * self.dtype.itemsize
        num_bytes = row_bytes + 2 * keys * shape.num_kv_heads * shape.head_dim * self.dtype.itemsize
        flops = 4 * rows * (INSTRUCTION + HISTORY + 2) * shape.num_heads * shape.head_dim
        return self.case(
            "compressed_attention", lambda: compressed_attention(q, k, v, *caches, attention), num_bytes, flops
        )

    def _product(self, part: str = "gate_up") -> tuple[Tensor, Tensor, float]:
        shape = self.shape
        size, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads + 2 * shape.num_kv_heads
        sizes = {"qkv": (heads * shape.head_dim, size), "gate_up": (2 * inner, size), "down": (size, inner)}
        outputs, inputs = sizes[part]
        weight = self.draw(outputs, inputs) * inputs**-0.5
        return self.draw(self.num_rows, inputs), weight, 2 * self.num_rows * inputs * outputs

    def linear(self, part: str = "gate_up") -> Case:
        """torch's own, to compare the others with."""
        x, weight, flops = self._product(part)
        num_bytes = (x.numel() + weight.numel() + self.num_rows * weight.shape[0]) * self.dtype.itemsize
        return self.case(f"F.linear {part}", lambda: F.linear(x, weight), num_bytes, flops)

    def fused(self, part: str = "gate_up", kind: str | None = None) -> Case:
        """With what stands around it in a layer: the norm, the gate, the sum. `kind`: of 8 bits a weight."""
        x, weight, flops = self._product(part)
        counters, gated = make_counters(self.device), part == "gate_up"
        norm = Norm(self.draw(x.shape[1]), 1e-6) if gated else None
        width = weight.shape[0] // (2 if gated else 1)
        residual = self.draw(self.num_rows, width) if part == "down" else None
        matrix = weight if kind is None else quantize_weight(weight, kind)  # type: ignore[arg-type]
        num_bytes = (x.numel() + self.num_rows * width) * self.dtype.itemsize
        num_bytes += weight.numel() * (self.dtype.itemsize if kind is None else 1)
        given: dict[str, Any] = {"norm": norm, "residual": residual, "gated": gated}
        name = f"fused_linear {f'{kind} ' if kind else ''}{part}"
        return self.case(name, lambda: fused_linear(x, matrix, counters, **given), num_bytes, flops)

    def fused_heads(self) -> Case:
        """Norm, projection, rotation and the write into the cache."""
        shape, rows = self.shape, self.num_rows
        x, weight, flops = self._product("qkv")
        caches = self.caches(rows // BLOCK + 1)
        angles = torch.randn(INSTRUCTION + HISTORY + 1, shape.head_dim, device=self.device)
        slots = torch.arange(rows, device=self.device)
        places = angles.cos(), angles.sin(), self.below(len(angles), rows)
        into = HeadsInto(*places, *caches, None, slots, (None, None), 0.0, shape.num_heads)
        counters, norm = make_counters(self.device), Norm(self.draw(shape.hidden_size), 1e-6)
        num_bytes = (x.numel() + weight.numel() + rows * weight.shape[0]) * self.dtype.itemsize
        return self.case("fused_qkv", lambda: fused_qkv(x, weight, counters, None, norm, into), num_bytes, flops)

    def small_linear(self, kind: str, rows: bool = False) -> Case:
        """`rows`: they are brought to the kind too."""
        x, weight, flops = self._product()
        small = quantize_weight(weight, kind)  # type: ignore[arg-type]
        num_bytes = weight.numel() + (x.numel() + self.num_rows * weight.shape[0]) * self.dtype.itemsize
        name = f"linear_w8 {kind} gate_up{f', rows of {kind}' * rows}"
        call = (
            (lambda: linear_w8_rows(quantize_rows(x, small.kind), small, x.dtype))
            if rows
            else (lambda: linear_w8(x, small))
        )
        return self.case(name, call, num_bytes, flops)

    def experts(self) -> Case:
        """Items of an upsert, by the compressor."""
        made = Compressor(CompressorConfig(WIDTHS, self.shape.hidden_size)).to(self.device, self.dtype)
        made.requires_grad_(False)
        mixture = made.mixture()
        features = [self.draw(self.num_rows, width) for width in WIDTHS.values()]
        present = torch.ones(self.num_rows, len(WIDTHS), dtype=torch.bool, device=self.device)
        weights = sum(parameter.numel() for parameter in made.parameters())
        num_bytes = (weights + sum(each.numel() for each in features)) * self.dtype.itemsize
        return self.case(
            "modality_experts",
            lambda: modality_experts(features, present, mixture),
            num_bytes,
            2 * weights * self.num_rows,
        )

    def last(self) -> Case:
        """Half of the sequences have a new row."""
        rows, size = self.num_rows, self.shape.hidden_size
        hidden, kept, each = self.draw(rows, size), self.draw(rows, size), torch.arange(rows, device=self.device)
        given = (hidden, each, each % 2 == 0, kept, each, each)
        return self.case("keep_last", lambda: keep_last(*given), 3 * hidden.numel() * self.dtype.itemsize)

    def ranked(self, num_items: int) -> Case:
        rows, size = self.num_rows, self.shape.hidden_size
        available = torch.ones(num_items, dtype=torch.bool, device=self.device)
        prior = torch.zeros(num_items, device=self.device)
        table = CandidateTable(self.draw(num_items, size), prior, available, self.draw())
        ranked = RankedRows(self.draw(rows, size), self.draw(size), self.draw(), self.draw())
        given = (self.draw(rows, size), self.below(rows, rows), self.below(num_items, rows))
        num_bytes = 3 * rows * size * self.dtype.itemsize
        return self.case("candidate_scores", lambda: candidate_scores(*given, table, ranked), num_bytes)

    def search(self, num_items: int, num_users: int, k: int = 10, two_stage: bool = False) -> Case:
        """The whole catalogue, 30 items excluded for each user; `two_stage`: without what is searched again."""
        size = self.shape.hidden_size
        vectors, table = self.draw(num_users, size), self.draw(num_items, size)
        prior = torch.randn(num_items, device=self.device)
        excluded = [torch.randperm(num_items)[:HISTORY].sort()[0].int().numpy() for _ in range(num_users)]
        available = torch.ones(num_items, dtype=torch.bool, device=self.device)
        given = Answerable.build(available, excluded, [None] * num_users)
        flops, num_bytes = 2 * num_users * num_items * size, table.numel() * self.dtype.itemsize
        name = f"{num_items} items, {num_users} users, k={k}"
        if two_stage:
            coarse = CoarseTable.build(table)
            whole = (vectors, table, prior, given, k, coarse, MAX_K)
            return Case(f"top_scores_two_stage {name}", lambda: top_scores_two_stage(*whole), table.numel(), flops)
        name = f"top_scores {name}"
        return Case(name, lambda: top_scores(vectors, table, prior, given, k), num_bytes, flops)


def maker_name(make: Callable[[], Case]) -> str:
    """Of a Maker's case that can't be made or run, whose name nobody has: `fused(gate_up), 32 rows`."""
    method: Any = make
    given: list[object] = []
    if isinstance(make, partial):
        method, given = make.func, [*make.args, *(f"{name}={value}" for name, value in make.keywords.items())]
    return f"{method.__name__}({', '.join(map(str, given))}), {method.__self__.num_rows} rows"
