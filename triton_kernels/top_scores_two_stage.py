"""Top k of millions of items: a first pass over an int8 copy of their tokens, an exact second over what it keeps.

z_i        ~ z'_i = scale_i q_i              in int8
coarse_bi  = u_b . z'_i + prior_i            the k' largest are kept
score_bi   = u_b . z_i + prior_i             exact, of those

An item that was left out has coarse_bi <= c, the smallest one kept, and by Cauchy and Schwarz
score_bi <= c + e_b with e_b = |u_b| max_i |z_i - z'_i| + rounding. So the answer is that of `top_scores` wherever its
k-th score is above c + e_b: `certain` says of which users that is known.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speeder_engine.triton_kernels.language import on, runs_triton, tl, triton
from speeder_engine.triton_kernels.quantize_rows import W8Weight, quantize_rows
from speeder_engine.triton_kernels.specimen import Specimen
from speeder_engine.triton_kernels.top_scores import (
    MAX_K,
    Answerable,
    answer_keys,
    list_length,
    merge_lists,
    top_scores,
)

ULP = 2.0**-24  # the relative error of one operation in fp32
OPTIONS = {"BLOCK_ROWS": 8, "BLOCK_SIZE": 256}
ROUNDED_AT_ONCE = 65_536  # rows of a table, in fp32


@dataclass(frozen=True)
class CoarseTable:
    """An int8 copy of I item tokens, and how far from them it is at most."""

    tokens: W8Weight  # [I, d]
    worst_error: Tensor  # fp32 []: no |z_i - z'_i| is larger
    largest_norm: Tensor  # fp32 []: no |z'_i| and no |z_i| is larger

    @classmethod
    def build(cls, table: Tensor) -> "CoarseTable":
        """table [I, d]."""
        (num_items, size), device = table.shape, table.device
        values = torch.zeros(num_items, size, dtype=torch.int8, device=device)
        tokens = W8Weight(values, torch.ones(num_items, dtype=torch.float32, device=device))
        made = cls(tokens, *(torch.zeros((), dtype=torch.float32, device=device) for _ in range(2)))
        for rows in torch.arange(num_items, device=device).split(ROUNDED_AT_ONCE):
            made.put(rows, table[rows])
        return made

    def first(self, num_items: int) -> "CoarseTable":
        """Of the first items alone; a view."""
        tokens = W8Weight(self.tokens.values[:num_items], self.tokens.scales[:num_items])
        return replace(self, tokens=tokens)

    def put(self, rows: Tensor, table: Tensor) -> None:
        """Rows int64 [n] become those of table [n, d], in place. What bounds the distance from the items never shrinks,
        so that it holds for those that are left, too."""
        if not rows.shape[0]:
            return
        wide = table.float().contiguous()
        tokens = quantize_rows(wide, "int8")
        coarse = tokens.dequantized()
        error = wide - coarse
        norm = torch.maximum(coarse.norm(dim=1).amax(), wide.norm(dim=1).amax())
        self.worst_error.copy_(torch.maximum(self.worst_error, error.norm(dim=1).amax()))
        self.largest_norm.copy_(torch.maximum(self.largest_norm, norm))
        self.tokens.values[rows], self.tokens.scales[rows] = tokens.values, tokens.scales


def top_scores_two_stage(
    vectors: Tensor,
    table: Tensor,
    prior: Tensor,
    answerable: Answerable,
    k: int,
    coarse: CoarseTable,
    candidates: int | None = None,
    last: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `top_scores` of vectors [B, d] and table [I, d] of the same dtype; `candidates` (4 k) reach the second pass.

    last: int64 [B], which place is each user's last, if not k' - 1.
    Returns scores and rows [B, k'] and certain bool [B]: up to that place.
    """
    length = min(k, table.shape[0])
    kept = min(max(4 * k if candidates is None else candidates, k), table.shape[0])
    found, rows = top_scores(vectors, coarse.tokens.values, prior, answerable, kept, coarse.tokens.scales)
    if runs_triton(vectors, table) and vectors.shape[0] and 0 < length <= MAX_K:
        with on(vectors.device):
            scores, best = launch_exact_top(vectors, table, prior, found, rows, length)
    else:
        scores, best = exact_top_ref(vectors, table, prior, found, rows, length)
    if kept == table.shape[0]:
        return scores, best, torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    lowest = scores[:, -1] if last is None else scores.gather(1, last.unsqueeze(1))[:, 0]
    return scores, best, _certain(vectors, coarse, found[:, -1], lowest)


