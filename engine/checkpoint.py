"""A training checkpoint: a folder of safetensors and JSON that holds all an export needs, and no pickle.

checkpoint.json          model settings, training settings, metrics; hash and size of every file
backbone/  tokenizer/    as transformers (or peft, for adapters) writes them
recommender.safetensors  compressor, position prompts, heads
features.safetensors     the items' modality vectors, frozen and cached
items.parquet            ids, titles, prior
encoders/text, image     so that new items can be encoded later
state/                   only while training: optimizer and progress, for an exact resume
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speeder_engine.artifact import Kind, check_seal, seal
from speeder_engine.catalogue import ITEMS_FILE, ItemTable
from speeder_engine.checks import given_path
from speeder_engine.config import ModelConfig
from speeder_engine.encoders.base import Encoder
from speeder_engine.encoders.features import Features
from speeder_engine.encoders.load import load_encoder
from speeder_engine.encoders.sources import read_weights, without_bars
from speeder_engine.errors import ArtifactError, MissingDependency, name_some, shown
from speeder_engine.files import holds_nothing, refuse_unless_folder, replace_folder, sha256_file, write_json
from speeder_engine.models.recommender import Recommender

CHECKPOINT = Kind("speeder-checkpoint", 1, "checkpoint.json", "checkpoint", "`speeder train`", verb="train")
FORMAT, FORMAT_VERSION, MANIFEST = CHECKPOINT.format, CHECKPOINT.version, CHECKPOINT.manifest
COMPRESSED_AT_ONCE = 8192
FROZEN = ("tokenizer", "features.safetensors", ITEMS_FILE, "encoders")  # what training doesn't change
ADAPTERS, BASE_FILES = "adapter_config.json", ("config.json", "*.safetensors", "*.bin")
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
    frozen_files: dict[str, Any] = field(default_factory=dict)  # hash and size of each file of that
    base: str | None = None  # of adapters: what `base_digest` says of the model below them

    def save(self, folder: Path) -> None:
        """Written beside `folder` and renamed onto it: a killed save leaves the previous checkpoint."""
        check_replaceable(folder)
        with replace_folder(folder) as beside, without_bars():
            if self.frozen_in == folder:
                _link_frozen(folder, beside)
            else:
                self._save_frozen(beside)
                self.frozen_files = {}
            self.model.backbone.save_pretrained(beside / "backbone")  # type: ignore[operator]
            save_file(_contiguous(self.model.own_state()), beside / "recommender.safetensors")
            if self.state is not None:
                _save_state(self.state, beside / "state")
            files = seal(beside, self._fields(beside), CHECKPOINT, known=self.frozen_files)["files"]
        self.frozen_in = folder
        self.frozen_files = {name: entry for name, entry in files.items() if name.split("/")[0] in FROZEN}

    def _fields(self, folder: Path) -> dict[str, Any]:
        """Of the manifest; the base of adapters is read once."""
        fields = {"model": self.model.config.to_json(), "training": self.training, "metrics": self.metrics}
        if not (folder / "backbone" / ADAPTERS).is_file():
            return fields
        self.base = self.base or base_digest(base_folder(folder / "backbone"))
        return {**fields, "base": self.base}

    def _save_frozen(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")
        save_file(_feature_tensors(self.features), folder / "features.safetensors")
        self.table.save(folder)
        for name, encoder in self.encoders.items():
            encoder.save(folder / "encoders" / name)

    @classmethod
    def load(cls, folder: str | Path) -> "Checkpoint":
        """Raises ArtifactError, naming the file, for anything but a whole checkpoint of this format."""
        from transformers import AutoTokenizer

        folder = given_path(folder, "checkpoint", "a checkpoint")
        manifest = read_manifest(folder)
        with _reading(folder / MANIFEST):
            config = ModelConfig.from_json(manifest["model"])
        backbone = load_backbone(folder / "backbone", manifest.get("base"))
        with _reading(folder / "recommender.safetensors") as path:
            model = Recommender(config, backbone)
            _load_own(model, path)
        with _reading(folder / "tokenizer") as path:
            tokenizer = AutoTokenizer.from_pretrained(path)
        with _reading(folder / "features.safetensors") as path:
            features = _features(load_file(path))
        return cls(
            model=model,
            tokenizer=tokenizer,
            table=ItemTable.load(folder),
            features=features,
            encoders=_load_encoders(folder / "encoders"),
            training=manifest["training"],
            metrics=manifest["metrics"],
            state=_load_state(folder / "state"),
            frozen_in=folder,
            frozen_files={n: e for n, e in manifest.get("files", {}).items() if n.split("/")[0] in FROZEN},
            base=manifest.get("base"),
        )

    @torch.inference_mode()
    def item_tokens(self) -> Tensor:
        """The item-token table [I, d] on the model's device: every item compressed, all modalities fully in."""
        compressor, device = self.model.compressor.eval(), self.model.prompts.weight.device
        each = [self.features[name] for name in compressor.modalities]
        tokens = []
        for start in range(0, len(self.table), COMPRESSED_AT_ONCE):
            part = slice(start, start + COMPRESSED_AT_ONCE)
            values = [torch.from_numpy(features.values[part]).to(device) for features in each]
            present = torch.stack([torch.from_numpy(features.present[part]) for features in each], dim=1).to(device)
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
    refuse_unless_folder(folder)
    try:
        if holds_nothing(folder):
            return
        is_checkpoint = (folder / MANIFEST).is_file()
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in OWN)
    except OSError as error:
        raise ArtifactError(f"{folder}: can't be read: {error.strerror}; choose another folder") from error
    if not is_checkpoint:
        raise ArtifactError(f"{folder}: is not empty and no checkpoint; choose another folder")
    if foreign:
        raise ArtifactError(f"{folder}: also holds {name_some(foreign)}; move it out or choose another folder")


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder}: no checkpoint here ({MANIFEST} is missing); make one with `speeder train`")
    with _reading(folder):
        content = path.read_bytes()
        try:
            manifest = json.loads(content)
        except (ValueError, RecursionError):
            raise ArtifactError(f"{path}: not valid JSON; train again") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ArtifactError(f"{path}: not a checkpoint of speeder-engine")
        if manifest.get("format_version") != FORMAT_VERSION:
            version = manifest.get("format_version")
            raise ArtifactError(f"{path}: format version {version}, this package reads {FORMAT_VERSION}; train again")
        # the first checkpoints of this version list no files; either key marks one that does, even if a bit was flipped
        if "files" in manifest or "digest" in manifest:
            check_seal(folder, manifest, content, CHECKPOINT)
        for name in ("model", "training", "metrics"):
            if not isinstance(manifest.get(name), dict):
                raise ArtifactError(f"{path}: {name} is no object, but {shown(manifest.get(name))}; train again")
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever goes wrong inside, as one ArtifactError that names `path`."""
    try:
        yield path
    except (ArtifactError, MissingDependency, MemoryError):
        raise
    except Exception as error:  # what transformers, peft and safetensors raise about a damaged file is no narrower
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path}: missing or damaged ({reason}); train again") from error


def _load_own(model: Recommender, path: Path) -> None:
    odd = model.load_state_dict(load_file(path), strict=False)
    missing = [name for name in odd.missing_keys if not name.startswith("backbone.")]
    _refuse_odd(path, {"is missing": missing, "belongs to no part of the model": odd.unexpected_keys})


def _refuse_odd(path: Path, names: Mapping[str, Iterable[str]]) -> None:
    """ArtifactError naming the first weight that the file lacks, or has beyond or beside the model."""
    for what, found in names.items():
        if first := min(found, default=""):
            raise ArtifactError(f"{path}: {first} {what}; train again")


def _load_encoders(folder: Path) -> dict[str, Encoder]:
    encoders = {}
    for each in sorted(folder.glob("*")):
        with _reading(each):
            encoders[each.name] = load_encoder(each)
    return encoders


def load_backbone(folder: Path, base: str | None = None) -> nn.Module:
    """A body as transformers wrote it, or the adapters peft wrote on the base model they name; nothing is left at
    random: ArtifactError where weights are missing, or are not the model's. `base`: the digest of that base model where
    it is known; ArtifactError for another one."""
    with without_bars(), _reading(folder):
        return _load_adapted(folder, base) if (folder / ADAPTERS).is_file() else _load_body(folder)


def base_folder(folder: Path) -> Path:
    """Where the base model of the adapters in `folder` lies; ArtifactError unless that is a folder."""
    named = json.loads((folder / ADAPTERS).read_bytes())["base_model_name_or_path"]
    if not Path(named).is_dir():
        raise ArtifactError(f"{folder}: adapters of {named!r}, which is no folder here; put that model back")
    return Path(named)


def base_digest(folder: Path) -> str:
    """Of what decides a base model's answers: its weights and settings, byte for byte."""
    files = sorted(path for pattern in BASE_FILES for path in folder.glob(pattern))
    return hashlib.sha256("".join(f"{path.name} {sha256_file(path)}\n" for path in files).encode()).hexdigest()


