"""TitleTargets: which titles a batch of segments answers with, and after how many items each is asked for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import DataError
from speeder_engine.runs import offsets_of
from speeder_engine.title_text import TitleText, answer_text

Ints = NDArray[np.int64]


class TitleTargets:
    """Every item's title as the token ids that answer with it; an item without a title is no answer."""

    def __init__(self, titles: Sequence[str], text: TitleText, per_segment: int = 1) -> None:
        refuse_untitled(titles)
        answers = text.answers(titles)
        self.lengths = np.array([len(ids) for ids in answers], dtype=np.int64)
        self.ids = np.array([token for ids in answers for token in ids], dtype=np.int64)
        self.starts = offsets_of(self.lengths)[:-1]
        self.per_segment = per_segment

    def draw(self, targets: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Cuts [B, K] and titles [B, K, T] out of targets [B, L + 1], of which a negative one is none.

        Up to K of a segment's targets, none twice: after the first `cut` items the title is that of targets[cut].
        Cuts and ids are -1 where there is nothing.
        """
        open_to_draw = (targets >= 0) & (self.lengths[targets] > 0)
        keys = np.where(open_to_draw, rng.random(targets.shape), np.inf)
        cuts = np.argsort(keys, axis=1, kind="stable")[:, : self.per_segment]
        cuts = np.where(np.take_along_axis(open_to_draw, cuts, axis=1), cuts, -1)
        items = np.where(cuts < 0, -1, np.take_along_axis(targets, cuts, axis=1))
        return cuts, self.of(items)

    def of(self, items: Ints) -> Ints:
        """Titles [..., T] of items [...], -1 behind their last token and all along for a negative item."""
        lengths = np.where(items >= 0, self.lengths[items], 0)
        columns = np.arange(max(1, int(lengths.max(initial=0))))
        at = self.starts[items][..., None] + columns
        inside = columns < lengths[..., None]
        return np.where(inside, self.ids[np.where(inside, at, 0)], -1)


def refuse_untitled(titles: Sequence[str]) -> None:
    """DataError where no item has a title: the title head would have nothing to learn."""
    if not any(map(answer_text, titles)):
        raise DataError("items: none has a title, so that heads.title can't be trained; leave it out of the recipe")
