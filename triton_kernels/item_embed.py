"""The rows of a forward pass, and their first norm.

row_n    = scale_i * items_i + prompts_slot + role                 a candidate of item i
         = scale_i * items_i + prompts_slot + times_bucket         a position of the history
         = text_token                                              behind all items
         = 0                                                       padding, behind all rows
normed_n = weight * row_n / sqrt(mean(row_n ^ 2) + eps)

The scales are those of an int8 or fp8 table, one a row; times stand where the model has a calendar.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import normed_row, rms_norm_ref, row_options
from speeder_engine.triton_kernels.language import await_others, on, overlap_options, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen


@dataclass(frozen=True)
class EmbedTables:
    """What rows are looked up in; all but the items in the model's dtype."""

    items: Tensor  # [I, d], of any float type, or int8
    prompts: Tensor  # [slots, d]
    role: Tensor  # [d]
    norm: Tensor  # [d]
    eps: float
    times: Tensor | None = None  # [buckets, d]
    text: Tensor | None = None  # [V, d]
    item_scale: Tensor | None = None  # fp32 [I]


@dataclass(frozen=True)
class EmbedRows:
    """Which rows: first those of items, then text."""

    items: Tensor  # int64 [I] rows of the table
    slots: Tensor  # int64 [I]
    buckets: Tensor  # int64 [I]
    candidate: Tensor  # bool [I]
    tokens: Tensor | None  # int64 [T]
    num_padded: int  # at least I + T

    @property
    def num_rows(self) -> int:
        return self.items.shape[0] + (0 if self.tokens is None else self.tokens.shape[0])


def item_embed(tables: EmbedTables, rows: EmbedRows) -> tuple[Tensor, Tensor]:
    """The residual stream [num_padded, d] in the model's dtype, and its first norm."""
    if runs_triton(tables.items, tables.prompts, tables.role, tables.norm, tables.times, tables.text):
        with on(tables.prompts.device):
            return launch_item_embed(tables, rows)
    return item_embed_ref(tables, rows)


def item_embed_ref(tables: EmbedTables, rows: EmbedRows) -> tuple[Tensor, Tensor]:
    embedded = embed_rows(tables, rows)
    return embedded, rms_norm_ref(embedded, tables.norm, tables.eps)


def embed_rows(tables: EmbedTables, rows: EmbedRows) -> Tensor:
    """The residual stream alone, in torch."""
    candidate = rows.candidate.unsqueeze(-1)
    embedded = _looked_up(tables, rows.items) + tables.prompts[rows.slots] + candidate * tables.role
    if tables.times is not None:
        embedded = embedded + ~candidate * tables.times[rows.buckets]
    if rows.tokens is not None:
        assert tables.text is not None
        embedded = torch.cat([embedded, tables.text[rows.tokens]])
    padding = embedded.new_zeros(rows.num_padded - embedded.shape[0], embedded.shape[1])
    return torch.cat([embedded, padding])


def _looked_up(tables: EmbedTables, rows: Tensor) -> Tensor:
    if tables.item_scale is None:
        return tables.items[rows]
    # bytes: torch gathers no fp8
    found = tables.items.view(torch.int8)[rows].view(tables.items.dtype).float()
    return (found * tables.item_scale[rows].unsqueeze(-1)).to(tables.prompts.dtype)


