"""The title head in training: text rows of the one forward pass, and the loss they give.

    [instruction] [z_1 + p_1] ... [z_cut + p_cut] [question] [title]

is a prompt as the engine scores it (`title.py`, `text_rows.py`). A row of text sees instruction, the first `cut` items
and its own text up to itself: nothing of candidates, pairs and other titles, and no padding lies between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from speeder_engine.models.recommender import Recommender
from speeder_engine.models.vocabulary import Vocabulary
from speeder_engine.training.batches import PAD

MOST_LOGITS = 2**26  # held at once: 256 MiB; a batch of titles over a vocabulary of 150,000 would be gigabytes


@dataclass(frozen=True)
class TitleRows:
    """E = K * (Q + T - 1) rows of K titles a segment: the question, and the title but for its last token."""

    embeddings: Tensor  # [B, E, d]
    positions: Tensor  # int64 [B, E]
    visible: Tensor  # int64 [B, E]: how many rows of instruction and history each sees
    inner: Tensor  # bool [E, E]: who sees whom (dim 1) among them


def title_rows(model: Recommender, cuts: Tensor, titles: Tensor) -> TitleRows:
    """Of cuts [B, K] and titles [B, K, T]."""
    prompt, device = model.config.prompt, cuts.device
    question = torch.tensor(prompt.question_ids, device=device).expand(*cuts.shape, -1)
    ids = torch.cat([question, titles[..., :-1].clamp(min=0)], dim=-1)
    num_titles, each = ids.shape[1:]
    visible = len(prompt.instruction_ids) + prompt.rows_per_item * cuts.clamp(min=0)
    title = torch.arange(num_titles * each, device=device) // each
    return TitleRows(
        embeddings=model.vocabulary().embed(ids.flatten(1)),
        positions=(visible.unsqueeze(-1) + torch.arange(each, device=device)).flatten(1),
        visible=visible.repeat_interleave(each, dim=1),
        inner=(title == title.unsqueeze(1)).tril(),
    )


def title_log_probs(model: Recommender, hidden: Tensor, titles: Tensor) -> Tensor:
    """fp32 [N]: log p of every token of titles [B, K, T], newlines too, after final hidden states [B, E, d]."""
    batch_size, num_titles, longest = titles.shape
    read = hidden.reshape(batch_size, num_titles, -1, hidden.shape[-1])[:, :, -longest:]
    kept, vocabulary = titles != PAD, model.vocabulary()
    rows, ids = read[kept], titles[kept]
    size = max(MOST_LOGITS // vocabulary.embedding.shape[0], 1)
    if len(rows) <= size:
        return _log_probs(vocabulary, rows, ids)
    # logits of a part are forgotten and computed again in the backward pass
    parts = zip(torch.split(rows, size), torch.split(ids, size), strict=True)
    return torch.cat([checkpoint(_log_probs, vocabulary, *part, use_reentrant=False) for part in parts])


def _log_probs(vocabulary: Vocabulary, rows: Tensor, ids: Tensor) -> Tensor:
    return -F.cross_entropy(vocabulary.logits(rows).float(), ids, reduction="none")


def title_loss(model: Recommender, hidden: Tensor, titles: Tensor) -> Tensor:
    """The mean cross-entropy of a token; zero where no segment has a title."""
    log_probs = title_log_probs(model, hidden, titles)
    return -log_probs.sum() / max(len(log_probs), 1)
