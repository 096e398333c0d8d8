"""SASRec that knows when: embeddings of each interaction's week, and of the week that is asked about, if it is told."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.data.splits import Queries, Split
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence import SCORED_AT_ONCE
from speeder_engine.encoders.sequence_fit import ndcg_at_10, optimise
from speeder_engine.encoders.windows import by_length, cut_windows, gather, pad_right
from speeder_engine.errors import DataError
from speeder_engine.evaluation.baselines.sequence import SASREC
from speeder_engine.evaluation.scorer import CatalogueScorer

SECONDS_A_WEEK = 7 * 86_400


class WeekSASRec(nn.Module):
    """Adds to each input the embedding of its own week.

    With `reads_query` also that of the week of the next interaction, at the end that of the query.
    """

    def __init__(self, num_items: int, num_weeks: int, config: SASRecConfig, reads_query: bool) -> None:
        super().__init__()
        self.sasrec = SASRec(num_items, config)
        self.taken = nn.Embedding(num_weeks, config.dim)
        self.asked = nn.Embedding(num_weeks, config.dim) if reads_query else None
        for table in filter(None, (self.taken, self.asked)):
            nn.init.normal_(table.weight, std=config.dim**-0.5)

    def forward(self, rows: Tensor, taken: Tensor, asked: Tensor) -> Tensor:
        """Item rows and two weeks, int64 [batch, length] each -> hidden [batch, length, dim]."""
        weeks = self.taken(taken) if self.asked is None else self.taken(taken) + self.asked(asked)
        return self.sasrec(rows, weeks)  # type: ignore[no-any-return]

    def loss(self, rows: Tensor, weeks: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """Mean cross-entropy over the real positions of some windows of the events' `rows` and `weeks` [N]."""
        inputs, real, targets = gather(rows, starts, lengths)
        taken, _, following = gather(weeks, starts, lengths)
        asked = torch.zeros_like(taken)
        asked[real] = following
        return F.cross_entropy(self.sasrec.logits(self(inputs, taken, asked)[real]), targets)


@dataclass(frozen=True, eq=False)
class SASRecWeeks(CatalogueScorer):
    """Scores with the hidden state of the history's last item; an empty history scores by popularity.

    Reads the weeks of the history's interactions, never the query's. Weeks count from that of the first training event;
    what is earlier or later than all of them counts as the nearest.
    """

    model: WeekSASRec
    first_time: int
    name: ClassVar[str] = "sasrec_weeks"
    uses_time: ClassVar[bool] = False

    @classmethod
    def fit(cls, split: Split, config: SASRecConfig = SASREC) -> Self:
        """Trained on the training events, stopped by the validation queries; equal seeds give equal weights."""
        train, queries = split.train, split.queries("validation")
        if train.times is None:
            raise DataError(f"{cls.name}: the interactions have no times; give a time column or leave it out")
        starts, lengths = cut_windows(train.offsets, config.window)
        if not len(queries) or not len(starts):
            raise DataError(f"{cls.name}: no validation queries to stop by; a user needs three interactions")
        first = int(train.times.min())
        num_weeks = int(train.times.max() - first) // SECONDS_A_WEEK + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fitted = cls(WeekSASRec(split.dataset.num_items, num_weeks, config, cls.uses_time), first)
            rows, weeks = torch.from_numpy(train.rows.astype(np.int64)), fitted.weeks(train.times)
            optimise(
                fitted.model,
                config,
                lambda starts, lengths: fitted.model.loss(rows, weeks, starts, lengths),
                starts,
                lengths,
                lambda: fitted.validated(queries),
                cls.name,
            )
        fitted.model.eval()
        return fitted

    def validated(self, queries: Queries) -> float:
        """NDCG@10 over the items that a history has not."""
        asked = (queries.offsets, queries.rows, queries.targets)
        return ndcg_at_10(lambda users: self.scores(queries.slice(users.start, users.stop)), asked)

    @torch.inference_mode()
    def scores(self, queries: Queries) -> NDArray[np.float32]:
        if queries.times is None or (self.uses_time and queries.query_times is None):
            raise DataError(f"{self.name}: the queries have no times; evaluate on data with a time column")
        self.model.eval()
        scores = self.model.sasrec.bias.detach().repeat(len(queries), 1)
        told = np.flatnonzero(queries.lengths)
        for places in by_length(queries.lengths[told], SCORED_AT_ONCE):
            chosen = told[places]
            scores[chosen] = self.model.sasrec.logits(self.last_hidden(queries, chosen))
        found: NDArray[np.float32] = scores.numpy()
        return found

    def last_hidden(self, queries: Queries, chosen: NDArray[np.int64]) -> Tensor:
        """[n, dim] of the queries `chosen` [n], whose histories are not empty."""
        assert queries.times is not None
        window = self.model.sasrec.config.window
        spans = [
            slice(max(queries.offsets[q], queries.offsets[q + 1] - window), queries.offsets[q + 1]) for q in chosen
        ]
        rows, lengths = pad_right([queries.rows[span] for span in spans])
        taken, _ = pad_right([queries.times[span] for span in spans])
        asked = taken
        if self.uses_time:
            assert queries.query_times is not None
            ends = queries.query_times[chosen]
            asked, _ = pad_right(
                [np.append(queries.times[span][1:], end) for span, end in zip(spans, ends, strict=True)]
            )
        hidden = self.model(rows, self.weeks(taken.numpy()), self.weeks(asked.numpy()))
        return hidden[torch.arange(len(chosen)), lengths - 1]  # type: ignore[no-any-return]

    def weeks(self, times: NDArray[np.int64]) -> Tensor:
        """int64 of the same shape: the row of each time's week in the embeddings."""
        last = self.model.taken.num_embeddings - 1
        return torch.from_numpy(np.clip((times - self.first_time) // SECONDS_A_WEEK, 0, last))


class SASRecTime(SASRecWeeks):
    """Reads the week of the query too; at earlier positions that of the next interaction, never a later one's."""

    name: ClassVar[str] = "sasrec_time"
    uses_time: ClassVar[bool] = True


WEEK_MODELS: dict[str, type[SASRecWeeks]] = {kind.name: kind for kind in (SASRecWeeks, SASRecTime)}
