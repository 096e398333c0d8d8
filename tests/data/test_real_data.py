import csv
from collections import defaultdict

import pytest

from speeder_engine.data.candidates import draw_candidates
from speeder_engine.data.dataset import load_dataset
from speeder_engine.data.splits import leave_one_out

SIZES = {"movietweetings-mm": (5549, 2394, 88611), "ml-latest-small-mm": (610, 3383, 87973)}


@pytest.mark.parametrize("name", SIZES)
def test_the_real_data_is_read_whole_and_without_a_warning(name, shared_data):
    dataset = load_dataset(shared_data / name)
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == SIZES[name]
    assert dataset.notes == ()
    with (shared_data / name / "interactions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["timestamp"])):
        expected[row["user_id"]].append(row["item_id"])
    assert dataset.user_ids == tuple(dict.fromkeys(row["user_id"] for row in rows))
    for user, user_id in enumerate(dataset.user_ids):
        assert [dataset.item_ids[row] for row in dataset.history(user)] == expected[user_id]
    assert all(dataset.items.titles)
    assert all(item_id in dataset.items.images for item_id in dataset.item_ids)
    assert dataset.items.images.read(dataset.item_ids[0])[:2] == b"\xff\xd8"


def test_candidates_are_drawn_for_all_real_users(shared_data):
    dataset = load_dataset(shared_data / "movietweetings-mm")
    queries = leave_one_out(dataset).queries("test")
    lists = draw_candidates(dataset, queries)
    assert len(lists) == 5549
    # a scorer that knows nothing but the slot must stay at chance
    assert max((lists.target_slot == slot).mean() for slot in range(20)) < 0.06
