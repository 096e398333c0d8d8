"""Scores of candidates that are named, one by one.

retrieve   score_r = u . z + beta prior                            u the user's vector, z the item's token
rank       score_r = w . h_r + b + alpha u . z + beta prior        h_r the candidate's own final hidden state

-inf for an item that is not available.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from speeder_engine.triton_kernels.add_rms_norm import row_options
from speeder_engine.triton_kernels.language import await_others, on, overlap_options, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen


class CandidateTable(NamedTuple):
    """What candidates are looked up in."""

    tokens: Tensor  # [I, d]
    prior: Tensor  # [I]
    available: Tensor  # bool [I]
    beta: Tensor  # [] what the head multiplies the prior with


class RankedRows(NamedTuple):
    """Candidates that are rows of their own, and the head that reads them."""

    hidden: Tensor  # [R, d]
    weight: Tensor  # [d]
    bias: Tensor  # []
    alpha: Tensor  # []


def candidate_scores(
    vectors: Tensor, users: Tensor, items: Tensor, table: CandidateTable, ranked: RankedRows | None = None
) -> Tensor:
    """User vectors [B, d], int64 [R] whose and which item -> fp32 [R]."""
    if runs_triton(vectors, *table, *(ranked or ())):
        with on(vectors.device):
            return launch_candidate_scores(vectors, users, items, table, ranked)
    return candidate_scores_ref(vectors, users, items, table, ranked)


def candidate_scores_ref(
    vectors: Tensor, users: Tensor, items: Tensor, table: CandidateTable, ranked: RankedRows | None = None
) -> Tensor:
    """Sums over d in fp32, not products of matrices: a candidate's arithmetic must not depend on how many stand beside
    it, and in a lower type equals would be made of candidates."""
    scores = (vectors[users].float() * table.tokens[items].float()).sum(dim=-1)
    if ranked is not None:
        own = (ranked.hidden.float() * ranked.weight.float()).sum(dim=-1)
        scores = own + ranked.bias.float() + ranked.alpha.float() * scores
    scores = scores + table.beta.float() * table.prior[items].float()
    return scores.masked_fill(~table.available[items], float("-inf"))


@triton.jit
def _candidate_scores_kernel(
    vectors, users, items, tokens, prior, available, beta, hidden, weight, bias, alpha, out, size,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    await_others(OVERLAP)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    valid = column < size
    user, item = tl.load(users + row).to(tl.int64), tl.load(items + row).to(tl.int64)
    products = tl.load(vectors + user * size + column, mask=valid, other=0.0).to(tl.float32)
    products = products * tl.load(tokens + item * size + column, mask=valid, other=0.0).to(tl.float32)
    score = tl.sum(products, axis=0)
    if hidden is not None:
        own = tl.load(hidden + row * size + column, mask=valid, other=0.0).to(tl.float32)
        own = own * tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
        score = tl.sum(own, axis=0) + tl.load(bias).to(tl.float32) + tl.load(alpha).to(tl.float32) * score
    score += tl.load(beta).to(tl.float32) * tl.load(prior + item).to(tl.float32)
    tl.store(out + row, tl.where(tl.load(available + item) != 0, score, float("-inf")))


def launch_candidate_scores(
    vectors: Tensor, users: Tensor, items: Tensor, table: CandidateTable, ranked: RankedRows | None = None
) -> Tensor:
    (num_rows,), size = users.shape, vectors.shape[1]
    for each in (vectors, table.tokens, *(() if ranked is None else (ranked.hidden,))):
        assert each.shape[1] == size and each.is_contiguous()
    for each in (users, items):
        assert each.shape == (num_rows,) and each.is_contiguous()
    assert table.available.dtype == torch.bool and table.prior.is_contiguous() and table.available.is_contiguous()
    assert ranked is None or (ranked.weight.shape == (size,) and ranked.weight.is_contiguous())
    assert ranked is None or ranked.hidden.shape[0] == num_rows
    out = torch.empty(num_rows, dtype=torch.float32, device=vectors.device)
    if num_rows:
        _candidate_scores_kernel[(num_rows,)](
            vectors, users, items, *table, *(ranked or (None, None, None, None)), out, size, **row_options(size),
            **overlap_options(vectors.device),
        )  # fmt: skip
    return out


def _specimen(label: str, size: int, ranked: bool, overlap: bool = False) -> Specimen:
    options = row_options(size)
    types: dict[str, str | None] = dict.fromkeys(("vectors", "tokens", "beta"), "*bf16")
    types |= {"users": "*i64", "items": "*i64", "prior": "*fp32", "available": "*i1", "out": "*fp32"}
    types |= dict.fromkeys(("hidden", "weight", "bias", "alpha"), "*bf16" if ranked else None)
    arguments = {**types, "size": "i32:16", "BLOCK": options["BLOCK"], "OVERLAP": overlap}
    since = 90 if overlap else 80
    return Specimen(label, _candidate_scores_kernel, arguments, num_warps=options["num_warps"], since=since)


SPECIMENS = (
    _specimen("0.5B bf16, ranked", 896, True),
    _specimen("0.5B bf16, ranked, overlapped", 896, True, overlap=True),
    _specimen("7B bf16, retrieved", 3584, False),
)
