"""The catalogue as a value that changes in place: whole changes or none, rows for good, versions that tell."""

import numpy as np
import pytest
import torch

from speeder_engine import CatalogueFull, DataError, UnknownItem
from speeder_engine.catalogue import Catalogue, ItemTable, ItemUpdate


def made(capacity: int = 8) -> Catalogue:
    table = ItemTable.fresh(["a", "b", "c"], ["A", "B", "C"], np.array([0.5, 1.5, 2.5], np.float32))
    return Catalogue(table, torch.arange(6, dtype=torch.float32).reshape(3, 2), capacity)


def update(**tokens: list[float] | None) -> ItemUpdate:
    given = [token for token in tokens.values() if token is not None]
    rows = [token if token is not None else [0.0, 0.0] for token in tokens.values()]
    nothing = (None,) * len(tokens)
    with_token = np.array([token is not None for token in tokens.values()])
    assert given or not with_token.any()
    return ItemUpdate(tuple(tokens), torch.tensor(rows).reshape(-1, 2), with_token, nothing, nothing, nothing)


def state(catalogue: Catalogue):
    table = catalogue.table()
    return (
        catalogue.item_ids,
        table.item_ids,
        table.titles,
        table.prior.tolist(),
        table.available.tolist(),
        table.versions.tolist(),
        catalogue.tokens.tolist(),
    )


def test_a_new_item_gets_the_next_row_at_version_0():
    catalogue = made()
    assert catalogue.put(update(d=[7.0, 8.0])).tolist() == [3]
    assert (len(catalogue), "d" in catalogue, catalogue.item_ids) == (4, True, ("a", "b", "c", "d"))
    assert catalogue.tokens[3].tolist() == [7.0, 8.0]
    assert catalogue.keys(np.array([3], np.int32)).tolist() == [[3, 0, 0]]
    assert (catalogue.title("d"), float(catalogue.prior[3]), bool(catalogue.available[3])) == ("", 0.0, True)


def test_a_changed_token_gets_a_new_version_and_an_equal_one_does_not():
    catalogue = made()
    catalogue.put(update(b=[9.0, 9.0], c=[4.0, 5.0]))
    assert catalogue.versions[:3].tolist() == [0, 1, 0]
    assert catalogue.tokens[1].tolist() == [9.0, 9.0]
    catalogue.put(update(b=[9.0, 9.0]))
    assert catalogue.versions[1] == 1


def test_what_is_not_given_is_kept():
    catalogue = made()
    catalogue.put(ItemUpdate(("b",), torch.zeros(1, 2), np.array([False]), ("new title",), (False,), (None,)))
    assert (catalogue.title("b"), bool(catalogue.available[1]), float(catalogue.prior[1])) == ("new title", False, 1.5)
    assert (catalogue.tokens[1].tolist(), catalogue.versions[1]) == ([2.0, 3.0], 0)
    catalogue.put(update(b=[1.0, 1.0]))
    assert not catalogue.available[1]
    assert catalogue.title("b") == "new title"


def test_the_tensors_are_written_in_place():
    catalogue = made()
    tokens, prior, available = catalogue.tokens, catalogue.prior, catalogue.available
    catalogue.put(update(a=[1.0, 1.0], x=[2.0, 2.0]))
    catalogue.set_prior({"a": 4.0})
    catalogue.remove(["b"])
    assert catalogue.tokens is tokens
    assert catalogue.prior is prior
    assert catalogue.available is available
    assert (tokens[0].tolist(), float(prior[0]), bool(available[1])) == ([1.0, 1.0], 4.0, False)


