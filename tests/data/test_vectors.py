import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder_engine.data.vectors import read_vectors
from speeder_engine.errors import DataError, SpeederWarning

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
LISTS = {
    "list": pa.list_(pa.float64()),
    "large": pa.large_list(pa.float32()),
    "fixed": pa.list_(pa.float32(), 2),
    "view": pa.list_view(pa.float32()),
    "large view": pa.large_list_view(pa.float64()),
    "ints": pa.list_(pa.int32()),
}


def _parquet(path, ids, vectors, dtype=LISTS["list"]):
    pq.write_table(pa.table({"item_id": ids, "vector": pa.array(vectors, dtype)}), path, row_group_size=2)
    return path


@pytest.fixture(params=["npz", *LISTS])
def path(request, tmp_path):
    if request.param == "npz":
        np.savez(tmp_path / "x.npz", item_ids=np.array(["01", "2", "3"]), vectors=VECTORS.astype(np.float64))
        return tmp_path / "x.npz"
    return _parquet(tmp_path / "x.parquet", ["01", "2", "3"], VECTORS.tolist(), LISTS[request.param])


def test_vectors_follow_the_catalogue(path):
    features = read_vectors(path, ("3", "absent", "01", "2"))
    np.testing.assert_array_equal(features.values, [VECTORS[2], [0, 0], VECTORS[0], VECTORS[1]])
    assert features.values.dtype == np.float32
    assert features.present.tolist() == [True, False, True, True]


def test_vectors_of_no_item_are_counted(path):
    with pytest.warns(SpeederWarning, match=r"2 of 3 vectors belong to no item and are left out: '01', '3'"):
        features = read_vectors(path, ("1", "2"))
    np.testing.assert_array_equal(features.values, [[0, 0], VECTORS[1]])
    with pytest.raises(DataError, match=r"none of its 3 ids"):
        read_vectors(path, ("1", "02"))


@pytest.mark.parametrize("dtype", [LISTS["list"], LISTS["fixed"], LISTS["view"]])
def test_a_null_vector_is_absent(dtype, tmp_path):
    path = _parquet(tmp_path / "x.parquet", ["a", "b", "c"], [None, [1, 2], [3, 4]], dtype)
    features = read_vectors(path, ("a", "b", "c"))
    assert features.present.tolist() == [False, True, True]
    np.testing.assert_array_equal(features.values, [[0, 0], [1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a", "b", "c"], [[1.0, 2], [1], [1, 2]], r"vector of item 'b' has length 1, the first 2"),
        (["a", "b", "c"], [[1.0, 2], [1, 2], [1, float("nan")]], r"vector of item 'c' has NaN or infinity"),
        (["a", "b", "c"], [[1.0, 2], [float("inf"), 1], [1, 1]], r"vector of item 'b' has NaN or infinity"),
        (["a", "b", "c"], [[1.0, 2], [1e300, 1], [1, 1]], r"vector of item 'b' has NaN or infinity"),
        (["a", "b", "c"], [[1.0, 2], [None, 1], [1, 1]], r"vector of item 'b' has NaN or infinity"),
        (["a", "b", "b"], [[1.0, 2], [1, 2], [1, 3]], r"more than one vector for item 'b'"),
        (["a", "", "b"], [[1.0, 2], [1, 2], [1, 3]], r"row 2: the item id is ''"),
        (["a"], [[]], r"no vectors"),
    ],
)
def test_bad_vectors_name_the_item(ids, vectors, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_vectors(_parquet(tmp_path / "x.parquet", ids, vectors), ("a", "b", "c"))


def test_files_of_another_make(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, item_ids=np.array(["a"], dtype=object), vectors=np.ones((1, 2)))
    with pytest.raises(DataError, match=r"without pickle"):
        read_vectors(path, ("a",))
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(DataError, match=r"is a single array; save item_ids and vectors together with numpy\.savez"):
        read_vectors(path, ("a",))
    np.savez(path, ids=np.array(["a"]), vectors=np.ones((1, 2)))
    with pytest.raises(DataError, match=r"arrays item_ids and vectors are needed; it has 'ids', 'vectors'"):
        read_vectors(path, ("a",))
    np.savez(path, item_ids=np.array(["a"]), vectors=np.array([[1e39, 1]]))
    with pytest.raises(DataError, match=r"vector of item 'a' has NaN or infinity"):
        read_vectors(path, ("a",))
    np.savez(path, item_ids=np.array(["a"]), vectors=np.ones((2, 2)))
    with pytest.raises(DataError, match=r"item_ids \[k\] and vectors \[k, d\]"):
        read_vectors(path, ("a",))
    pq.write_table(pa.table({"item_id": ["a"], "vector": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"'vector' holds double; lists of numbers"):
        read_vectors(tmp_path / "x.parquet", ("a",))
    with pytest.raises(DataError, match=r"\.parquet or \.npz"):
        read_vectors(tmp_path / "x.pt", ("a",))
