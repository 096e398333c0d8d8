"""Bytes of an image file -> an RGB picture, or None where they can't be decoded. Image bytes are never trusted."""

import warnings
from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from speeder_engine.encoders.base import Input
from speeder_engine.errors import DataError, SpeederWarning, name_some


def decode_picture(content: bytes, size: tuple[int, int] | None = None) -> Image.Image | None:
    """RGB on white, at full size or squeezed to `size` (width, height); None for what Pillow can't or won't decode.

    Truncated files and pictures beyond Pillow's pixel limit (decompression bombs) count as undecodable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(BytesIO(content))
            if size is not None:
                # JPEG files are then decoded at the nearest power of two below full size: several times faster
                picture.draft("RGB", (size[0], size[1]))
            flat = _on_white(picture)
            return flat if size is None else flat.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        # Pillow's decoders raise whatever broke in them: struct.error, SyntaxError, EOFError, IndexError, ...
        except Exception:
            return None


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def usable_bytes(inputs: Sequence[Input]) -> list[bytes | None]:
    for row, content in enumerate(inputs):
        if content is not None and not isinstance(content, bytes):
            raise DataError(f"image encoder: input {row} is {type(content).__name__}, not bytes or None")
    return [content for content in inputs if not isinstance(content, str)]


def warn_undecodable(rows: Sequence[int], total: int, names: Sequence[str] | None) -> None:
    """One warning for all images of a call that could not be decoded."""
    if rows:
        bad = name_some(names[row] if names is not None else f"input {row}" for row in rows)
        message = f"{len(rows)} of {total} images can't be decoded and count as missing: {bad}"
        warnings.warn(message, SpeederWarning, stacklevel=3)
