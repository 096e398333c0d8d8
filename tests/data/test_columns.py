"""Columns from the command line."""

import pytest

from speeder_engine.data.columns import Columns
from speeder_engine.errors import ConfigError


def test_roles_and_names():
    assert Columns.parse([]) == Columns()
    parsed = Columns.parse(["user=uid", "item=sku,asin", "time=when", "time_unit=ms", "text=a,b"])
    assert parsed == Columns(user="uid", item=("sku", "asin"), time="when", time_unit="ms", text=("a", "b"))


@pytest.mark.parametrize("setting", ["user", "user=", "shoe=size", "=x", "time_unit=h", "item=a,,b"])
def test_what_says_nothing_is_refused(setting):
    with pytest.raises(ConfigError):
        Columns.parse([setting])
