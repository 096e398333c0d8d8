"""Scores of the whole catalogue and their top k.

score_bi = u_b . z_i + prior_i      masked items are -inf
top k by score, equal scores by row
"""

import torch
from torch import Tensor


def top_scores(vectors: Tensor, table: Tensor, prior: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """vectors [B, d], table [I, d], prior [I] (already weighted), mask bool [B, I]: true is never answered. Vectors
    behind the B of the mask are padding.

    Returns scores [B, k'] in fp32, descending, and rows [B, k'] with k' = min(k, I); masked ones are -inf.
    """
    return top_scores_ref(vectors, table, prior, mask, k)


def top_scores_ref(vectors: Tensor, table: Tensor, prior: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = ((vectors @ table.T)[: len(mask)].float() + prior.float()).masked_fill(mask, float("-inf"))
    return stable_top(scores, min(k, scores.shape[1]))


def stable_top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk with its freedom taken away: among equal scores the lowest rows win, in order."""
    values, rows = scores.topk(k, dim=1)
    threshold = values[:, -1:]
    torn = (scores == threshold).sum(dim=1) > (values == threshold).sum(dim=1)
    for b in torch.nonzero(torn).flatten().tolist():
        above = rows[b, values[b] > threshold[b]]
        level = torch.nonzero(scores[b] == threshold[b]).flatten()[: k - len(above)]
        rows[b] = torch.cat([above, level])
        values[b] = scores[b, rows[b]]
    by_row = rows.argsort(dim=1)
    values, rows = values.gather(1, by_row), rows.gather(1, by_row)
    by_score = torch.argsort(values, dim=1, descending=True, stable=True)
    return values.gather(1, by_score), rows.gather(1, by_score)
