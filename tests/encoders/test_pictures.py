from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from speeder_engine.encoders.pictures import decode_picture


def to_bytes(picture, kind):
    file = BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def gradient():
    ramp = np.linspace(0, 255, 240, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp[:, None], (1, 160))] * 3, axis=-1))


def test_a_jpeg_decoded_small_looks_like_one_decoded_whole(gradient):
    small = np.asarray(decode_picture(to_bytes(gradient, "JPEG"), (32, 48)), np.int16)
    whole = np.asarray(gradient.resize((32, 48), Image.Resampling.BOX), np.int16)
    assert small.shape == (48, 32, 3)
    assert abs(small - whole).max() <= 6


@pytest.mark.parametrize(("mode", "colour"), [("L", 255), ("P", 0), ("CMYK", (0, 0, 0, 0)), ("LA", (0, 0)), ("1", 1)])
def test_every_mode_becomes_rgb(mode, colour):
    picture = decode_picture(to_bytes(Image.new(mode, (20, 20), colour), "TIFF" if mode == "CMYK" else "PNG"))
    assert picture is not None and picture.mode == "RGB"


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert decode_picture(to_bytes(clear, "PNG")).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_half_a_file_is_no_picture(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = to_bytes(Image.fromarray(noise), kind)
    assert decode_picture(content) is not None
    assert decode_picture(content[: len(content) // 2]) is None


def test_garbage_is_no_picture():
    generator = np.random.default_rng(0)
    content = to_bytes(Image.new("RGB", (64, 64), "red"), "PNG")
    assert decode_picture(b"") is None and decode_picture(b"GIF89a") is None
    for _ in range(200):
        altered = bytearray(content)
        for place in generator.integers(8, len(altered), 4):
            altered[place] = generator.integers(256)
        decode_picture(bytes(altered))


def test_a_decompression_bomb_is_no_picture(monkeypatch):
    content = to_bytes(Image.new("RGB", (64, 64)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert decode_picture(content) is None
    assert decode_picture(content, (32, 48)) is None