def test_a_removed_item_is_gone_for_people_and_stays_readable():
    catalogue = made()
    catalogue.remove(["b"])
    assert (len(catalogue), "b" in catalogue, list(catalogue)) == (2, False, ["a", "c"])
    assert catalogue.rows(["b"], "history").tolist() == [1]
    assert not catalogue.available[1]
    catalogue.put(update(b=[2.0, 3.0]))
    assert ("b" in catalogue, bool(catalogue.available[1]), catalogue.versions[1]) == (True, True, 0)
    assert catalogue.item_ids == ("a", "b", "c")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.put(update(**{f"x{i}": [1.0, 1.0] for i in range(6)})), CatalogueFull, "6 new items don't fit, 3"),
        (lambda c: c.put(update(a=[1.0, 1.0], x=[float("nan"), 1.0])), DataError, "'x' has a token with NaN"),
        (lambda c: c.put(update(a=[1.0, 1.0], x=None)), DataError, "'x' is new; give it a text"),
        (lambda c: c.remove(["a", "zz"]), UnknownItem, "remove: unknown item 'zz'"),
        (lambda c: c.set_available(["a", "zz"], False), UnknownItem, "set_available: unknown item 'zz'"),
        (lambda c: c.set_prior({"a": 1.0, "zz": 1.0}), UnknownItem, "set_prior: unknown item 'zz'"),
        (
            lambda c: c.set_prior({"a": 1.0, "b": float("inf")}),
            DataError,
            "prior of item 'b': expected a number within",
        ),
        (lambda c: c.set_prior({"a": 1.0, "b": "much"}), DataError, "prior of item 'b'"),
        (
            lambda c: c.put(
                ItemUpdate(("a", "a"), torch.ones(2, 2), np.ones(2, bool), (None,) * 2, (None,) * 2, (None,) * 2)
            ),
            DataError,
            "'a' more than once",
        ),
        (
            lambda c: c.put(ItemUpdate(("a",), torch.ones(1, 3), np.ones(1, bool), (None,), (None,), (None,))),
            DataError,
            r"tokens of shape \(1, 3\)",
        ),
        (
            lambda c: c.put(ItemUpdate(("a",), torch.ones(1, 2), np.ones(1, bool), ("T",), (None,), (float("nan"),))),
            DataError,
            "prior of item 'a'",
        ),
    ],
)
def test_a_refused_change_changes_nothing(change, error, message):
    catalogue = made()
    before = state(catalogue)
    with pytest.raises(error, match=message) as caught:
        change(catalogue)
    assert "\n" not in str(caught.value)
    assert state(catalogue) == before


def test_what_was_changed_can_be_saved(tmp_path):
    catalogue = made()
    catalogue.put(update(d=[7.0, 8.0], a=[5.0, 5.0]))
    catalogue.remove(["b"])
    catalogue.save(tmp_path)
    loaded = Catalogue.load(tmp_path)
    assert loaded.tokens.tolist() == [[5.0, 5.0], [2.0, 3.0], [4.0, 5.0], [7.0, 8.0]]
    assert loaded.available.tolist() == [True, False, True, True]
    assert loaded.versions.tolist() == [1, 0, 0, 0]
    assert loaded.capacity == loaded.num_rows == 4


def test_a_copy_is_independent():
    catalogue = made()
    copy = catalogue.to(torch.device("cpu"), torch.float32, capacity=5)
    copy.put(update(a=[1.0, 1.0], d=[1.0, 2.0]))
    assert (len(catalogue), catalogue.tokens[0].tolist(), copy.capacity) == (3, [0.0, 1.0], 5)


def test_a_list_of_ids_that_a_change_overtakes_is_made_again():
    catalogue = made()
    catalogue.remove(["a"])

    class Overtaken(set):
        def __contains__(self, item_id):
            if item_id == "c" and "d" not in catalogue._row_of:
                catalogue.put(update(d=[7.0, 8.0]))
            return super().__contains__(item_id)

    catalogue._removed = Overtaken(catalogue._removed)
    assert catalogue.item_ids == ("b", "c")
    assert catalogue.item_ids == ("b", "c", "d")


def test_what_is_prepared_changes_nothing_until_it_is_applied():
    catalogue = made()
    before = state(catalogue)
    changes = [
        catalogue.prepare_put(update(b=[9.0, 9.0], d=[7.0, 8.0])),
        catalogue.prepare_remove(["a"]),
        catalogue.prepare_available(["c"], False),
        catalogue.prepare_prior({"b": 4, "c": 0.25}),
    ]
    assert state(catalogue) == before and (catalogue.changes, catalogue.find(["d"])) == (0, [None])
    for change in changes:
        catalogue.apply(change)
    assert catalogue.item_ids == ("b", "c", "d") and catalogue.changes == 2
    assert catalogue.tokens[:4].tolist() == [[0.0, 1.0], [9.0, 9.0], [4.0, 5.0], [7.0, 8.0]]
    assert catalogue.versions[:4].tolist() == [0, 1, 0, 0]
    assert catalogue.available[:4].tolist() == [False, True, False, True]
    assert catalogue.prior[:4].tolist() == [0.5, 4.0, 0.25, 0.0]
