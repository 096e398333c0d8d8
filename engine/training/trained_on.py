"""What a run was trained on, as its checkpoint keeps it: settings, and what a resumed run compares."""

import hashlib
from typing import Any

from speeder_engine.data.splits import Split
from speeder_engine.training.config import TrainingConfig


def trained_on(split: Split, config: TrainingConfig) -> dict[str, Any]:
    """`data` is blind to the order of users and items and knows no times; `events` is neither."""
    train = split.train
    parts = (train.offsets, train.rows, *(() if train.times is None else (train.times,)))
    events = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    return {"config": config.to_json(), "data": split.dataset.fingerprint(), "events": events}
