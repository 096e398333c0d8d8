from dataclasses import replace

import numpy as np
import pytest
import torch

from speeder_engine.encoders.convnet import ConvNetConfig
from speeder_engine.encoders.fitted_image import FittedImageEncoder
from speeder_engine.encoders.load import load_encoder
from speeder_engine.errors import ConfigError, DataError, SpeederWarning

CONFIG = ConvNetConfig(steps=150, batch_size=96)
SHORT = ConvNetConfig(steps=3, batch_size=32)


@pytest.fixture(scope="module")
def encoder(covers):
    return FittedImageEncoder.fit(covers[0], CONFIG)


def same_class_nearest(encoder, images, classes):
    values = encoder.encode(images).values
    nearest = (values @ values.T - 2 * np.eye(len(values))).argmax(1)
    return (classes[nearest] == classes).mean()


def test_the_nearest_cover_is_of_the_same_colour_and_shape(covers, encoder):
    assert same_class_nearest(encoder, *covers) > 0.8  # by chance: 1 / 12


def test_training_is_what_makes_it_so(covers, encoder):
    untrained = FittedImageEncoder.fit(covers[0], ConvNetConfig(steps=1, learning_rate=1e-9))
    assert same_class_nearest(encoder, *covers) > same_class_nearest(untrained, *covers) + 0.1


def test_equal_seeds_give_equal_encoders(covers):
    once, again = (FittedImageEncoder.fit(covers[0], SHORT) for _ in range(2))
    assert once.fingerprint == again.fingerprint
    other = FittedImageEncoder.fit(covers[0], replace(SHORT, seed=1))
    np.testing.assert_array_less(1e-3, abs(other.encode(covers[0]).values - once.encode(covers[0]).values).max())


def test_fitting_leaves_the_callers_random_numbers_alone(covers):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    FittedImageEncoder.fit(covers[0][:20], SHORT)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_vector_does_not_depend_on_its_company(covers, encoder):
    alone = encoder.encode(covers[0][7:8]).values
    np.testing.assert_allclose(encoder.encode(covers[0]).values[7:8], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone), 1, atol=1e-5)


def test_save_and_load_change_nothing(covers, encoder, tmp_path):
    encoder.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert (loaded.fingerprint, loaded.name) == (encoder.fingerprint, encoder.name)
    np.testing.assert_array_equal(loaded.encode(covers[0]).values, encoder.encode(covers[0]).values)


def test_undecodable_images_are_counted_in_one_warning(covers, encoder):
    images = [covers[0][0], b"no image", None, covers[0][1][:300], covers[0][1]]
    with pytest.warns(SpeederWarning, match=r"^2 of 4 images .*: 'b', 'd'$") as caught:
        features = encoder.encode(images, names=list("abcde"))
    assert len(caught) == 1
    np.testing.assert_array_equal(features.present, [True, False, False, False, True])


def test_nothing_to_encode_is_no_error(encoder):
    assert encoder.encode([None]).values.shape == (1, 64)
    assert len(encoder.encode([])) == 0


def test_refuses_what_it_cannot_work_with(covers, encoder):
    with pytest.raises(DataError, match="1 of 3 images can be decoded"):
        FittedImageEncoder.fit([covers[0][0], None, b"x"])
    with pytest.raises(DataError, match="input 0 is str"):
        encoder.encode(["poster.jpg"])
    with pytest.raises(ConfigError, match="steps"):
        ConvNetConfig(steps=0)
