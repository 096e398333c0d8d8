"""Item: what a running engine is told of an item, new or changed. A value: it encodes nothing and reads no file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speeder_engine.checks import is_unicode
from speeder_engine.config import MODALITIES
from speeder_engine.errors import DataError, shown

Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Item:
    """One item for `Engine.upsert`. Its token is made of `text`, `image` and `vectors`, and of nothing else.

    text: what the text encoder reads. image: the bytes of an image file, or its path. vectors: ready-made features by
    modality ("text", "image", "collaborative"), in place of encoding; a modality that is not given is missing.
    Without any of the three a known item keeps its token. title: for people and the title head. available: may be
    recommended. prior: added to scores, times a learned beta. None keeps what is known; for a new item: no title,
    available, prior 0.
    """

    item_id: str
    title: str | None = field(default=None, kw_only=True)
    text: str | None = field(default=None, kw_only=True)
    image: bytes | str | Path | None = field(default=None, kw_only=True)
    vectors: Mapping[str, Sequence[float] | NDArray[np.floating[Any]]] = field(default_factory=dict, kw_only=True)
    available: bool | None = field(default=None, kw_only=True)
    prior: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.item_id, str) or not self.item_id:
            raise DataError(f"item: ids are strings that are not empty, got {shown(self.item_id)}")
        for name in ("item_id", "title", "text"):
            self._check_text(name, getattr(self, name))
        if not isinstance(self.image, bytes | str | Path | None):
            raise DataError(f"item {self.item_id!r}: image must be bytes or a path, got {type(self.image).__name__}")
        if not isinstance(self.available, bool | np.bool_ | None):
            raise DataError(f"item {self.item_id!r}: available must be true or false, got {shown(self.available)}")
        object.__setattr__(self, "available", None if self.available is None else bool(self.available))
        if not isinstance(self.vectors, Mapping):
            raise DataError(f"item {self.item_id!r}: vectors maps modalities to vectors, got {shown(self.vectors)}")
        object.__setattr__(self, "vectors", {name: self._vector(name) for name in self.vectors})
        for name, raw in (("text", self.text), ("image", self.image)):
            if raw is not None and name in self.vectors:
                raise DataError(f"item {self.item_id!r}: has {name} and a {name} vector; give one of them")

    def _check_text(self, name: str, text: object) -> None:
        if not isinstance(text, str | None):
            raise DataError(f"item {self.item_id!r}: {name} is no string, but {shown(text)}")
        if not is_unicode(text or ""):
            raise DataError(f"item {self.item_id!r}: {name} is no valid Unicode text; mend {shown(text)}")

    def _vector(self, modality: str) -> Vector:
        if modality not in MODALITIES:
            raise DataError(f"item {self.item_id!r}: unknown modality {modality!r}; known are {', '.join(MODALITIES)}")
        try:
            given = np.asarray(self.vectors[modality])
            with np.errstate(over="ignore"):  # infinity, which is refused below
                vector = given.astype(np.float32) if not np.iscomplexobj(given) else None
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor with a gradient
            vector = None
        if vector is None:
            raise DataError(f"item {self.item_id!r}: the {modality} vector holds something but numbers")
        if vector.ndim != 1 or not np.isfinite(vector).all():
            raise DataError(f"item {self.item_id!r}: the {modality} vector must be one row of finite numbers")
        return vector

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Item) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self.item_id)

    def _values(self) -> tuple[object, ...]:
        vectors = {name: np.asarray(vector).tobytes() for name, vector in self.vectors.items()}
        return self.item_id, self.title, self.text, self.image, vectors, self.available, self.prior

    @property
    def has_features(self) -> bool:
        """Whether a token can be made of it."""
        return self.text is not None or self.image is not None or bool(self.vectors)
