"""TitleText: titles as token ids and back. Training and the engine both ask here, so that they mean the same answer."""

from collections.abc import Sequence
from typing import Any

from speeder_engine.config import MOST_ANSWER_IDS
from speeder_engine.errors import ConfigError


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
    """Over a `tokenizers.Tokenizer`; ids are remembered by title."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.encode("\n", add_special_tokens=False).ids:
            raise ConfigError("tokenizer: drops newlines, so that no title can end; choose a backbone whose keeps them")
        self.tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def answers(self, titles: Sequence[str]) -> list[tuple[int, ...]]:
        """Each title's ids with the newline behind it: a title nested in another still ends in a token of its own.

        None for an empty title: to end at once is the likeliest of all answers, and no item.
        """
        new = [title for title in dict.fromkeys(titles) if title not in self._known]
        texts = [f"{answer_text(title)}\n" for title in new]
        for title, encoded in zip(new, self.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            self._known[title] = tuple(encoded.ids[:MOST_ANSWER_IDS]) if answer_text(title) else ()
        return [self._known[title] for title in titles]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
