"""Candidates' scores under the rank head.

score_r = w . h_r + b + alpha u_(sequence r) . z_(item r) + beta prior_(item r)        -inf for an unavailable item
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import row_options
from speeder_engine.triton_kernels.language import await_others, on, overlap_options, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen


class RankWeights(NamedTuple):
    """The head's own, all of one type."""

    weight: Tensor  # [d]
    bias: Tensor  # []
    alpha: Tensor  # []
    beta: Tensor  # []


class RankedItems(NamedTuple):
    """What candidates are looked up in."""

    tokens: Tensor  # [I, d]
    prior: Tensor  # [I]
    available: Tensor  # bool [I]


def rank_scores(
    hidden: Tensor, vectors: Tensor, sequence: Tensor, items: Tensor, table: RankedItems, head: RankWeights
) -> Tensor:
    """hidden [R, d] of rows, int64 [R] whose sequence and item; user vectors [B, d] -> fp32 [R]."""
    given = (hidden, vectors, sequence, items, table, head)
    if runs_triton(hidden, vectors, *table, *head):
        with on(hidden.device):
            return launch_rank_scores(*given)
    return rank_scores_ref(*given)


def rank_scores_ref(
    hidden: Tensor, vectors: Tensor, sequence: Tensor, items: Tensor, table: RankedItems, head: RankWeights
) -> Tensor:
    """Sums over d in fp32, not products of matrices: a candidate's arithmetic must not depend on how many stand beside
    it, and in a lower type equals would be made of candidates."""
    retrieved = (vectors[sequence].float() * table.tokens[items].float()).sum(dim=-1)
    own = (hidden.float() * head.weight.float()).sum(dim=-1)
    scores = own + head.bias.float() + head.alpha.float() * retrieved
    scores = scores + head.beta.float() * table.prior[items].float()
    return scores.masked_fill(~table.available[items], float("-inf"))


@triton.jit
def _rank_scores_kernel(
    hidden, vectors, sequence, items, tokens, prior, available, weight, bias, alpha, beta, out, size,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_others(OVERLAP)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = column < size
    user, item = tl.load(sequence + row).to(tl.int64), tl.load(items + row).to(tl.int64)
    own = tl.load(hidden + row * size + column, mask=valid, other=0.0).to(tl.float32)
    own = own * tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
    retrieved = tl.load(vectors + user * size + column, mask=valid, other=0.0).to(tl.float32)
    retrieved = retrieved * tl.load(tokens + item * size + column, mask=valid, other=0.0).to(tl.float32)
    score = tl.sum(own, axis=0) + tl.load(bias).to(tl.float32)
    score += tl.load(alpha).to(tl.float32) * tl.sum(retrieved, axis=0)
    score += tl.load(beta).to(tl.float32) * tl.load(prior + item).to(tl.float32)
    tl.store(out + row, tl.where(tl.load(available + item) != 0, score, float("-inf")))


def launch_rank_scores(
    hidden: Tensor, vectors: Tensor, sequence: Tensor, items: Tensor, table: RankedItems, head: RankWeights
) -> Tensor:
    num_rows, size = hidden.shape
    for each in (hidden, vectors, table.tokens):
        assert each.shape[1] == size and each.is_contiguous()
    for each in (sequence, items):
        assert each.shape == (num_rows,) and each.is_contiguous()
    assert table.available.dtype == torch.bool and table.prior.is_contiguous() and table.available.is_contiguous()
    assert head.weight.shape == (size,) and head.weight.is_contiguous()
    out = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        _rank_scores_kernel[(num_rows,)](
            hidden, vectors, sequence, items, *table, *head, out, size, **row_options(size),
            **overlap_options(hidden.device),
        )  # fmt: skip
    return out


def _specimen(label: str, size: int, overlap: bool = False) -> Specimen:
    options = row_options(size)
    types = dict.fromkeys(("hidden", "vectors", "tokens", "weight", "bias", "alpha", "beta"), "*bf16")
    types |= {"sequence": "*i64", "items": "*i64", "prior": "*fp32", "available": "*i1", "out": "*fp32"}
    arguments = {**types, "size": "i32:16", "BLOCK": options["BLOCK"], "OVERLAP": overlap}
    return Specimen(label, _rank_scores_kernel, arguments, num_warps=options["num_warps"], since=90 if overlap else 80)


SPECIMENS = (_specimen("0.5B bf16", 896), _specimen("7B bf16", 3584), _specimen("0.5B bf16, overlapped", 896, True))
