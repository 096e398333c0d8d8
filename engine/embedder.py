"""ItemEmbedder: items as people know them -> item tokens, by the encoders and the compressor of an engine directory."""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speeder_engine.config import CompressorConfig
from speeder_engine.device import in_one_order
from speeder_engine.encoders.base import Encoder, Input
from speeder_engine.errors import DataError, SpeederWarning, name_some, shown
from speeder_engine.item import Item
from speeder_engine.models.compressor import make_compressor
from speeder_engine.progress import no_bars

EMBEDDED_AT_ONCE = 8192


class ItemEmbedder:
    """Tokens in fp32, whatever the engine runs in, as the export made those of the catalogue.

    `find_encoder(modality)` reads an encoder, or says None where the model has only seen ready-made vectors; encoders
    are read when they are first needed. Safe to use from several threads, one at a time.
    """

    def __init__(
        self,
        config: CompressorConfig,
        weights: dict[str, Tensor],
        find_encoder: Callable[[str], Encoder | None],
        device: torch.device,
    ) -> None:
        # on the CPU one precision above, rounded away again: a token must not depend on what is upserted beside it;
        # the kernels of a GPU see to that themselves
        self.dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.compressor = make_compressor(config).to(self.dtype)
        self.compressor.load_state_dict(weights)
        self.compressor.requires_grad_(False).eval().to(device)
        self.widths = config.modalities
        self.device = device
        self._find_encoder = find_encoder
        self._encoders: dict[str, Encoder | None] = {}
        self._lock = threading.Lock()

    def tokens(self, items: Sequence[Item]) -> Tensor:
        """[n, d], zero for items without features. Raises DataError that names the item; nothing is half-made."""
        with self._lock, in_one_order(self.device), no_bars():
            parts = [self._tokens(items[at : at + EMBEDDED_AT_ONCE]) for at in range(0, len(items), EMBEDDED_AT_ONCE)]
            return torch.cat(parts) if parts else torch.zeros(0, self.compressor.config.hidden_size, device=self.device)

    @torch.inference_mode()
    def _tokens(self, items: Sequence[Item]) -> Tensor:
        values = {name: np.zeros((len(items), width), np.float32) for name, width in self.widths.items()}
        present = np.zeros((len(items), len(self.widths)), np.bool_)
        for column, name in enumerate(self.widths):
            self._take_vectors(name, items, values[name], present[:, column])
            self._encode(name, items, values[name], present[:, column])
        self._check(items, present)
        features = {name: torch.from_numpy(array).to(self.device, self.dtype) for name, array in values.items()}
        tokens: Tensor = self.compressor(features, torch.from_numpy(present).to(self.device)).float()
        tokens[torch.tensor([not item.has_features for item in items], device=self.device)] = 0.0
        return tokens

    def _take_vectors(self, name: str, items: Sequence[Item], values: np.ndarray, present: np.ndarray) -> None:
        for i, item in enumerate(items):
            if name not in item.vectors:
                continue
            vector = np.asarray(item.vectors[name])
            if len(vector) != self.widths[name]:
                wanted = f"this model takes {self.widths[name]}"
                raise DataError(f"item {item.item_id!r}: the {name} vector has {len(vector)} numbers, {wanted}")
            values[i], present[i] = vector, True

    def _encode(self, name: str, items: Sequence[Item], values: np.ndarray, present: np.ndarray) -> None:
        """Text and images that came raw."""
        inputs = [_raw(item, name) for item in items]
        given = [i for i, content in enumerate(inputs) if content is not None]
        if not given:
            return
        encoder = self._encoder(name, items[given[0]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SpeederWarning)  # what can't be read is an error here
            features = encoder.encode([inputs[i] for i in given], [items[i].item_id for i in given])
        unread = [items[i].item_id for i, found in zip(given, features.present, strict=True) if not found]
        if unread and name == "image":
            raise DataError(f"item {name_some(unread)}: the image can't be decoded; send another, or none")
        values[given], present[given] = features.values, features.present

    def _encoder(self, name: str, item: Item) -> Encoder:
        if name not in self._encoders:
            self._encoders[name] = self._find_encoder(name)
        encoder = self._encoders[name]
        if encoder is None:
            remedy = f"pass vectors={{{name!r}: [...]}} of {self.widths[name]} numbers"
            raise DataError(f"item {item.item_id!r}: this engine holds no {name} encoder; {remedy}")
        return encoder

    def _check(self, items: Sequence[Item], present: np.ndarray) -> None:
        for item in items:
            unused = [name for name in (*item.vectors, *_raw_names(item)) if name not in self.widths]
            if unused:
                known = ", ".join(self.widths)
                raise DataError(f"item {item.item_id!r}: this model knows no {unused[0]} modality, only {known}")
        empty = [item.item_id for i, item in enumerate(items) if item.has_features and not present[i].any()]
        if empty:
            raise DataError(f"item {name_some(empty)}: nothing to make a token of; the text has no word that is known")


def _raw_names(item: Item) -> list[str]:
    return [name for name, raw in (("text", item.text), ("image", item.image)) if raw is not None]


def _raw(item: Item, modality: str) -> Input:
    if modality == "text":
        return item.text
    if modality != "image":
        return None
    if item.image is None or isinstance(item.image, bytes):
        return item.image
    try:
        return Path(item.image).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path of any system
        reason = getattr(error, "strerror", None)
        named = f"{item.image}: {reason}" if reason else f"{shown(str(item.image))} is no path of a file"
        raise DataError(f"item {item.item_id!r}: image {named}; give a readable file") from None
