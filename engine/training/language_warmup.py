"""A small decoder from scratch reads the catalogue before it learns to recommend: next-token prediction on its text."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.progress import progress_bar
from speeder_engine.training.config import BackboneConfig

ROW_LEN = 128
ROWS_AT_ONCE = 16
WARMUP_SHARE = 0.05  # of the steps, while the rate rises
log = logging.getLogger("speeder_engine")


def warm_up(body: nn.Module, tokenizer: Any, texts: Sequence[str], config: BackboneConfig, seed: int) -> None:
    """Trains `body` in place for `config.warmup_epochs`, its embeddings scoring the next token (a tied head).

    The same seed gives the same weights. Without texts there is nothing to read, and nothing is done.
    """
    if not (config.warmup_epochs and texts):
        return
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    device = next(body.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lines = encoded_lines(tokenizer, texts)
    num_rows = len(packed_rows(lines, torch.arange(len(lines))))
    steps = config.warmup_epochs * -(-num_rows // ROWS_AT_ONCE)
    optimizer = torch.optim.AdamW(body.parameters(), lr=config.warmup_learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP_SHARE * steps), int(1.05 * steps))
    body.train()
    with progress_bar() as progress:
        task = progress.add_task("language warm-up", total=steps, note="")
        for epoch in range(config.warmup_epochs):
            rows = packed_rows(lines, torch.randperm(len(lines), generator=generator)).to(device)
            total = 0.0
            for part in torch.split(rows, ROWS_AT_ONCE):
                loss = next_token_loss(body, part)
                loss.backward()
                nn.utils.clip_grad_norm_(body.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                total += float(loss.detach()) * len(part)
                progress.update(task, advance=1, note=f"loss {float(loss.detach()):.3f}")
            log.info("language warm-up, epoch %d: loss %.3f", epoch + 1, total / len(rows))


def encoded_lines(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's token ids, a line and an end."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer([f"{text}\n" for text in texts], add_special_tokens=False)["input_ids"]
    return [[*ids, *end] for ids in encoded]


def packed_rows(lines: Sequence[Sequence[int]], order: Tensor) -> Tensor:
    """The lines one behind the other in this order, cut into rows: int64 [N, ROW_LEN + 1].

    A row's last token is the next one's first, so that every token is predicted once; the last row reaches back to
    be as long as the others.
    """
    flat = torch.tensor([token for i in order.tolist() for token in lines[i]], dtype=torch.int64)
    length = min(ROW_LEN, len(flat) - 1)
    last = len(flat) - 1 - length
    starts = [*range(0, last, length), last]
    return torch.stack([flat[start : start + length + 1] for start in starts])


def next_token_loss(body: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of each token but the first of rows [N, L + 1], after those before it in its row."""
    embedding: nn.Module = body.get_input_embeddings()  # type: ignore[operator]
    hidden = body(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = F.linear(hidden, embedding.weight).float()  # type: ignore[arg-type]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
