"""One token per item in transformers, as a user would write it: without a cache, with a static one, and compiled.

All read the same rows as the engine does, isolate candidates with a 4-D mask at one position and answer with its rank
head; none can leave rows out of the last layer.
"""

import inspect
from typing import Any

import torch
import torch._inductor.config
from baselines.base import Answer, known
from baselines.prefix_cache import PrefixCache
from subject import PromptRows, Subject
from torch import Tensor
from workload import BenchUser

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
        self.cache_argument = "cache" if "cache" in inspect.signature(self.body.forward).parameters else _OLD_CACHE
        longest = subject.layout.instruction_len + subject.layout.config.window + workload.num_candidates
        self.cold = PrefixCache(shape, longest + BUCKET, subject.dtype, subject.device)
        self.users: dict[str, PrefixCache] = {}
        instruction = subject.model.instruction
        positions = torch.arange(len(instruction), device=subject.device)
        mask = positions <= positions[:, None]
        with torch.no_grad():
            self._run(self.cold, PromptRows(instruction, positions, mask, 0, 0))

    @torch.no_grad()
    def answer(self, user: BenchUser) -> Answer:
        return self._answer(user, self.cold, self.subject.rows(user))

    @torch.no_grad()
    def warm_up(self, user: BenchUser) -> None:
        cache = self.cold.copy()
        self._run(cache, self.subject.history_rows(user))
        self.users[user.user_id] = cache

    @torch.no_grad()
    def answer_warm(self, user: BenchUser) -> Answer:
        return self._answer(user, known(self.users, user), self.subject.rows(user, warm=True))

    def _answer(self, user: BenchUser, cache: PrefixCache, rows: PromptRows) -> Answer:
        return answer_of(self.subject, user, rows, self._run(cache, rows))

    def _run(self, cache: PrefixCache, rows: PromptRows) -> Tensor:
        """Final hidden states [N, d]; rows are padded to the bucket, padding sees the first position alone."""
        count = rows.num_rows
        padded = -(-count // self.bucket) * self.bucket
        mask = torch.zeros(1, 1, padded, cache.capacity, dtype=torch.bool, device=self.subject.device)
        mask[0, 0, :count, : rows.past + count] = rows.mask
        mask[0, 0, count:, 0] = True
        embeddings, positions = rows.embeddings[None], rows.positions[None]
        if padded > count:
            embeddings = torch.nn.functional.pad(embeddings, (0, 0, 0, padded - count))
            positions = torch.nn.functional.pad(positions, (0, padded - count))
        cache.slots = torch.arange(rows.past, rows.past + padded, device=self.subject.device)
        return self._pass(embeddings, positions, mask, cache)[0, :count]

    def _pass(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: PrefixCache) -> Tensor:
        given: dict[str, Any] = {"position_ids": positions, "attention_mask": mask, self.cache_argument: cache}
        hidden: Tensor = self.body(inputs_embeds=embeddings, use_cache=True, **given).last_hidden_state
        return hidden

    def close(self) -> None:
        self.users.clear()


_OLD_CACHE = "past_key_values"


class Compiled(StaticPrefix):
    """The same under torch.compile, weights frozen into the graph (on a CPU they are packed for its matmuls)."""

    key, label = "transformers_compiled", "transformers, static cache + 4-D mask, torch.compile"
    bucket = BUCKET

    def __init__(self, subject: Subject) -> None:
        self._compiled: Any = None
        super().__init__(subject)
        torch._dynamo.reset()
        self.freezing = subject.device.type == "cpu"
        self._compiled = torch.compile(super()._pass, dynamic=False)

    def _pass(self, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: PrefixCache) -> Tensor:
        if self._compiled is None:  # the instruction's only pass
            return super()._pass(embeddings, positions, mask, cache)
        with torch._inductor.config.patch(freezing=self.freezing):
            hidden: Tensor = self._compiled(embeddings, positions, mask, cache)
        return hidden

    def close(self) -> None:
        super().close()
        self._compiled = None
        torch._dynamo.reset()


def answer_of(subject: Subject, user: BenchUser, rows: PromptRows, hidden: Tensor) -> Answer:
    """hidden [N, d] of all rows -> the candidates' scores."""
    return Answer(subject.rank(hidden[rows.num_new - 1], hidden[rows.num_new :], user.candidates))
