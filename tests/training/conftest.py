"""The counting data set, split."""

import pytest
from counting import make_dataset

from speeder_engine.data.splits import leave_one_out


@pytest.fixture(scope="session")
def split():
    return leave_one_out(make_dataset())