def _load_body(folder: Path, whole: bool = True) -> nn.Module:
    """`whole`: the files hold a body and nothing else; those of a base model may also hold heads."""
    from transformers import AutoModel

    body, odd = read_weights(AutoModel, folder)
    beyond = () if whole else ("belongs to no part of the model",)
    _refuse_odd(folder / "model.safetensors", {what: names for what, names in odd.items() if what not in beyond})
    return body  # type: ignore[no-any-return]


def _load_adapted(folder: Path, digest: str | None) -> nn.Module:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise MissingDependency("peft", "train", "a checkpoint with adapters") from None
    below = base_folder(folder)
    base = _load_body(below, whole=False)
    if digest is not None and digest != base_digest(below):
        raise ArtifactError(f"{below}: is not the model that {folder} was trained on; put that one back")
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118
    adapted: nn.Module = PeftModel.from_pretrained(base, folder, is_trainable=True)
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    _refuse_odd(path, {"is missing": wanted - saved, "belongs to no part of the model": saved - wanted})
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


_COUNTERS = {"stage": int, "epoch": int, "step": int, "epochs_done": int, "best": float, "bad_epochs": int}


def _save_state(state: TrainingState, folder: Path) -> None:
    folder.mkdir()
    save_file(_contiguous(state.tensors), folder / "tensors.safetensors")
    write_json(folder / "progress.json", {name: getattr(state, name) for name in _COUNTERS})


def _load_state(folder: Path) -> TrainingState | None:
    if not folder.is_dir():
        return None
    with _reading(folder / "progress.json") as path:
        counters = json.loads(path.read_bytes())
        if not isinstance(counters, dict) or {name: type(value) for name, value in counters.items()} != _COUNTERS:
            raise ArtifactError(f"{path}: not where a run stands, but {shown(counters)}; train again")
    with _reading(folder / "tensors.safetensors") as path:
        return TrainingState(**counters, tensors=load_file(path))
