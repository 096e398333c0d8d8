"""Errors as values: they travel between processes, and what they quote stays short."""

import copy
import pickle

import pytest

from speeder_engine import Item, MissingDependency, UnknownItem
from speeder_engine.errors import name_some, shown


@pytest.mark.parametrize(
    "error", [UnknownItem(["a", "b"], "history"), MissingDependency("onnx", "export", "an export")]
)
def test_errors_travel_between_processes(error):
    for found in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(found) is type(error) and str(found) == str(error)
        assert vars(found) == vars(error)


def test_what_is_quoted_is_short():
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown("x" * 10**6)) < 200
    assert shown(-(10**5000)) == "int of thousands of digits"
    assert len(name_some(["x" * 10**6] * 7)) < 1000
    assert name_some(["a", "b"], limit=1) == "'a' (and 1 more)"


def test_items_are_values():
    item = Item("x", vectors={"text": [1.0, 2.0]})
    assert item == Item("x", vectors={"text": [1.0, 2.0]})
    assert item != Item("x", vectors={"text": [1.0, 3.0]})
    assert item != "x"
    assert len({item, Item("x", vectors={"text": [1.0, 2.0]}), Item("y")}) == 2
