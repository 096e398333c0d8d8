import warnings

import numpy as np
import pytest

from speeder_engine.data.dataset import Dataset
from speeder_engine.data.items import Items
from speeder_engine.data.splits import Histories, Queries, leave_one_out
from speeder_engine.errors import SpeederWarning
from speeder_engine.runs import offsets_of


def _flat(histories):
    offsets = offsets_of(np.array([len(history) for history in histories], np.int64))
    return offsets, np.array([row for history in histories for row in history], np.int32)


@pytest.fixture(scope="session")
def make_queries():
    def make(histories, targets, query_times=None):
        offsets, rows = _flat(histories)
        times = None if query_times is None else np.array(query_times, np.int64)
        targets = np.array(targets, np.int32)
        return Queries(np.arange(len(targets), dtype=np.int32), offsets, rows, None, targets, times)

    return make


@pytest.fixture(scope="session")
def make_train():
    def make(histories, times=None):
        when = None if times is None else _flat(times)[1].astype(np.int64)
        return Histories(*_flat(histories), when)

    return make


@pytest.fixture(scope="session")
def make_split():
    """Leave-one-out of users' histories and their times, over `num_items` items."""

    def make(histories, times=None, num_items=12):
        ids = tuple(f"{row:03}" for row in range(num_items))
        users = tuple(map(str, range(len(histories))))
        when = None if times is None else _flat(times)[1].astype(np.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpeederWarning)  # of histories too short for a query
            return leave_one_out(Dataset("made", Items(ids, ids, ids), users, *_flat(histories), when))

    return make
