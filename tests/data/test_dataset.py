import json
import zipfile
from collections import defaultdict

import numpy as np
import pytest

from speeder_engine.data.columns import Columns
from speeder_engine.data.dataset import Dataset, load_dataset
from speeder_engine.data.items import Items
from speeder_engine.errors import DataError, SpeederWarning

ROWS = [(f"u{user}", f"0{item}", user + item) for user in range(5) for item in range(5)]
EVENTS = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*ROWS, strict=True)), strict=True))
ITEMS = {"item_id": [f"0{item}" for item in range(6)], "title": [f"Title {item}" for item in range(6)]}


def _names(dataset, user):
    return [dataset.item_ids[row] for row in dataset.history(user)]


@pytest.fixture
def folder(tmp_path, write):
    write(tmp_path / "interactions.csv", EVENTS)
    write(tmp_path / "items.jsonl", ITEMS)
    return tmp_path


def test_histories_are_sorted_by_time_and_ties_keep_the_order_of_the_file(build):
    rows = [("b", "z", 5), ("a", "y", 2), ("b", "x", 5), ("a", "z", 1), ("b", "y", 4), ("a", "x", 2)]
    dataset = build(rows)
    assert dataset.user_ids == ("b", "a")
    assert [_names(dataset, user) for user in (0, 1)] == [["y", "z", "x"], ["z", "y", "x"]]
    assert [dataset.history_times(user).tolist() for user in (0, 1)] == [[4, 5, 5], [1, 2, 2]]
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (2, 3, 6)


def test_random_rows_against_plain_python(build, random_rows):
    dataset, expected = build(random_rows), defaultdict(list)
    for user, item, _ in sorted(random_rows, key=lambda row: row[2]):
        expected[user].append(item)
    assert {user: _names(dataset, row) for row, user in enumerate(dataset.user_ids)} == dict(expected)
    assert dataset.offsets.dtype == np.int64
    assert dataset.rows.dtype == np.int32


def test_without_times_the_file_is_the_order_and_nothing_is_a_repetition(build):
    dataset = build([("a", "z", None), ("b", "z", None), ("a", "x", None), ("a", "z", None)])
    assert _names(dataset, 0) == ["z", "x", "z"]
    assert dataset.times is None
    assert dataset.history_times(0) is None
    assert "no times, the order of the file" in dataset.summary()


def test_repeated_rows_are_counted_and_the_first_is_kept(build):
    rows = [("a", "x", 1), ("a", "y", 1), ("a", "x", 1), ("a", "x", 2), ("b", "x", 1), ("a", "x", 1)]
    with pytest.warns(SpeederWarning, match=r"2 interactions repeat the same user, item and time.*user 'a'"):
        dataset = build(rows)
    assert _names(dataset, 0) == ["x", "y", "x"]
    assert _names(dataset, 1) == ["x"]


def test_unknown_items_are_counted_and_all_unknown_is_an_error(build):
    rows = [("a", "x", 1), ("a", "q1", 2), ("b", "q1", 3), ("b", "q2", 4), ("b", "y", 5)]
    with pytest.warns(SpeederWarning, match=r"3 of 5 interactions left out: their 2 items are unknown: 'q1', 'q2'"):
        dataset = build(rows, item_ids=("y", "x"))
    assert [_names(dataset, user) for user in (0, 1)] == [["x"], ["y"]]
    with pytest.raises(DataError, match=r"no interaction's item is among the items: 'x', 'q1'"):
        build(rows, item_ids=("0x",))


def test_the_core_takes_items_and_users_out(build):
    extra = [("lonely", "00", 1), ("u0", "rare", 99)]
    dataset = build(ROWS + extra, 5)
    assert dataset.item_ids == tuple(f"0{item}" for item in range(5))
    assert dataset.user_ids == tuple(f"u{user}" for user in range(5))
    assert _names(dataset, 0) == [f"0{item}" for item in range(5)]
    assert dataset.notes == ("5-core: 1 users, 1 items and 2 interactions left out",)
    assert dataset.notes[0] in dataset.summary()

    kept = build(ROWS + extra, 5, keep_all_items=True)
    assert kept.item_ids[-1] == "rare"
    assert kept.num_interactions == 25
    assert kept.notes == ("5-core: 1 users, 0 items and 2 interactions left out",)
    with pytest.raises(
        DataError, match=r"with 6 interactions each; lower --min-interactions, in Python min_interactions"
    ):
        build(ROWS, 6)


def test_a_folder_is_found_by_its_names(folder):
    with zipfile.ZipFile(folder / "covers.zip", "w") as archive:
        archive.writestr("a/01.jpg", b"one")
    (folder / "vectors").mkdir()
    np.savez(folder / "vectors/image.npz", item_ids=np.array(["05", "03"]), vectors=np.eye(2))
    dataset = load_dataset(folder)
    assert (dataset.name, dataset.num_users, dataset.num_interactions) == (folder.name, 5, 25)
    assert dataset.item_ids == ("00", "01", "02", "03", "04")
    assert dataset.items.titles[1] == "Title 1"
    assert dataset.items.images.read("01") == b"one"
    np.testing.assert_array_equal(dataset.items.vectors["image"].values, [[0, 0]] * 3 + [[0, 1], [0, 0]])
    assert dataset.items.vectors["image"].present.tolist() == [False, False, False, True, False]
    assert "images for 1, image vectors for 1 of 5 items" in dataset.summary()
    assert len(load_dataset(folder, keep_all_items=True).items) == 6


