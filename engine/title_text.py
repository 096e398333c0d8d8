"""TitleText: titles as token ids and back. Training and the engine both ask here, so that they mean the same answer."""

from collections.abc import Sequence
from typing import Any

from speeder_engine.config import MOST_ANSWER_IDS
from speeder_engine.errors import ConfigError, DataError, shown


def answer_text(title: str) -> str:
    """What a model answers for an item: its title on one line, without the newline that ends it."""
    return " ".join(title.split())


def rows_by_answer(titles: Sequence[str]) -> dict[str, list[int]]:
    """Which rows an answer may mean, in order; an empty one means none, untitled items though there may be."""
    rows: dict[str, list[int]] = {}
    for row, title in enumerate(titles):
        rows.setdefault(answer_text(title), []).append(row)
    rows.pop("", None)
    return rows


class TitleText:
    """Over a `tokenizers.Tokenizer`, for a model with so many words; ids are remembered by title."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        if not tokenizer.encode("\n", add_special_tokens=False).ids:
            raise ConfigError("tokenizer: drops newlines, so that no title can end; choose a backbone whose keeps them")
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._known: dict[str, tuple[int, ...]] = {}

    def answers(self, titles: Sequence[str]) -> list[tuple[int, ...]]:
        """Each title's ids with the newline behind it: a title nested in another still ends in a token of its own.

        None for an empty title: to end at once is the likeliest of all answers, and no item. Raises DataError for a
        title that the tokenizer, but not the model, has a word for.
        """
        new = [title for title in dict.fromkeys(titles) if title not in self._known]
        texts = [f"{answer_text(title)}\n" for title in new]
        for title, encoded in zip(new, self.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = tuple(encoded.ids[:MOST_ANSWER_IDS]) if answer_text(title) else ()
            if max(ids, default=0) >= self.vocab_size:
                beyond = f"the tokenizer writes it with token {max(ids)}, the vocabulary ends at {self.vocab_size - 1}"
                raise DataError(f"title {shown(title)}: {beyond}; give another title, or the tokenizer of this model")
            self._known[title] = ids
        return [self._known[title] for title in titles]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
