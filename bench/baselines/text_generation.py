"""The literature's way: titles written out in the prompt, the answer's title generated greedily, in transformers.

Prompt, history, candidates, in this order, so that a returning user's keys and values can be kept up to the history:
the most a user can do for it. Weights are random: as many tokens are written as a title takes, whatever they say.
"""

from typing import Any

import torch
from baselines.base import Answer, known
from baselines.prefix_cache import cache_argument
from subject import Subject
from torch import Tensor
from workload import BenchUser

PICTURES = 64  # different ones; an item's picture is given, its encoder's time is not counted


class TextGeneration:
    """LLaRA's prompt: `Workload.text_prompt_len` tokens, `generated_tokens` written."""

    key, label = "text_generation", "transformers, titles + greedy generation (LLaRA style)"
    has_warm, heavy = True, True

    def __init__(self, subject: Subject) -> None:
        self.subject, self.lm = subject, subject.transformers()
        self.cache_argument = cache_argument(self.lm.model)
        self.users: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def answer(self, user: BenchUser) -> Answer:
        return Answer(None, len(self.write(user)))

    def write(self, user: BenchUser) -> list[int]:
        """The token ids written for a user of whom nothing is known."""
        return self._written(torch.cat([self._beginning(user), self._titles(user.candidates)]), self._cache([]))

    @torch.inference_mode()
    def warm_up(self, user: BenchUser) -> None:
        cache = self._cache([])
        self._pass(cache, inputs_embeds=self._beginning(user)[None])
        self.users[user.user_id] = [(layer.keys, layer.values) for layer in cache.layers]

    def answer_warm(self, user: BenchUser) -> Answer:
        return Answer(None, len(self.write_warm(user)))

    def write_warm(self, user: BenchUser) -> list[int]:
        """The same for one who returns with one new item: its title, the candidates' and the answer are computed."""
        rows = torch.cat([self._items((user.next_item,)), self._titles(user.candidates)])
        return self._written(rows, self._cache(known(self.users, user)))

    @torch.inference_mode()
    def _written(self, rows: Tensor, cache: Any) -> list[int]:
        """Greedily, behind rows [n, d]."""
        logits, written = self._pass(cache, inputs_embeds=rows[None]), []
        for _ in range(self.subject.workload.generated_tokens - 1):
            written.append(logits.argmax(dim=-1))
            logits = self._pass(cache, input_ids=written[-1])
        ids: list[int] = torch.cat([*written, logits.argmax(dim=-1)], dim=1)[0].tolist()
        return ids

    def _pass(self, cache: Any, **given: Any) -> Tensor:
        """The last position's logits [1, 1, V]; what was given is in the cache then."""
        given[self.cache_argument] = cache
        logits: Tensor = self.lm(**given, use_cache=True, logits_to_keep=1).logits
        return logits

    def _cache(self, layers: list[tuple[Tensor, Tensor]]) -> Any:
        """A cache of this request's own that begins with these keys and values."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.lm.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys, values, index)
        return cache

    def _beginning(self, user: BenchUser) -> Tensor:
        """Rows [n, d] of what comes before the candidates."""
        prompt = torch.arange(1, self.subject.workload.prompt_tokens + 1, device=self.subject.device)
        return torch.cat([self.lm.model.embed_tokens(prompt), self._items(user.history)])

    def _items(self, rows: tuple[int, ...]) -> Tensor:
        """Items of the history as rows [n, d]."""
        return self._titles(rows)

    def _titles(self, rows: tuple[int, ...]) -> Tensor:
        embedded: Tensor = self.lm.model.embed_tokens(self.title_ids(rows))
        return embedded

    def title_ids(self, rows: tuple[int, ...]) -> Tensor:
        """Made titles: token ids [items * title_tokens], the same for the same item."""
        items = torch.tensor(rows, dtype=torch.int64, device=self.subject.device)[:, None]
        places = torch.arange(self.subject.workload.title_tokens, device=items.device)
        ids: Tensor = (items * 7919 + places * 104_729 + 1) % self.lm.config.vocab_size
        return ids.flatten()

    def close(self) -> None:
        self.users.clear()


class MultimodalGeneration(TextGeneration):
    """The same with a picture's soft tokens before each title of the history."""

    key, label = "multimodal_generation", "transformers, titles + image tokens + greedy generation"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        generator = torch.Generator().manual_seed(subject.seed)
        size = (PICTURES, subject.workload.image_tokens, subject.config.decoder.hidden_size)
        pictures = torch.randn(size, generator=generator) * subject.config.compressor.scale
        self.pictures = pictures.to(subject.device, subject.dtype)

    def _items(self, rows: tuple[int, ...]) -> Tensor:
        titles = self._titles(rows).unflatten(0, (len(rows), -1))
        pictures = self.pictures[[row % PICTURES for row in rows]]
        return torch.cat([pictures, titles], dim=1).flatten(0, 1)
