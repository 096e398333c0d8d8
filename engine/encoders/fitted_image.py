"""Images by a small convolutional network trained on the catalogue's own pictures, without labels.

Instance discrimination (two augmented views of a picture must find each other, InfoNCE) rather than reconstruction:
the vectors are compared and mixed, and a reconstruction spends them on pixels that distinguish nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.encoders.base import Input, fingerprint_of, read_weights, write_manifest, write_weights
from speeder_engine.encoders.convnet import ConvNet, ConvNetConfig, augment, info_nce
from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.pictures import decode_picture, usable_bytes, warn_undecodable
from speeder_engine.errors import DataError
from speeder_engine.progress import progress_bar, track

KIND = "fitted-image"
ENCODED_AT_ONCE = 256


class FittedImageEncoder:
    """A trained ConvNet. Vectors are unit vectors, so that pictures compare by cosine."""

    modality = "image"

    def __init__(self, model: ConvNet, config: ConvNetConfig) -> None:
        self.model = model.eval()
        self.config = config

    @classmethod
    def fit(cls, images: Sequence[bytes | None], config: ConvNetConfig | None = None) -> "FittedImageEncoder":
        """Trains on the decodable ones of `images` (bytes of image files); equal for equal images and config.

        What can't be decoded is left out here and reported when it is encoded.
        """
        config = config or ConvNetConfig()
        pixels, decoded = load_pixels(images, config)
        if decoded.sum() < 2:
            raise DataError(
                f"fitted image encoder: {decoded.sum()} of {len(images)} images can be decoded, 2 are needed"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = ConvNet(config)
            optimise(model, pixels[torch.from_numpy(decoded)], config)
        return cls(model, config)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def name(self) -> str:
        return f"image encoder fitted on the catalogue ({self.dim}-d, convolutional, {self._size} pixels)"

    @property
    def _size(self) -> str:
        return f"{self.config.height} x {self.config.width}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(KIND, asdict(self.config), self.model.state_dict())

    @torch.inference_mode()
    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        contents = usable_bytes(inputs)
        pixels, present = load_pixels(contents, self.config)
        chunks = torch.split(pixels[torch.from_numpy(present)], ENCODED_AT_ONCE)
        vectors = [self.model(scale(chunk)) for chunk in chunks]
        given = [row for row, content in enumerate(contents) if content is not None]
        warn_undecodable([row for row in given if not present[row]], len(given), names)
        return Features.of_present(F.normalize(torch.cat(vectors), dim=-1).numpy(), present)

    def save(self, folder: Path) -> None:
        write_weights(folder, self.model.state_dict())
        write_manifest(folder, KIND, asdict(self.config))

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "FittedImageEncoder":
        config = ConvNetConfig(**settings)
        model = ConvNet(config)
        model.load_state_dict(read_weights(folder))
        return cls(model, config)


def load_pixels(images: Sequence[bytes | None], config: ConvNetConfig) -> tuple[Tensor, Flags]:
    """Thumbnails uint8 [n, 3, height, width], zeros where undecodable, and which could be decoded [n]."""
    pixels = np.zeros((len(images), config.height, config.width, 3), np.uint8)
    decoded = np.zeros(len(images), np.bool_)
    for row, content in enumerate(track(images, "images: decoding")):
        picture = None if content is None else decode_picture(content, (config.width, config.height))
        if picture is not None:
            pixels[row], decoded[row] = np.asarray(picture), True
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), decoded


def scale(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def optimise(model: ConvNet, pixels: Tensor, config: ConvNetConfig) -> None:
    """AdamW on InfoNCE between two views; the projection head takes the loss's distortion and is thrown away."""
    head = nn.Sequential(nn.GELU(), nn.Linear(config.dim, config.dim))
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, config.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    with progress_bar() as progress:
        task = progress.add_task("images: fitting an encoder", total=config.steps, note="")
        for _ in range(config.steps):
            batch = scale(pixels[torch.randperm(len(pixels))[: config.batch_size]])
            views = head(model(torch.cat([augment(batch), augment(batch)])))
            first, second = views.chunk(2)
            loss = info_nce(first, second, config.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, note=f"loss {loss.item():.3f}")