def _certain(vectors: Tensor, coarse: CoarseTable, smallest: Tensor, last: Tensor) -> Tensor:
    """bool [B]: whether nothing that was left out, at most `smallest` in the first pass, belongs before `last`."""
    norm = vectors.double().norm(dim=1)
    # of the sums over d in both passes and in `worst_error`, at most
    rounding = 4 * vectors.shape[1] * ULP * norm
    error = norm * coarse.worst_error + rounding * coarse.largest_norm + 4 * ULP * smallest.abs()
    # where the last one kept can't be answered, all that can were kept
    certain: Tensor = torch.isneginf(smallest) | (last > smallest + error)
    return certain


def exact_top_ref(
    vectors: Tensor, table: Tensor, prior: Tensor, found: Tensor, rows: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k best by their exact scores of rows [B, k'], where found [B, k'] is finite."""
    rows, order = torch.sort(rows, dim=1)
    scores: Tensor = (vectors.float().unsqueeze(1) * table[rows].float()).sum(dim=-1) + prior.float()[rows]
    scores = scores.masked_fill(torch.isneginf(found.gather(1, order)), float("-inf"))
    scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
    best: Tensor = rows.gather(1, order)[:, :k]
    return scores[:, :k], best


def launch_exact_top(
    vectors: Tensor, table: Tensor, prior: Tensor, found: Tensor, rows: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    (num_users, size), kept = vectors.shape, rows.shape[1]
    assert vectors.is_contiguous() and table.is_contiguous() and table.shape[1] == size
    assert vectors.dtype == table.dtype and found.shape == rows.shape == (num_users, kept)
    assert found.is_contiguous() and rows.is_contiguous() and rows.dtype == torch.int64
    assert 0 < k <= min(kept, MAX_K) and num_users > 0
    scores = torch.empty(num_users, k, dtype=torch.float32, device=vectors.device)
    best = torch.empty(num_users, k, dtype=torch.int64, device=vectors.device)
    keys = torch.empty(num_users, 1, list_length(kept), dtype=torch.int64, device=vectors.device)
    length = min(keys.shape[2], list_length(k))
    blocks = keys.shape[2] // OPTIONS["BLOCK_ROWS"]
    _exact_scores_kernel[(num_users, blocks)](
        vectors, table, prior.float().contiguous(), found, rows, keys, kept, keys.shape[2], SIZE=size, **OPTIONS
    )
    merge_lists(keys.view(num_users, -1, length), scores, best)
    return scores, best


@triton.jit(do_not_specialize=["kept"])
def _exact_scores_kernel(
    vectors, table, prior, found, rows, keys, kept, width,
    SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys of some of the rows kept for one user; beyond them the smallest key."""
    user = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = place < kept
    columns = tl.arange(0, BLOCK_SIZE)
    row = tl.load(rows + user * kept + place, mask=real, other=0)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, SIZE, BLOCK_SIZE):
        inside = columns < SIZE - start
        vector = tl.load(vectors + user * SIZE + start + columns, mask=inside, other=0.0).to(tl.float32)
        places = table + row[:, None] * SIZE + start + columns[None, :]
        tokens = tl.load(places, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tokens * vector[None, :], axis=1)
    total += tl.load(prior + row, mask=real, other=0.0)
    coarse = tl.load(found + user * kept + place, mask=real, other=0.0)
    total = tl.where(coarse == float("-inf"), coarse, total)
    tl.store(keys + user * width + place, tl.where(real, answer_keys(total, row.to(tl.int32)), -(2**63)))


def _specimen(label: str, kind: str, size: int) -> Specimen:
    types = {"vectors": kind, "table": kind, "prior": "*fp32", "found": "*fp32", "rows": "*i64", "keys": "*i64"}
    arguments = {**types, "kept": "i32", "width": "i32:16", "SIZE": size, **OPTIONS}
    return Specimen(label, _exact_scores_kernel, arguments)


SPECIMENS = (_specimen("0.5B fp32", "*fp32", 896), _specimen("7B bf16", "*bf16", 3584))
