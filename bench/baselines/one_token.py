"""One token per item in transformers, as a user would write it: without a cache, with a static one, and compiled.

All read the same rows as the engine does, isolate candidates with a 4-D mask at one position and answer with its rank
head; none can leave rows out of the last layer.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from baselines.base import Answer, known
from baselines.prefix_cache import PrefixCache, cache_argument
from subject import PromptRows, Subject
from torch import Tensor
from workload import BenchUser

Pass = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BUCKET = 8  # rows are padded to it for the compiled model, whose shapes are fixed


class Uncached:
    """The whole prompt, instruction included, in one pass."""

    key, label = "transformers", "transformers, one token an item, no cache"
    has_warm, heavy = False, False

    def __init__(self, subject: Subject) -> None:
        self.subject, self.body = subject, subject.transformers().model

    def answer(self, user: BenchUser) -> Answer:
        return self._answer(user, self.subject.rows(user, whole=True))

    def warm_up(self, user: BenchUser) -> None:
        """Nothing is kept."""

    def answer_warm(self, user: BenchUser) -> Answer:
        return self._answer(user, self.subject.rows(user, warm=True, whole=True))

    @torch.inference_mode()
    def _answer(self, user: BenchUser, rows: PromptRows) -> Answer:
        made = self.body(
            inputs_embeds=rows.embeddings[None],
            position_ids=rows.positions[None],
            attention_mask=rows.mask[None, None],
            use_cache=False,
        )
        return answer_of(self.subject, user, rows, made.last_hidden_state[0])

    def close(self) -> None:
        self.body = None


class SeparatePrompts(Uncached):
    """A prompt a candidate, each with the whole history: a batch of plain causal prompts."""

    key, label = "separate_prompts", "transformers, one prompt a candidate"
    heavy = True

    @torch.inference_mode()
    def _answer(self, user: BenchUser, rows: PromptRows) -> Answer:
        prefix = rows.embeddings[: rows.num_new].expand(rows.num_candidates, -1, -1)
        prompts = torch.cat([prefix, rows.embeddings[rows.num_new :, None]], dim=1)
        hidden = self.body(inputs_embeds=prompts, use_cache=False).last_hidden_state
        return Answer(self.subject.rank(hidden[0, -2], hidden[:, -1], user.candidates))


class StaticPrefix:
    """Instruction, and a returning user's history, stay in a static cache; the rest is one pass behind it."""

    key, label = "transformers_static", "transformers, static cache + 4-D mask, eager"
    has_warm, heavy = True, False
    bucket = 1

    def __init__(self, subject: Subject) -> None:
        workload, shape = subject.workload, subject.config.decoder
        self.subject, self.body = subject, subject.transformers().model
        self.cache_argument = cache_argument(self.body)
        longest = subject.layout.instruction_len + subject.layout.config.window + workload.num_candidates
        self.cache = PrefixCache(shape, longest + BUCKET, subject.dtype, subject.device)
        self.users: dict[str, Tensor] = {}  # what the cache held after a user's history
        instruction = subject.model.instruction
        positions = torch.arange(len(instruction), device=subject.device)
        mask = positions <= positions[:, None]
        with torch.no_grad():
            self._run(PromptRows(instruction, positions, mask, 0, 0), self._eager)

    @torch.no_grad()
    def answer(self, user: BenchUser) -> Answer:
        return self._answer(user, self.subject.rows(user))

    @torch.no_grad()
    def warm_up(self, user: BenchUser) -> None:
        self._run(self.subject.history_rows(user), self._eager)
        self.users[user.user_id] = self.cache.stored.clone()

    @torch.no_grad()
    def answer_warm(self, user: BenchUser) -> Answer:
        self.cache.stored.copy_(known(self.users, user))
        return self._answer(user, self.subject.rows(user, warm=True))

    def _answer(self, user: BenchUser, rows: PromptRows) -> Answer:
        return answer_of(self.subject, user, rows, self._run(rows, self._pass))

    def _run(self, rows: PromptRows, forward: Pass) -> Tensor:
        """Final hidden states [N, d]; rows are padded to the bucket, padding sees the first position alone."""
        count = rows.num_rows
        padded = -(-count // self.bucket) * self.bucket
        mask = torch.zeros(1, 1, padded, self.cache.capacity, dtype=torch.bool, device=self.subject.device)
        mask[0, 0, :count, : rows.past + count] = rows.mask
        mask[0, 0, count:, 0] = True
        embeddings, positions = rows.embeddings[None], rows.positions[None]
        if padded > count:
            embeddings = torch.nn.functional.pad(embeddings, (0, 0, 0, padded - count))
            positions = torch.nn.functional.pad(positions, (0, padded - count))
        slots = torch.arange(rows.past, rows.past + padded, device=self.subject.device)
        return forward(embeddings, positions, mask, slots)[0, :count]

    def _eager(self, embeddings: Tensor, positions: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        self.cache.slots = slots
        given: dict[str, Any] = {"position_ids": positions, "attention_mask": mask, self.cache_argument: self.cache}
        hidden: Tensor = self.body(inputs_embeds=embeddings, use_cache=True, **given).last_hidden_state
        return hidden

    _pass = _eager

    def close(self) -> None:
        self.users.clear()


class Compiled(StaticPrefix):
    """The same under torch.compile: on a CPU with the weights frozen into the graph, which packs them for its matmuls,
    on a GPU in CUDA graphs."""

    key, label = "transformers_compiled", "transformers, static cache + 4-D mask, torch.compile"
    bucket = BUCKET

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        torch._dynamo.reset()
        self.on_cpu = subject.device.type == "cpu"
        if not self.on_cpu:
            for buffer in (*self.cache.keys, *self.cache.values):
                torch._dynamo.mark_static_address(buffer)
        self._compiled = torch.compile(self._eager, dynamic=False, mode=None if self.on_cpu else "reduce-overhead")

    def _pass(self, embeddings: Tensor, positions: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=self.on_cpu):
            hidden: Tensor = self._compiled(embeddings, positions, mask, slots)
        return hidden

    def close(self) -> None:
        super().close()
        torch._dynamo.reset()


def answer_of(subject: Subject, user: BenchUser, rows: PromptRows, hidden: Tensor) -> Answer:
    """hidden [N, d] of all rows -> the candidates' scores."""
    return Answer(subject.rank(hidden[rows.num_new - 1], hidden[rows.num_new :], user.candidates))
