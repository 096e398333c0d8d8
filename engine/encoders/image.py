"""Images by a transformers model that has an image tower: CLIP, SigLIP and their like."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from speeder_engine.encoders.base import Input, fingerprint_of, write_manifest
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.pictures import decode_picture, usable_bytes, warn_undecodable
from speeder_engine.encoders.sources import best_device, fast_inference, resolve_source, without_bars
from speeder_engine.errors import ConfigError
from speeder_engine.progress import track

KIND = "transformers-image"


class TransformersImageEncoder:
    """`source` is a local folder or a hub id of a model with `get_image_features`; `label` stands for it in the log."""

    modality = "image"

    def __init__(self, source: str | Path, *, batch_size: int = 16, label: str | None = None) -> None:
        from transformers import AutoImageProcessor, AutoModel

        folder = resolve_source(source)
        self.label = label or (folder.name if Path(source).is_dir() else str(source))
        self.batch_size = batch_size
        self.device = best_device()
        try:
            with without_bars():
                # pinned: torchvision's resize gives other pixels, and it may be there in training and not in serving
                load_processor: Any = AutoImageProcessor.from_pretrained
                self.processor = load_processor(folder, backend="pil", local_files_only=True)
                model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except ImportError:  # before 5.23 or so transformers has no image processors without it
            raise ConfigError(
                f"image encoder {self.label!r}: this transformers reads images only with torchvision; "
                "upgrade transformers, install torchvision, or use 'fitted'"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"image encoder {self.label!r}: can't be loaded by transformers ({error})") from error
        if not hasattr(model, "get_image_features"):
            raise ConfigError(
                f"image encoder {self.label!r}: {type(model).__name__} has no get_image_features; "
                "give a CLIP or SigLIP model, or 'fitted'"
            )
        self.model = model.float().eval().to(self.device)
        self.dim = self._encode_batch([Image.new("RGB", (32, 32))]).shape[1]
        processing = json.loads(self.processor.to_json_string())
        self.fingerprint = fingerprint_of(KIND, processing, model.state_dict())

    @property
    def name(self) -> str:
        return f"transformers image encoder {self.label} ({self.dim}-d)"

    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        contents = usable_bytes(inputs)
        given = [(row, content) for row, content in enumerate(contents) if content is not None]
        values = np.zeros((len(contents), self.dim), np.float32)
        present = np.zeros(len(contents), np.bool_)
        for start in track(range(0, len(given), self.batch_size), f"images: {self.label}"):
            decoded = {row: decode_picture(content) for row, content in given[start : start + self.batch_size]}
            pictures = {row: picture for row, picture in decoded.items() if picture is not None}
            if pictures:
                rows = list(pictures)
                values[rows], present[rows] = self._encode_batch(list(pictures.values())).numpy(), True
        warn_undecodable([row for row, _ in given if not present[row]], len(given), names)
        return Features(values, present)

    def _encode_batch(self, pictures: list[Image.Image]) -> Tensor:
        pixels = self.processor(images=pictures, return_tensors="pt").to(self.device)
        with fast_inference(self.device):
            output = self.model.get_image_features(**pixels)
        vectors = output if isinstance(output, Tensor) else output.pooler_output
        return vectors.float().cpu()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with without_bars():
            self.model.save_pretrained(folder / "model")
        self.processor.save_pretrained(folder / "model")
        write_manifest(folder, KIND, {"label": self.label, "batch_size": self.batch_size})

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "TransformersImageEncoder":
        return cls(folder / "model", batch_size=settings["batch_size"], label=settings["label"])
