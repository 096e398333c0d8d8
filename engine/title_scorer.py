"""How likely titles are as the answer: final hidden states of trie rows -> a score a candidate.

    score_c = sum over the tokens t of c's title, its newline too, of log p(t | history, question, tokens before t)

or the mean. It is a likelihood: no prior is added, which is learned for scores of another size. A candidate without a
title has none (-inf), as an unavailable one.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from speeder_engine.batch import pad_to_tile
from speeder_engine.config import ROW_TILE
from speeder_engine.models.recommender import ServingModel
from speeder_engine.title import Ints, TitleTrie

LOGITS_AT_ONCE = 1 << 24  # 64 MiB of them


def title_scores(model: ServingModel, tries: Sequence[TitleTrie], hidden: Sequence[Tensor]) -> list[Tensor]:
    """fp32 [C] of each trie's candidates, -inf where there is no title; hidden[b] [R, d] are the trie's rows from
    `first_read` on."""
    if not tries:
        return []
    starts = accumulate([len(rows) for rows in hidden], initial=0)
    rows = [trie.edge_rows - trie.first_read + start for trie, start in zip(tries, starts, strict=False)]
    tokens = [trie.edge_tokens for trie in tries]
    edges = _log_probs(model, torch.cat(list(hidden)), np.concatenate(rows), np.concatenate(tokens))
    scores = []
    for trie, log_probs in zip(tries, torch.split(edges, [len(each) for each in tokens]), strict=True):
        answers = torch.from_numpy(trie.answers).to(log_probs.device)
        total = log_probs.new_zeros(len(answers), dtype=torch.float64)
        # token after token: a sum must not depend on how long the longest title beside it is
        for edge in answers.unbind(dim=1):
            total += log_probs[edge.clamp(min=0)].masked_fill(edge < 0, 0.0)
        lengths = (answers >= 0).sum(dim=1)
        if model.config.heads.title_score == "mean":
            total /= lengths
        scores.append(total.masked_fill(lengths == 0, float("-inf")).float())
    return scores


def _log_probs(model: ServingModel, hidden: Tensor, rows: Ints, tokens: Ints) -> Tensor:
    """fp32 [E]: log p(tokens[e]) after row rows[e] of hidden [R, d]; the vocabulary is scored a few rows at a time."""
    out = torch.empty(len(rows), device=hidden.device)
    row_of, token_of = (torch.from_numpy(each).to(hidden.device) for each in (rows, tokens))
    at_once = max(1, LOGITS_AT_ONCE // model.config.decoder.vocab_size // ROW_TILE) * ROW_TILE
    for start in range(0, hidden.shape[0], at_once):
        logits = model.logits(pad_to_tile(hidden[start : start + at_once])).float()
        here = ((row_of >= start) & (row_of < start + at_once)).nonzero().squeeze(1)
        out[here] = logits.log_softmax(dim=-1)[row_of[here] - start, token_of[here]]
    return out
