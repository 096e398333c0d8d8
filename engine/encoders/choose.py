"""Which encoder a source means: `auto`, `fitted`, a model's folder or a hub id; the log says which it became."""

import logging
from collections.abc import Sequence

from speeder_engine.encoders.base import Encoder
from speeder_engine.encoders.fitted_image import FittedImageEncoder
from speeder_engine.encoders.fitted_text import FittedTextEncoder
from speeder_engine.encoders.image import TransformersImageEncoder
from speeder_engine.encoders.text import TransformersTextEncoder, packaged_text_model

logger = logging.getLogger("speeder_engine")


def choose_text_encoder(source: str | None, texts: Sequence[str | None]) -> Encoder:
    """`None` or `auto`: the packaged MiniLM, else fitted on `texts`. `fitted`, or a transformers folder or hub id."""
    if source == "fitted":
        return _log(FittedTextEncoder.fit(texts), "as asked")
    if source is not None and source != "auto":
        return _log(TransformersTextEncoder(source), "as asked")
    packaged = packaged_text_model()
    if packaged is None:
        return _log(FittedTextEncoder.fit(texts), "none was asked for, and no packaged one is installed")
    encoder = TransformersTextEncoder(packaged, label="all-MiniLM-L6-v2 (packaged)")
    return _log(encoder, "none was asked for, and the extra [demo] brings this one")


def choose_image_encoder(source: str | None, images: Sequence[bytes | None]) -> Encoder:
    """`None`, `auto` or `fitted`: fitted on `images`. Otherwise a CLIP or SigLIP folder or hub id."""
    if source is None or source in ("auto", "fitted"):
        return _log(FittedImageEncoder.fit(images), "as asked" if source == "fitted" else "none was asked for")
    return _log(TransformersImageEncoder(source), "as asked")


def _log(encoder: Encoder, reason: str) -> Encoder:
    logger.info("%s: %s: %s", encoder.modality, encoder.name, reason)
    return encoder
