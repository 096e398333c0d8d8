from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chisquare

from speeder_engine.data.candidates import CandidateLists, draw_candidates, frozen_candidates, load_candidates
from speeder_engine.data.splits import leave_one_out
from speeder_engine.errors import ConfigError, DataError, SpeederWarning

SIGNIFICANT = 1e-4


@pytest.fixture(scope="module")
def dataset(build, random_rows):
    return build(random_rows)


@pytest.fixture(scope="module")
def queries(dataset):
    return leave_one_out(dataset).queries("test")


def _negatives(lists):
    slots = np.arange(lists.rows.shape[1])
    return np.stack([row[slots != slot] for row, slot in zip(lists.rows, lists.target_slot, strict=True)])


def test_a_list_is_the_target_among_items_never_taken(dataset, queries):
    lists = draw_candidates(dataset, queries)
    assert lists.rows.shape == (60, 20)
    assert (lists.rows.dtype, lists.target_slot.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(lists.targets, queries.targets)
    for row, user in zip(lists.rows.tolist(), queries.users, strict=True):
        assert len(set(row)) == 20
        assert len(set(row) & set(dataset.history(user).tolist())) == 1


def test_neither_the_target_nor_the_order_of_users_moves_the_draw(dataset, queries):
    lists = draw_candidates(dataset, queries)
    other = draw_candidates(dataset, replace(queries, targets=dataset.rows[dataset.offsets[:-1]]))
    assert (lists.targets != other.targets).all()
    np.testing.assert_array_equal(_negatives(lists), _negatives(other))
    np.testing.assert_array_equal(lists.target_slot, other.target_slot)
    backwards = draw_candidates(dataset, leave_one_out(dataset).queries("test", queries.users[::-1]))
    np.testing.assert_array_equal(backwards.rows[::-1], lists.rows)
    validation = draw_candidates(dataset, leave_one_out(dataset).queries("validation"))
    np.testing.assert_array_equal(_negatives(validation), _negatives(lists))


def test_the_seed_and_the_user_id_move_it(build, random_rows, dataset, queries):
    lists = draw_candidates(dataset, queries)
    assert (draw_candidates(dataset, queries, seed=1).target_slot != lists.target_slot).mean() > 0.8
    renamed = build([(f"other {user}", item, time) for user, item, time in random_rows])
    drawn = draw_candidates(renamed, leave_one_out(renamed).queries("test"))
    assert (drawn.target_slot != lists.target_slot).mean() > 0.8


def test_slots_and_negatives_are_uniform(build):
    rows = [(f"u{user}", f"{item:02d}", time) for user in range(4000) for time, item in enumerate((0, 1, 2))]
    dataset = build(rows, item_ids=[f"{item:02d}" for item in range(40)])
    lists = draw_candidates(dataset, leave_one_out(dataset).queries("test"))
    slots = np.bincount(lists.target_slot, minlength=20)
    assert chisquare(slots).pvalue > SIGNIFICANT
    negatives = _negatives(lists)
    counts = np.bincount(negatives.ravel(), minlength=40)
    assert not counts[:3].any()
    # each item is in a list with probability 19 in 37: the counts spread as binomial ones do, not more, not less
    spread = np.var(counts[3:]) / (4000 * 19 / 37 * (1 - 19 / 37))
    assert 0.4 < spread < 2.0
    for slot in (0, 9, 18):
        assert chisquare(np.bincount(negatives[:, slot], minlength=40)[3:]).pvalue > SIGNIFICANT


def test_all_unseen_items_may_be_needed_but_not_more(build):
    dataset = build([("a", item, time) for time, item in enumerate("vwx")], item_ids="uvwxyz")
    queries = leave_one_out(dataset).queries("test")
    lists = draw_candidates(dataset, queries, num_negatives=3)
    assert sorted(_negatives(lists)[0].tolist()) == [0, 4, 5]
    with pytest.raises(DataError, match=r"user 'a' leaves 3 items, 4 negatives"):
        draw_candidates(dataset, queries, num_negatives=4)
    for wrong in ({"num_negatives": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            draw_candidates(dataset, queries, **wrong)


def test_nobody_to_draw_for(build, tmp_path):
    dataset = build([("a", item, time) for time, item in enumerate("vw")], item_ids="uvwxyz")
    with pytest.warns(SpeederWarning, match="fewer than 3"):
        queries = leave_one_out(dataset).queries("test")
    with pytest.raises(DataError, match=r"no queries to draw for"):
        frozen_candidates(tmp_path / "lists.parquet", dataset, queries, num_negatives=2)
    assert not list(tmp_path.iterdir())


def test_a_file_survives_reading_the_data_in_another_order(build, random_rows, dataset, queries, tmp_path):
    path = tmp_path / "lists.parquet"
    lists = frozen_candidates(path, dataset, queries)
    turned = build(sorted(random_rows, reverse=True), item_ids=dataset.item_ids[::-1])
    again = frozen_candidates(path, turned, leave_one_out(turned).queries("test"))
    place = [turned.user_ids.index(user_id) for user_id in dataset.user_ids]
    ids, ids_again = np.array(dataset.item_ids), np.array(turned.item_ids)
    np.testing.assert_array_equal(ids_again[again.rows[place]], ids[lists.rows])
    np.testing.assert_array_equal(again.target_slot[place], lists.target_slot)


def test_a_frozen_file_is_read_not_drawn_again(dataset, queries, tmp_path):
    path = tmp_path / "new" / "lists.parquet"
    drawn = frozen_candidates(path, dataset, queries)
    shifted = CandidateLists(np.roll(drawn.rows, 1, axis=1), (drawn.target_slot + 1) % 20, drawn.users, 0)
    shifted.save(path, dataset)
    np.testing.assert_array_equal(frozen_candidates(path, dataset, queries).rows, shifted.rows)
    part = leave_one_out(dataset).queries("test", np.array([5, 2]))
    np.testing.assert_array_equal(frozen_candidates(path, dataset, part).rows, shifted.rows[[5, 2]])
    assert [each.name for each in path.parent.iterdir()] == ["lists.parquet"]


def test_lists_for_something_else_are_refused(build, random_rows, dataset, queries, tmp_path):
    path, split = tmp_path / "lists.parquet", leave_one_out(dataset)
    frozen_candidates(path, dataset, split.queries("test", np.arange(30)))
    with pytest.raises(DataError, match=r"made for other data than made"):
        load_candidates(path, build(random_rows[1:]))
    with pytest.raises(DataError, match=r"19 negatives drawn with seed 0, not 9 with seed 0"):
        frozen_candidates(path, dataset, queries, num_negatives=9)
    with pytest.raises(DataError, match=r"not 19 with seed 4"):
        frozen_candidates(path, dataset, queries, seed=4)
    with pytest.raises(DataError, match=r"no candidate lists for user"):
        frozen_candidates(path, dataset, queries)
    with pytest.raises(DataError, match=r"targets are not those"):
        frozen_candidates(path, dataset, split.queries("validation", np.arange(30)))


def test_files_that_hold_no_lists(dataset, tmp_path):
    with pytest.raises(DataError, match=r"no such file"):
        load_candidates(tmp_path / "absent.parquet", dataset)
    pq.write_table(pa.table({"user_id": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"not a file of candidate lists"):
        load_candidates(tmp_path / "x.parquet", dataset)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet: can't be read"):
        load_candidates(tmp_path / "x.parquet", dataset)


def test_lists_check_themselves():
    rows, slots, users = np.arange(4, dtype=np.int32).reshape(2, 2), np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    assert CandidateLists(rows, slots, users, 0).num_negatives == 1
    for broken in ((rows * 0, slots, users), (rows, slots + 2, users), (rows, slots[:1], users)):
        with pytest.raises(DataError, match="candidates"):
            CandidateLists(*broken, 0)
