import numpy as np
import pytest

from speeder_engine.encoders.features import Features
from speeder_engine.errors import ArtifactError, DataError

VALUES = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], np.float32)
PRESENT = np.array([True, False, True])


def test_takes_rows_in_the_order_asked():
    taken = Features(VALUES, PRESENT).take([2, 1, 2])
    np.testing.assert_array_equal(taken.values, [[3, 4], [0, 0], [3, 4]])
    np.testing.assert_array_equal(taken.present, [True, False, True])


def test_of_present_spreads_vectors_over_the_rows_that_have_one():
    spread = Features.of_present(VALUES[[0, 2]], PRESENT)
    np.testing.assert_array_equal(spread.values, VALUES)


@pytest.mark.parametrize(
    ("values", "present", "says"),
    [
        (VALUES.astype(np.float64), PRESENT, "float32"),
        (VALUES[0], PRESENT, r"\[n, d\]"),
        (VALUES, PRESENT[:2], r"bool \[3\]"),
        (VALUES, PRESENT.astype(np.int8), "int8"),
        (np.where(VALUES == 3, np.nan, VALUES).astype(np.float32), PRESENT, "row 2 holds NaN"),
        (VALUES, np.array([True, False, False]), "row 2 is not present but not zero"),
    ],
)
def test_refuses_what_does_not_fit(values, present, says):
    with pytest.raises(DataError, match=says):
        Features(values, present)


def test_survives_the_disk_also_from_a_strided_view(tmp_path):
    written = Features(np.asfortranarray(VALUES)[::2], PRESENT[::2])
    written.save(tmp_path / "text.safetensors")
    read = Features.load(tmp_path / "text.safetensors")
    np.testing.assert_array_equal(read.values, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(read.present, [True, True])


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "text.safetensors"
    Features(VALUES, PRESENT).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"text\.safetensors"):
        Features.load(path)
