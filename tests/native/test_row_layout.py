"""A step's rows as numpy would lay them out, field by field; what doesn't fit together is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_engine import _C
from speeder_engine.batch import READ_FIELDS, ROW_FIELDS, USER_FIELDS, RowArrays, RowConstants, RowLayout
from speeder_engine.cache import CachePlan

CONSTANTS = RowConstants(instruction_len=30, instruction_slot=91, scratch_slot=92)
NOBODY = 77
# positions, how many of them are cached, candidates that are rows, the session's slot
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3), st.integers(-1, 8)).map(
        lambda drawn: (drawn[0], min(drawn[1], drawn[0]), *drawn[2:])
    ),
    max_size=5,
)


def made(sequences, seed=0):
    rng = np.random.default_rng(seed)
    lengths, cached, ranked, slots = np.array(sequences, np.int32).reshape(-1, 4).T.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    # the planner's array of keys has room for more
    keys = rng.integers(0, 1000, (offsets[-1] + 4, 3), np.int32)
    extend = lengths - cached
    mapping = rng.integers(0, 500, extend.sum(), np.int32)
    none = np.zeros((0, 3), np.int32)
    tables = np.zeros((len(sequences), 4), np.int32)
    plan = CachePlan(1, offsets, keys, cached, extend, slots, tables, mapping, none, none[:, :2])
    queries = [
        SimpleNamespace(num_ranked=int(count), candidates=rng.integers(0, 1000, count, np.int32) if count else None)
        for count in ranked
    ]
    return RowLayout(queries, plan, CONSTANTS), queries


def expected(rows, queries):
    """The same in whole arrays: nothing is written one by one."""
    plan, ranked = rows.plan, np.array([query.num_ranked for query in queries], np.int64)
    extend, cached, starts = (
        np.asarray(each, np.int64) for each in (plan.extend_len, plan.cached_len, plan.offsets[:-1])
    )
    counts = extend + ranked
    sequence = np.repeat(np.arange(len(queries)), counts)
    local = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    candidate = local >= extend[sequence]
    slots = cached[sequence] + np.minimum(local, extend[sequence])
    items, buckets, mapping = (np.zeros(len(sequence), np.int64) for _ in range(3))
    at = (starts[sequence] + slots)[~candidate]
    items[~candidate], buckets[~candidate], mapping[~candidate] = plan.keys[at, 0], plan.keys[at, 2], plan.slot_mapping
    items[candidate], mapping[candidate] = np.concatenate([q.candidates for q in queries if q.num_ranked] or [[]]), -1
    visible = slots + ~candidate
    read = np.flatnonzero(candidate | (local == extend[sequence] - 1))
    first_read = np.searchsorted(sequence[read], np.arange(len(queries)))
    is_new, has_slot = extend > 0, plan.session_slots >= 0
    return {
        "rows": (items, slots, buckets, slots + 30, mapping, sequence, local, visible),
        "reads": (read, items[read], sequence[read], local[read], visible[read]),
        "users": (
            np.where(is_new, first_read, 0),
            np.where((cached > 0) & ~is_new, plan.session_slots, 91),
            np.where(has_slot & is_new, plan.session_slots, 92),
        ),
        "flags": (candidate, candidate[read], is_new),
        "candidate_reads": tuple(
            slice(first + new, first + new + count)
            for first, new, count in zip(first_read, is_new, ranked, strict=True)
        ),
    }


@settings(deadline=None, max_examples=200)
@given(SEQUENCES, st.integers(0, 3), st.integers(0, 1000))
def test_every_field_is_numpys_and_the_rest_is_padding(sequences, spare, seed):
    rows, queries = made(sequences, seed)
    wanted = expected(rows, queries)
    counts = rows.num_rows, rows.num_reads, rows.num_users
    assert counts == tuple(len(wanted[name][0]) for name in ("rows", "reads", "users"))
    assert rows.candidate_reads == wanted["candidate_reads"]
    assert rows.longest == max((length - cached + ranked for length, cached, ranked, _ in sequences), default=0)
    found = rows.write(RowArrays.empty(*(count + 2 * spare for count in counts)), NOBODY)
    for name, fields in (("rows", ROW_FIELDS), ("reads", READ_FIELDS), ("users", USER_FIELDS)):
        for field, values, right in zip(fields, getattr(found, name), wanted[name], strict=True):
            assert values[: len(right)].tolist() == right.tolist(), (name, field)
    flags = (found.candidate, found.read_candidate, found.is_new)
    for values, right in zip(flags, wanted["flags"], strict=True):
        assert values[: len(right)].tolist() == right.tolist() and not values[len(right) :].any()
    num_rows, num_reads, num_users = counts
    mapping, sequence, local = (
        found.rows[ROW_FIELDS.index(name), num_rows:] for name in ("slot_mapping", "sequence", "local")
    )
    assert (mapping == -1).all() and (sequence == NOBODY).all() and local.tolist() == [*range(len(local))]
    assert (found.reads[READ_FIELDS.index("sequence"), num_reads:] == NOBODY).all()
    assert (found.users[:, num_users:].T == [0, 91, 92]).all()


def test_fields_begin_where_kernels_want_them():
    arrays = RowArrays.empty(5, 3, 1)
    assert [each.shape for each in (arrays.rows, arrays.reads, arrays.users)] == [(8, 6), (5, 4), (3, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.zeros(4, np.int32)}, "must fit 2 sequences"),
        ({"offsets": np.array([1, 4, 7], np.int32)}, "offsets must begin with 0"),
        ({"offsets": np.array([0, 4, 2], np.int32)}, "sequence 1 has -2 positions"),
        ({"offsets": np.array([0, 4, 900], np.int32)}, "offsets lead beyond the keys"),
        ({"cached_len": np.array([5, 0], np.int32)}, "sequence 0 has 4 positions, 5 of them cached"),
        ({"cached_len": np.array([-1, 0], np.int32)}, "sequence 0 has 4 positions, -1 of them cached"),
        ({"num_ranked": np.array([2, -1], np.int32)}, "and -1 candidates"),
        ({"num_ranked": np.array([2, 1], np.int32)}, "2 candidates, 3 are counted"),
        ({"slot_mapping": np.zeros(9, np.int32)}, "slot_mapping has 9 entries for 6 new rows"),
        ({"keys": np.zeros((9, 2), np.int32)}, "keys: must have 3 columns, not 2"),
        ({"candidates": np.zeros(2, np.int64)}, "candidates: must be a C-contiguous int32 array"),
        ({"rows": np.zeros((8, 7), np.int64)}, "8 rows, room for 7"),
        ({"rows": np.zeros((7, 8), np.int64)}, "rows: must have 8 rows"),
        ({"rows": np.zeros((8, 8), np.int32)}, "rows: must be a C-contiguous int64 array"),
        ({"rows": np.zeros((8, 16), np.int64)[:, ::2]}, "rows: must be a C-contiguous int64 array"),
        ({"reads": np.zeros((5, 3), np.int64)}, "4 reads, room for 3"),
        ({"read_candidate": np.zeros(9, np.bool_)}, "4 reads, room for 4"),
        ({"users": np.zeros((3, 1), np.int64)}, "2 sequences, room for 1"),
        ({"is_new": np.zeros(2, np.uint8)}, "is_new: must be a C-contiguous bool array"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(change, message):
    rows, _ = made([(4, 1, 2, 0), (3, 0, 0, -1)])
    arrays = RowArrays(
        *(np.full((count, width), -5, np.int64) for count, width in ((8, 8), (5, 4), (3, 2))),
        *(np.ones(width, np.bool_) for width in (8, 4, 2)),
    )
    plan = rows.plan
    given = {name: getattr(plan, name) for name in ("offsets", "keys", "cached_len", "session_slots", "slot_mapping")}
    given |= {"num_ranked": rows.num_ranked, "candidates": rows.candidates, **vars(CONSTANTS), "nobody": 0} | vars(
        arrays
    )
    with pytest.raises(ValueError, match=message):
        _C.lay_out(**given | change)
    assert all((each == -5).all() for each in (arrays.rows, arrays.reads, arrays.users)) and arrays.candidate.all()
    _C.lay_out(**given)


def test_arrays_that_are_read_only_stay_as_they_are():
    rows, _ = made([(4, 1, 2, 0)])
    arrays = RowArrays.empty(rows.num_rows, rows.num_reads, 1)
    arrays.is_new.flags.writeable = False
    with pytest.raises(ValueError, match="is_new: is read-only"):
        rows.write(arrays)
