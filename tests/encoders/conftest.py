from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

COLOURS = ["crimson", "navy", "gold", "seagreen", "white", "black"]
SHAPES = ["disc", "bars"]
LIGHT = 45  # levels of 255


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread):
    """For all tests here."""


def draw_cover(colour, shape, generator):
    """A cover 96 x 64 of one class, background and shape; place, size, lighting and noise are its own."""
    cover = Image.new("RGB", (64, 96), colour)
    pen = ImageDraw.Draw(cover)
    x, y, size = generator.integers(8, 24), generator.integers(8, 40), generator.integers(22, 34)
    if shape == "disc":
        pen.ellipse((x, y, x + size, y + size), fill="grey")
    else:
        for step in range(0, size, 8):
            pen.rectangle((x, y + step, x + size, y + step + 3), fill="grey")
    noisy = (
        np.asarray(cover, np.int16) + generator.integers(-LIGHT, LIGHT + 1) + generator.integers(-20, 21, (96, 64, 3))
    )
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def to_bytes(picture, kind="JPEG", **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="session")
def covers():
    """240 JPEG covers of 12 classes, and the class of each."""
    generator = np.random.default_rng(0)
    classes = np.arange(240) % 12
    drawn = [draw_cover(COLOURS[c % 6], SHAPES[c // 6], generator) for c in classes]
    return [to_bytes(cover) for cover in drawn], classes
