"""How well a title head stands between two epochs: the probability of held-out titles, token by token."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from speeder_engine.data.splits import Queries
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.prompt import isolated_mask
from speeder_engine.training.title_loss import title_log_probs, title_rows
from speeder_engine.training.title_targets import TitleTargets

QUERIES_AT_ONCE = 256


@torch.no_grad()
def title_probability(scorer: ModelScorer, queries: Queries, titles: TitleTargets) -> float:
    """The geometric mean, within 0..1, over all tokens of the targets' titles; 0 where no target has a title."""
    scorer.model.eval()
    total, count = 0.0, 0
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        log_probs = _log_probs(scorer, queries.slice(start, start + QUERIES_AT_ONCE), titles)
        total, count = total + float(log_probs.sum()), count + len(log_probs)
    return math.exp(total / count) if count else 0.0


def _log_probs(scorer: ModelScorer, queries: Queries, titles: TitleTargets) -> Tensor:
    """fp32 [N] of every token of the targets' titles, behind the queries' histories."""
    model, prompt = scorer.model, scorer.model.config.prompt
    histories, seconds = [queries.history(q) for q in range(len(queries))], queries.times
    times = None if seconds is None else [seconds[start:end] for start, end in pairwise(queries.offsets)]
    rows, lengths, buckets = scorer.window(histories, times)
    ids = torch.from_numpy(titles.of(queries.targets.astype(np.int64)[:, None])).to(rows.device)
    text = title_rows(model, lengths.unsqueeze(1), ids)
    num_prefix = len(prompt.instruction_ids) + prompt.rows_per_item * rows.shape[1]
    embeddings = model.instruction(len(queries)), model.history(scorer.tokens[rows], buckets), text.embeddings
    positions = torch.arange(num_prefix, device=rows.device).expand(len(queries), -1), text.positions
    mask = isolated_mask(num_prefix, text.visible)
    mask[..., num_prefix:, num_prefix:] = text.inner
    hidden = model(torch.cat(embeddings, dim=1), torch.cat(positions, dim=1), mask)
    return title_log_probs(model, hidden[:, num_prefix:], ids)
