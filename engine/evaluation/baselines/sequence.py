"""Sequence models as baselines: fitted on the training events, stopped by the validation queries."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from speeder_engine.data.splits import Queries, Split
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence import SequenceConfig, SequenceModel
from speeder_engine.encoders.sequence_fit import fit_sequence_model
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.baselines.gru4rec import GRU4Rec, GRU4RecConfig
from speeder_engine.evaluation.baselines.hstu import HSTU, HSTUConfig
from speeder_engine.evaluation.scorer import CatalogueScorer

# settings chosen on validation; docs/results.md has the search
SASREC = SASRecConfig(dropout=0.3, epochs=30, tokens_per_batch=1024, patience=5)
SEQUENCE_MODELS: dict[str, tuple[type[SequenceModel], SequenceConfig]] = {
    "sasrec": (SASRec, SASREC),
    "gru4rec": (GRU4Rec, GRU4RecConfig(dim=128, dropout=0.5, epochs=30, tokens_per_batch=1024, patience=5)),
    "hstu": (HSTU, HSTUConfig(dim=128, dropout=0.5, epochs=30, tokens_per_batch=1024, patience=5)),
}


@dataclass(frozen=True, eq=False)
class SequenceBaseline(CatalogueScorer):
    """Scores with the hidden state of the history's last item; an empty history scores by popularity."""

    name: str
    model: SequenceModel
    uses_time = False

    @classmethod
    def fit(cls, name: str, split: Split, config: SequenceConfig | None = None) -> Self:
        """`name` is one of SEQUENCE_MODELS; `config`, None for the tuned one, is of that model's kind."""
        if name not in SEQUENCE_MODELS:
            raise ConfigError(f"no sequence model {name!r}; choose {', '.join(SEQUENCE_MODELS)}")
        kind, tuned = SEQUENCE_MODELS[name]
        config = config or tuned
        if not isinstance(config, type(tuned)):
            raise ConfigError(f"{name}: takes a {type(tuned).__name__}, not a {type(config).__name__}")
        asked = split.queries("validation")
        if not len(asked):
            raise DataError(f"{name}: no validation queries to stop by; a user needs three interactions to have one")
        train, num_items = split.train, split.dataset.num_items
        validation = (asked.offsets, asked.rows, asked.targets)
        return cls(name, fit_sequence_model(kind, config, train.offsets, train.rows, num_items, validation, name))

    def scores(self, queries: Queries) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = self.model.scores([queries.history(q) for q in range(len(queries))]).numpy()
        return scores
