"""A training checkpoint: a folder of safetensors and JSON that holds all an export needs, and no pickle.

checkpoint.json          model settings, training settings, metrics
backbone/  tokenizer/    as transformers (or peft, for adapters) writes them
recommender.safetensors  compressor, position prompts, heads
features.safetensors     the items' modality vectors, frozen and cached
items.parquet            ids, titles, prior
encoders/text, image     so that new items can be encoded later
state/                   only while training: optimizer and progress, for an exact resume
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speeder_engine.catalogue import ITEMS_FILE, ItemTable
from speeder_engine.config import ModelConfig
from speeder_engine.encoders.base import Encoder, load_encoder
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.sources import without_bars
from speeder_engine.errors import ArtifactError, MissingDependency, name_some
from speeder_engine.files import replace_folder, write_json
from speeder_engine.models.recommender import Recommender

FORMAT, FORMAT_VERSION = "speeder-checkpoint", 1
MANIFEST = "checkpoint.json"
COMPRESSED_AT_ONCE = 8192
FROZEN = ("tokenizer", "features.safetensors", ITEMS_FILE, "encoders")  # what training doesn't change
OWN = {*FROZEN, MANIFEST, "backbone", "recommender.safetensors", "state"}


@dataclass
class TrainingState:
    """Where a run stands between two epochs; with it a resumed run goes on as the first would have."""

    stage: int = 0
    epoch: int = 0  # within the stage
    step: int = 0  # of the stage's optimizer
    epochs_done: int = 0  # over all stages: seeds the batches
    best: float = -1.0
    bad_epochs: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)  # current weights and optimizer moments


@dataclass
class Checkpoint:
    model: Recommender
    tokenizer: Any
    table: ItemTable
    features: dict[str, Features]
    encoders: dict[str, Encoder]
    training: dict[str, Any]  # the training settings as JSON
    metrics: dict[str, Any] = field(default_factory=dict)
    state: TrainingState | None = None
    frozen_in: Path | None = None  # the folder that already holds what training doesn't change

    def save(self, folder: Path) -> None:
        """Written beside `folder` and renamed onto it: a killed save leaves the previous checkpoint."""
        check_replaceable(folder)
        with replace_folder(folder) as beside, without_bars():
            if self.frozen_in == folder:
                _link_frozen(folder, beside)
            else:
                self._save_frozen(beside)
            self.model.backbone.save_pretrained(beside / "backbone")  # type: ignore[operator]
            save_file(_contiguous(self.model.own_state()), beside / "recommender.safetensors")
            if self.state is not None:
                _save_state(self.state, beside / "state")
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "model": self.model.config.to_json(),
                "training": self.training,
                "metrics": self.metrics,
            }
            write_json(beside / MANIFEST, manifest)
        self.frozen_in = folder

    def _save_frozen(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")
        save_file(_feature_tensors(self.features), folder / "features.safetensors")
        self.table.save(folder)
        for name, encoder in self.encoders.items():
            encoder.save(folder / "encoders" / name)

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        from transformers import AutoTokenizer

        manifest = read_manifest(folder)
        try:
            config = ModelConfig.from_json(manifest["model"])
            model = Recommender(config, load_backbone(folder / "backbone"))
            missing = model.load_state_dict(load_file(folder / "recommender.safetensors"), strict=False).missing_keys
            lost = [name for name in missing if not name.startswith("backbone.")]
            if lost:
                raise ArtifactError(f"{folder / 'recommender.safetensors'}: {lost[0]} is missing; train again")
            return cls(
                model=model,
                tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
                table=ItemTable.load(folder),
                features=_features(load_file(folder / "features.safetensors")),
                encoders={path.name: load_encoder(path) for path in sorted((folder / "encoders").glob("*"))},
                training=manifest["training"],
                metrics=manifest["metrics"],
                state=_load_state(folder / "state"),
                frozen_in=folder,
            )
        except (OSError, KeyError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(f"{folder}: the checkpoint is incomplete or damaged ({reason}); train again") from None

    @torch.inference_mode()
    def item_tokens(self) -> Tensor:
        """The item-token table [I, d]: every item compressed, all modalities fully in."""
        compressor = self.model.compressor.eval()
        each = [self.features[name] for name in compressor.modalities]
        tokens = []
        for start in range(0, len(self.table), COMPRESSED_AT_ONCE):
            part = slice(start, start + COMPRESSED_AT_ONCE)
            values = [torch.from_numpy(features.values[part]) for features in each]
            present = torch.stack([torch.from_numpy(features.present[part]) for features in each], dim=1)
            tokens.append(compressor(dict(zip(compressor.modalities, values, strict=True)), present))
        return torch.cat(tokens)

    def merged_model(self) -> Recommender:
        """The model with its adapters merged into the backbone in fp32 (the same object where there are none)."""
        merge = getattr(self.model.backbone, "merge_and_unload", None)
        if merge is not None:
            self.model.backbone = merge()
        return self.model


def check_replaceable(folder: Path) -> None:
    """ArtifactError unless `folder` is absent, empty, or a checkpoint with nothing of anyone else's in it."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: is not empty and no checkpoint; choose another folder")
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in OWN)
    if foreign:
        raise ArtifactError(f"{folder}: also holds {name_some(foreign)}; move it out or choose another folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder}: no checkpoint here ({MANIFEST} is missing); make one with `speeder train`")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        raise ArtifactError(f"{path}: not valid JSON; train again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a checkpoint of speeder-engine")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise ArtifactError(f"{path}: format version {version}, this package reads {FORMAT_VERSION}; train again")
    return manifest


