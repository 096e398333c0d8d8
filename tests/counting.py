"""A tiny data set with a rule that can be learned: item i is followed by item i + 1."""

import numpy as np

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.items import Items
from speeder_engine.encoders.features import Features
from speeder_engine.runs import offsets_of

NUM_ITEMS = 24


def make_dataset(num_users: int = 120, seed: int = 0, longest: int = 14) -> Dataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, longest, num_users)
    histories = [(rng.integers(NUM_ITEMS) + np.arange(length)) % NUM_ITEMS for length in lengths]
    vectors = {
        "text": Features(np.eye(NUM_ITEMS, dtype=np.float32), np.ones(NUM_ITEMS, bool)),
        "collaborative": Features(rng.normal(size=(NUM_ITEMS, 6)).astype(np.float32), np.ones(NUM_ITEMS, bool)),
    }
    ids = tuple(f"{i:03d}" for i in range(NUM_ITEMS))
    items = Items(ids, tuple(f"Title {i}" for i in ids), tuple(f"text of {i}" for i in ids), None, vectors)
    rows = np.concatenate(histories).astype(np.int32)
    users = tuple(f"u{u}" for u in range(num_users))
    return Dataset("counting", items, users, offsets_of(lengths), rows, np.arange(len(rows), dtype=np.int64))
