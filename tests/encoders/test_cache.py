import numpy as np
import pytest

from speeder_engine.encoders.cache import FeatureCache
from speeder_engine.encoders.features import Features
from speeder_engine.errors import SpeederWarning


class CountingEncoder:
    """Encodes a text as its length and its first letter's code; remembers what it was asked."""

    modality = "text"
    name = "counting"
    dim = 2

    def __init__(self, fingerprint="f" * 64, factor=1):
        self.fingerprint = fingerprint
        self.factor = factor
        self.asked = []

    def encode(self, inputs, names=None):
        self.asked.append(list(zip(inputs, names or inputs, strict=True)))
        present = np.array([bool(text) for text in inputs])
        values = [[len(text) * self.factor, ord(text[0])] if text else [0, 0] for text in inputs]
        return Features(np.array(values, np.float32), present)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "cache")


def test_the_second_call_encodes_nothing(cache):
    encoder = CountingEncoder()
    first = cache.encode(encoder, ["ab", None, "c", "ab"])
    second = FeatureCache(cache.folder).encode(encoder, ["c", "ab", None])
    assert encoder.asked == [[("ab", "ab"), ("c", "c"), ("ab", "ab")]]  # alike in one call: each is counted
    np.testing.assert_array_equal(first.values, [[2, 97], [0, 0], [1, 99], [2, 97]])
    np.testing.assert_array_equal(first.present, [True, False, True, True])
    np.testing.assert_array_equal(second.values, [[1, 99], [2, 97], [0, 0]])


def test_a_changed_text_is_encoded_alone_and_by_its_name(cache):
    encoder = CountingEncoder()
    cache.encode(encoder, ["ab", "c"], names=["x", "y"])
    cache.encode(encoder, ["ab", "cd"], names=["x", "y"])
    assert encoder.asked[1:] == [[("cd", "y")]]


def test_two_encoders_do_not_mix(cache):
    small, large = CountingEncoder(), CountingEncoder("e" * 64, factor=10)
    cache.encode(small, ["ab"])
    np.testing.assert_array_equal(cache.encode(large, ["ab"]).values, [[20, 97]])
    np.testing.assert_array_equal(cache.encode(small, ["ab"]).values, [[2, 97]])
    assert len(small.asked) == len(large.asked) == 1


def test_what_could_not_be_used_is_tried_again(cache):
    encoder = CountingEncoder()
    for _ in range(2):
        assert not cache.encode(encoder, [""]).present.any()
    assert encoder.asked == [[("", "")]] * 2


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"{}" + b[2:], lambda b: b""])
def test_a_damaged_file_is_rebuilt_with_one_warning(cache, damage):
    encoder = CountingEncoder()
    cache.encode(encoder, ["ab", "c"])
    (path,) = cache.folder.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(SpeederWarning, match="damaged feature cache") as caught:
        features = cache.encode(encoder, ["ab", "c"])
    assert len(caught) == 1 and features.present.all()
    cache.encode(encoder, ["ab", "c"])
    assert len(encoder.asked) == 2
    assert [file.name for file in cache.folder.rglob("*") if file.is_file()] == [path.name]


def test_nothing_to_encode_asks_nothing(cache):
    encoder = CountingEncoder()
    assert cache.encode(encoder, []).values.shape == (0, 2)
    assert not cache.encode(encoder, [None, None]).present.any()
    assert encoder.asked == []