@triton.jit(do_not_specialize=["num_items", "num_rows"])
def _item_embed_kernel(
    items, item_scale, prompts, role, times, text, norm, item_rows, slots, buckets, candidate, tokens, out, normed,
    num_items, num_rows, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_others(OVERLAP)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = column < size
    is_item = valid & (row < num_items)
    index = tl.load(item_rows + row, mask=row < num_items, other=0).to(tl.int64)
    slot = tl.load(slots + row, mask=row < num_items, other=0).to(tl.int64)
    found = tl.load(items + index * size + column, mask=is_item, other=0.0).to(tl.float32)
    if item_scale is not None:
        found = found * tl.load(item_scale + index, mask=row < num_items, other=0.0)
    found += tl.load(prompts + slot * size + column, mask=is_item, other=0.0).to(tl.float32)
    named = tl.load(candidate + row, mask=row < num_items, other=0) != 0
    found += tl.load(role + column, mask=is_item & named, other=0.0).to(tl.float32)
    if times is not None:
        bucket = tl.load(buckets + row, mask=row < num_items, other=0).to(tl.int64)
        found += tl.load(times + bucket * size + column, mask=is_item & (named == 0), other=0.0).to(tl.float32)
    if text is not None:
        is_text = (row >= num_items) & (row < num_rows)
        token = tl.load(tokens + row - num_items, mask=is_text, other=0).to(tl.int64)
        found += tl.load(text + token * size + column, mask=valid & is_text, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, found.to(out.dtype.element_ty), mask=valid)
    found = normed_row(found, norm, eps, column, size)
    tl.store(normed + row * size + column, found.to(normed.dtype.element_ty), mask=valid)


def launch_item_embed(tables: EmbedTables, rows: EmbedRows) -> tuple[Tensor, Tensor]:
    check_tables(tables)
    size, num_items = tables.prompts.shape[1], rows.items.shape[0]
    for each in (rows.items, rows.slots, rows.buckets, rows.candidate):
        assert each.shape == (num_items,) and each.is_contiguous()
    assert rows.num_rows <= rows.num_padded and (rows.tokens is None or tables.text is not None)
    out = torch.empty(rows.num_padded, size, dtype=tables.prompts.dtype, device=tables.prompts.device)
    normed = torch.empty_like(out)
    if rows.num_padded:
        text = None if rows.tokens is None else tables.text
        _item_embed_kernel[(rows.num_padded,)](
            tables.items, tables.item_scale, tables.prompts, tables.role, tables.times, text, tables.norm, rows.items,
            rows.slots, rows.buckets, rows.candidate, rows.tokens, out, normed, num_items, rows.num_rows, size,
            tables.eps, **row_options(size), **overlap_options(out.device),
        )  # fmt: skip
    return out, normed


def check_tables(tables: EmbedTables) -> None:
    size, dtype = tables.prompts.shape[1], tables.prompts.dtype
    for each in (tables.items, tables.prompts, tables.role, tables.norm, tables.times, tables.text):
        assert each is None or (each.shape[-1] == size and each.is_contiguous())
    for each in (tables.role, tables.norm, tables.times, tables.text):
        assert each is None or each.dtype == dtype
    scale = tables.item_scale
    assert scale is not None or (tables.items.dtype.is_floating_point and tables.items.dtype.itemsize > 1)
    assert scale is None or (scale.shape == tables.items.shape[:1] and scale.dtype == torch.float32)


def _specimen(label: str, size: int, items: str, since: int = 80, overlap: bool = False) -> Specimen:
    options = row_options(size)
    types: dict[str, Any] = dict.fromkeys(("prompts", "role", "times", "text", "norm", "out", "normed"), "*bf16")
    types |= {"items": items, "item_scale": None if items == "*bf16" else "*fp32"}
    types |= dict.fromkeys(("item_rows", "slots", "buckets", "tokens"), "*i64") | {"candidate": "*i1", "eps": "fp32"}
    types |= {"num_items": "i32", "num_rows": "i32", "size": "i32:16", "BLOCK": options["BLOCK"], "OVERLAP": overlap}
    return Specimen(label, _item_embed_kernel, types, num_warps=options["num_warps"], since=since)


SPECIMENS = (
    _specimen("0.5B bf16", 896, "*bf16"),
    _specimen("0.5B bf16, overlapped", 896, "*bf16", since=90, overlap=True),
    _specimen("7B bf16", 3584, "*bf16"),
    _specimen("7B fp8 table", 3584, "*fp8e4nv", since=89),
)