def test_vectors_that_would_not_be_read_are_refused(folder):
    (folder / "vectors").mkdir()
    (folder / "vectors" / "SOURCE.txt").write_text("where they are from")
    load_dataset(folder)
    np.save(folder / "vectors" / "text.npy", np.eye(2))
    with pytest.raises(DataError, match=r"text\.npy: vectors are read from \.parquet or \.npz; write it as one"):
        load_dataset(folder)


def test_every_convention_gives_the_same_data(folder, tmp_path, write):
    expected = load_dataset(folder).fingerprint()
    atomic, amazon, parquet = (tmp_path / name for name in ("atomic", "amazon", "parquet"))
    for made in (atomic, amazon, parquet):
        made.mkdir()
    write(parquet / "interactions.parquet", EVENTS)
    write(parquet / "items.csv", ITEMS)
    write(atomic / "x.inter", {f"{name}:token": column for name, column in EVENTS.items()})
    write(atomic / "x.item", {f"{name}:token": column for name, column in ITEMS.items()})
    reviews = {"user_id": EVENTS["user_id"], "parent_asin": EVENTS["item_id"], "rating": [5] * 25}
    write(amazon / "Toys.csv.gz", reviews | {"timestamp": [time * 1000 for time in EVENTS["timestamp"]]})
    write(amazon / "meta_Toys.jsonl.gz", {"parent_asin": ITEMS["item_id"], "title": ITEMS["title"]})
    assert {load_dataset(made).fingerprint() for made in (atomic, amazon, parquet)} == {expected}


def test_nothing_found_and_two_found_say_what_was_looked_for(folder, tmp_path, write):
    with pytest.raises(DataError, match="load_dataset: the path of a folder is needed, not None"):
        load_dataset(None)
    (folder / "items.csv").write_text("item_id,title\n")
    with pytest.raises(DataError, match=r"several files could be the items: items\.csv, items\.jsonl"):
        load_dataset(folder)
    assert load_dataset(folder, items=folder / "items.jsonl").num_items == 5
    (folder / "items.csv").unlink()
    write(folder / "more.inter", EVENTS)
    with pytest.raises(DataError, match=r"interactions: interactions\.csv, more\.inter"):
        load_dataset(folder)
    (folder / "interactions.csv").unlink()
    (folder / "more.inter").unlink()
    with pytest.raises(DataError, match=r"no interactions; looked for interactions\{\.parquet.*\*\.inter"):
        load_dataset(folder)
    with pytest.raises(DataError, match=r"no such folder"):
        load_dataset(tmp_path / "absent")


def test_images_and_vectors_that_are_ambiguous(folder):
    (folder / "images").mkdir()
    (folder / "posters.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"could be the images: posters\.zip, images"):
        load_dataset(folder)
    (folder / "posters.zip").unlink()
    (folder / "vectors").mkdir()
    (folder / "vectors/audio.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"'audio' is no modality; the modalities are text, image, collaborative"):
        load_dataset(folder)


def test_what_was_skipped_is_noted_and_warned_of(folder, write):
    write(folder / "interactions.csv", {name: [*column, column[0]] for name, column in EVENTS.items()})
    write(folder / "items.jsonl", {name: column[:4] for name, column in ITEMS.items()})
    with pytest.warns(SpeederWarning) as caught:
        dataset = load_dataset(folder, min_interactions=2)
    assert len(caught) == 2
    assert dataset.notes == tuple(str(each.message) for each in caught)
    assert "5 of 26 interactions left out" in dataset.notes[0]
    assert all(each.filename == __file__ for each in caught)


def test_what_was_skipped_is_warned_of_where_reading_ends_in_an_error(folder, write):
    write(folder / "interactions.csv", {name: [*column, column[0]] for name, column in EVENTS.items()})
    with (
        pytest.warns(SpeederWarning, match=r"1 interactions repeat the same user") as caught,
        pytest.raises(DataError, match=r"no users and items with 9 interactions"),
    ):
        load_dataset(folder, min_interactions=9)
    assert len(caught) == 1


def test_columns_reach_both_files(tmp_path):
    (tmp_path / "interactions.csv").write_text("u,i,t\na,01,1\na,02,2\n")
    items = [{"i": f"0{number}", "n": "x"} for number in (1, 2)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    dataset = load_dataset(tmp_path, columns=Columns(user="u", item="i", time="t", title="n"), min_interactions=0)
    assert _names(dataset, 0) == ["01", "02"]


def test_the_fingerprint_is_blind_to_order_alone(build):
    rows = [("a", "x", 1), ("a", "y", 2), ("b", "y", 1), ("b", "z", 2)]
    same = build(rows[2:] + rows[:2], item_ids=("z", "x", "y"))
    assert same.fingerprint() == build(rows).fingerprint()
    changed = [
        build([("a", "y", 1), ("a", "x", 2), *rows[2:]]),
        build([("c", "x", 1), ("c", "y", 2), *rows[2:]]),
        build(rows, item_ids=("x", "y", "z", "more")),
        build([*rows, ("b", "x", 3)]),
    ]
    assert build(rows).fingerprint() not in {dataset.fingerprint() for dataset in changed}


def test_a_dataset_checks_itself():
    items = Items(("a",), ("a",), ("a",))
    offsets, rows = np.array([0, 1]), np.zeros(1, np.int32)
    Dataset("x", items, ("u",), offsets, rows, None)
    for broken in (
        {"rows": np.ones(1, np.int32)},
        {"rows": np.zeros(1, np.int64)},
        {"offsets": np.array([0, 2])},
        {"offsets": np.array([1, 1])},
        {"user_ids": ("u", "v")},
        {"times": np.zeros(2, np.int64)},
    ):
        whole = {"user_ids": ("u",), "offsets": offsets, "rows": rows, "times": None}
        with pytest.raises(DataError):
            Dataset(name="x", items=items, **(whole | broken))