def load_backbone(folder: Path) -> nn.Module:
    """A body as transformers wrote it, or the adapters peft wrote on the base model they name."""
    from transformers import AutoModel

    with without_bars():
        return _load_backbone(folder, AutoModel)


def _load_backbone(folder: Path, auto: Any) -> nn.Module:
    if not (folder / "adapter_config.json").is_file():
        body: nn.Module = auto.from_pretrained(folder, dtype=torch.float32)
        return body
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingDependency("peft", "train", "a checkpoint with adapters") from None
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted: nn.Module = PeftModel.from_pretrained(
        auto.from_pretrained(base, dtype=torch.float32), folder, is_trainable=True
    )
    return adapted


def _link_frozen(previous: Path, folder: Path) -> None:
    """Hard links: an encoder of a hundred megabytes isn't written again after every epoch."""
    for name in FROZEN:
        if (previous / name).is_dir():
            shutil.copytree(previous / name, folder / name, copy_function=_link)
        elif (previous / name).exists():
            _link(previous / name, folder / name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _feature_tensors(features: Mapping[str, Features]) -> dict[str, Tensor]:
    tensors = {}
    for name, each in features.items():
        tensors[f"{name}.values"] = torch.from_numpy(each.values)
        tensors[f"{name}.present"] = torch.from_numpy(each.present)
    return tensors


def _features(tensors: Mapping[str, Tensor]) -> dict[str, Features]:
    names = sorted({name.split(".")[0] for name in tensors})
    return {n: Features(tensors[f"{n}.values"].numpy(), tensors[f"{n}.present"].numpy()) for n in names}


_COUNTERS = ("stage", "epoch", "step", "epochs_done", "best", "bad_epochs")


def _save_state(state: TrainingState, folder: Path) -> None:
    folder.mkdir()
    save_file(_contiguous(state.tensors), folder / "tensors.safetensors")
    write_json(folder / "progress.json", {name: getattr(state, name) for name in _COUNTERS})


def _load_state(folder: Path) -> TrainingState | None:
    if not folder.is_dir():
        return None
    counters = json.loads((folder / "progress.json").read_text())
    return TrainingState(**counters, tensors=load_file(folder / "tensors.safetensors"))
