import numpy as np
import pytest

from speeder_engine.data.runs import offsets_of
from speeder_engine.data.splits import Histories, Queries


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
