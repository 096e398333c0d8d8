"""EngineParts: what an engine directory holds, as objects; written in one step, verified on load.

engine.json                manifest: settings, limits, hash and size of every file
weights.safetensors        decoder (q/k/v and gate/up fused, adapters merged), instruction, prompts, heads
item_tokens.safetensors    the item-token table
items.parquet              id, title, availability, prior, version
compressor.safetensors     with encoders/ and tokenizer/: so that new items can be added
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speeder_engine.artifact import Artifact, read_artifact, write_artifact
from speeder_engine.catalogue import ITEMS_FILE, TOKENS_FILE, Catalogue, ItemTable
from speeder_engine.checks import given_path
from speeder_engine.config import ModelConfig
from speeder_engine.encoders.base import Encoder
from speeder_engine.encoders.load import load_encoder
from speeder_engine.errors import ArtifactError, ConfigError, DataError
from speeder_engine.files import sha256_file
from speeder_engine.models.recommender import ServingModel
from speeder_engine.models.shapes import ShapesOnly
from speeder_engine.title_text import TitleText

WEIGHTS_FILE = "weights.safetensors"
COMPRESSOR_FILE = "compressor.safetensors"
TOKENIZER_FILE = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class EngineParts:
    """A model and a catalogue that belong together. `write_more` adds encoders and tokenizer to a new directory."""

    config: ModelConfig
    model: ServingModel
    catalogue: Catalogue
    compressor: dict[str, Tensor]
    tokenizer: Any | None = None  # a `tokenizers.Tokenizer`; none: the directory's, read when it is asked for
    write_more: Callable[[Path], None] | None = None
    artifact: Artifact | None = None
    encoders: Mapping[str, Encoder] = field(default_factory=dict)  # of parts that were not read from a directory

    @property
    def revision(self) -> str:
        """Twelve hex digits that name these weights and tokens; "unsaved" before they were written."""
        return str(self.artifact.manifest["revision"]) if self.artifact else "unsaved"

    def find_encoder(self, modality: str) -> Encoder | None:
        """The encoder of new items' text or images; None where the model was trained on ready-made vectors."""
        folder = self.artifact.folder(f"encoders/{modality}") if self.artifact else None
        return load_encoder(folder) if folder else self.encoders.get(modality)

    def save(self, out: str | Path) -> Artifact:
        """Writes the engine directory beside `out` and renames it there; raises ArtifactError if `out` is another's."""
        return write_artifact(given_path(out, "save", "an engine directory"), self._fill)

    def with_catalogue(self, table: ItemTable, tokens: Tensor) -> "EngineParts":
        """The same model, as it was read from its directory, over items as they are served now, tokens [n, d] on the
        host. What has not changed keeps the directory's precision. Raises ArtifactError where the directory is another
        by now."""
        if self.artifact is None:
            return replace(self, catalogue=Catalogue(table, tokens))
        path, revision = self.artifact.path, self.revision
        read = EngineParts.load(path)
        if read.revision != revision:
            remedy = "put that one back to save what was changed at run time, or reload and change it again"
            raise ArtifactError(
                f"{path}: holds revision {read.revision}, this engine was loaded from {revision}; {remedy}"
            )
        known = read.catalogue.num_rows
        kept = read.catalogue.tokens[:known]
        same = (kept.to(tokens.dtype) == tokens[:known]).all(dim=1, keepdim=True)
        wide = tokens.to(kept.dtype, copy=True)
        wide[:known] = torch.where(same, kept, wide[:known])
        return replace(read, catalogue=Catalogue(table, wide), write_more=read._copy_more)

    def _copy_more(self, folder: Path) -> None:
        assert self.artifact is not None
        for name in self.artifact.names:
            if name.startswith(("encoders/", "tokenizer/")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.artifact.file(name), folder / name)

    def _fill(self, folder: Path) -> dict[str, Any]:
        if self.model.decoder.weight_kind is not None:
            raise ConfigError(
                "EngineParts.save: an engine has quantized this model's weights; read its directory again"
            )
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / WEIGHTS_FILE)
        save_file({name: value.contiguous() for name, value in self.compressor.items()}, folder / COMPRESSOR_FILE)
        self.catalogue.save(folder)
        if self.tokenizer is not None:
            (folder / TOKENIZER_FILE).parent.mkdir()
            self.tokenizer.save(str(folder / TOKENIZER_FILE))
        if self.write_more is not None:
            self.write_more(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        revision = hashlib.sha256("".join(sha256_file(path) for path in files).encode()).hexdigest()[:12]
        prompt = self.config.prompt
        return {
            "revision": revision,
            "model": self.config.to_json(),
            "limits": {
                "num_items": len(self.catalogue),
                "window": prompt.window,
                "instruction_len": len(prompt.instruction_ids),
            },
        }

    def title_text(self) -> TitleText:
        """Titles as this model's tokens. Raises ArtifactError where the directory holds no tokenizer."""
        vocab_size = self.config.decoder.vocab_size
        if self.tokenizer is not None:
            return TitleText(self.tokenizer, vocab_size)
        if self.artifact is None:
            raise ConfigError("tokenizer: a model with a title head needs one; give EngineParts(tokenizer=...)")
        return TitleText(load_tokenizer(self.artifact), vocab_size)

    @classmethod
    def load(cls, path: str | Path) -> "EngineParts":
        """Raises ArtifactError, naming the file, for anything but a whole engine directory of this format."""
        path = given_path(path, "engine", "an engine directory")
        # encoders and tokenizer are read when they are first asked for: wherever the process has moved to by then, and
        # whatever a link has been turned to
        artifact = read_artifact(Path(os.path.realpath(path)) if path.exists() else path)
        config = model_config(artifact)
        catalogue = load_catalogue(artifact, config)
        compressor = _tensors(artifact, COMPRESSOR_FILE)
        return cls(config, load_model(artifact, config), catalogue, compressor, artifact=artifact)


def model_config(artifact: Artifact) -> ModelConfig:
    """What the manifest says of the model; ArtifactError where that is none."""
    try:
        return ModelConfig.from_json(artifact.manifest["model"])
    except (ConfigError, KeyError) as error:
        where = artifact.path / artifact.kind.manifest
        raise ArtifactError(f"{where}: settings that fit no model: {error}; export again") from None


def load_tokenizer(artifact: Artifact) -> Any:
    """The `tokenizers.Tokenizer` of a directory, without the cutting and padding a training run may have set."""
    from tokenizers import Tokenizer

    path = artifact.file(TOKENIZER_FILE)
    artifact.folder(path.parent.name)  # it is read when a title is first asked for, long after the rest
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what the native reader raises is no narrower
        raise ArtifactError(f"{path}: not a tokenizer that can be read here ({error}); export again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_model(artifact: Artifact, config: ModelConfig) -> ServingModel:
    weights = _tensors(artifact, WEIGHTS_FILE)
    with ShapesOnly():
        model = ServingModel(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"{artifact.path / WEIGHTS_FILE}: weights of another shape ({reason}); export again"
        ) from None
    return model.requires_grad_(False).eval()


def load_catalogue(artifact: Artifact, config: ModelConfig) -> Catalogue:
    artifact.file(ITEMS_FILE)
    where = artifact.file(TOKENS_FILE)
    try:
        catalogue = Catalogue.load(artifact.path)
    except (SafetensorError, KeyError, DataError) as error:
        raise ArtifactError(f"{where}: {error}; export again") from None
    width = catalogue.tokens.shape[1]
    if width != config.decoder.hidden_size:
        raise ArtifactError(f"{where}: tokens are {width} wide, the model {config.decoder.hidden_size}; export again")
    return catalogue


def _tensors(artifact: Artifact, name: str) -> dict[str, Tensor]:
    try:
        return load_file(artifact.file(name))
    except SafetensorError as error:
        raise ArtifactError(f"{artifact.path / name}: no safetensors file ({error}); export again") from None
