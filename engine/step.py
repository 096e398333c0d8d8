"""StepModel: one pass on tensors, from rows to what the heads answer from. The same code runs as it is and captured."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.batch import Batch, Reads
from speeder_engine.cache import KVCache
from speeder_engine.catalogue import Catalogue
from speeder_engine.runner import ModelRunner
from speeder_engine.scorer import HeadScorer
from speeder_engine.triton_kernels.keep_last import keep_last
from speeder_engine.triton_kernels.language import overlapping


@dataclass(frozen=True)
class Outcome:
    """What a pass over B sequences leaves on the device."""

    vectors: Tensor  # [B, d] user vectors
    scores: Tensor | None  # fp32 [R] of read rows under the rank head, if there is one; meant for candidates
    hidden: Tensor | None = None  # [R, d] final hidden states of the read rows, where they are kept


class StepModel:
    """Runner, heads, cache and catalogue in one function of tensors."""

    def __init__(self, runner: ModelRunner, scorer: HeadScorer, cache: KVCache, catalogue: Catalogue) -> None:
        self.runner, self.scorer = runner, scorer
        self.cache, self.catalogue = cache, catalogue

    def run(self, batch: Batch, reads: Reads) -> Outcome:
        """Counted by the runner; keeps h(last) in slots that are the step's own."""
        return self.read(self.runner.forward(batch, self.catalogue.tokens), reads)

    @torch.inference_mode()
    def read(self, hidden: Tensor, reads: Reads) -> Outcome:
        """hidden [R, d] of the read rows, text behind those of items."""
        items, kept = hidden[: reads.items.shape[0]], self.cache.last_hidden
        with overlapping(self.runner.overlap):
            last = keep_last(items, reads.last_read, reads.is_new, kept, reads.kept_slots, reads.keep_slots)
            vectors = self.scorer.user_vectors(last)
            return Outcome(vectors, self.scorer.rank_scores(items, vectors, reads), hidden)
