"""The collaborative signal: the item vectors of a SASRec that was fitted on training histories."""

import numpy as np

from speeder_engine.encoders.features import Features
from speeder_engine.encoders.sasrec import SASRec, SASRecConfig
from speeder_engine.encoders.sequence_fit import fit_sequence_model
from speeder_engine.encoders.windows import Ints


def fit_collaborative(offsets: Ints, rows: Ints, num_items: int, config: SASRecConfig | None = None) -> Features:
    """Of the histories `rows[offsets[u]:offsets[u + 1]]` (int64 [U + 1], int32 [N], oldest first): float32 [num_items,
    dim]. Items without any training event are not present."""
    title = "collaborative encoder (SASRec)"
    model = fit_sequence_model(SASRec, config or SASRecConfig(), offsets, rows, num_items, title=title)
    vectors, seen = model.items.weight.detach().numpy(), np.bincount(rows, minlength=num_items) > 0
    return Features.of_present(vectors[seen], seen)
