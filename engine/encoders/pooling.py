"""How a sentence encoder's folder says that tokens become one vector: the files sentence-transformers writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.errors import ConfigError

FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
SUPPORTED = ("mean", "cls", "max", "lasttoken")


@dataclass(frozen=True)
class SentenceSettings:
    """`max_length` in tokens; `prefix` is put before every text; `mode` is how token vectors become one."""

    mode: str = "mean"
    normalize: bool = False
    max_length: int = 128
    prefix: str = ""
    lower_case: bool = False

    def __post_init__(self) -> None:
        if self.mode not in SUPPORTED:
            raise ConfigError(f"text encoder: pooling {self.mode!r} isn't supported, only {', '.join(SUPPORTED)}")
        if self.max_length < 3:
            raise ConfigError(f"text encoder: max_length must be at least 3 tokens, not {self.max_length}")


def read_sentence_settings(folder: Path, max_length: int) -> tuple[Path, SentenceSettings]:
    """The folder of the transformers model and its settings; plain mean pooling where modules.json is missing."""
    if not (folder / "modules.json").exists():
        return folder, SentenceSettings(max_length=max_length)
    parts = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in _read(folder / "modules.json")}
    foreign = sorted(set(parts) - {"Transformer", "Pooling", "Normalize"})
    if foreign or "Transformer" not in parts:
        raise ConfigError(f"{folder / 'modules.json'}: needs Transformer, Pooling, Normalize; found {', '.join(parts)}")
    body = parts["Transformer"]
    sentence = _read(body / "sentence_bert_config.json")
    prompts = _read(folder / "config_sentence_transformers.json")
    settings = SentenceSettings(
        mode=_mode(_read(parts["Pooling"] / "config.json")) if "Pooling" in parts else "mean",
        normalize="Normalize" in parts,
        max_length=min(max_length, sentence.get("max_seq_length") or max_length),
        prefix=prompts.get("prompts", {}).get(prompts.get("default_prompt_name"), ""),
        lower_case=bool(sentence.get("do_lower_case")),
    )
    return body, settings


def pool(hidden: Tensor, mask: Tensor, settings: SentenceSettings) -> Tensor:
    """Token vectors [B, L, d] and their mask [B, L], padded on either side -> sentence vectors float32 [B, d]."""
    hidden, real = hidden.float(), mask.bool()[..., None]
    if settings.mode == "mean":
        pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
    elif settings.mode == "max":
        pooled = hidden.masked_fill(~real, -torch.inf).amax(1)
    else:
        slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        end = slots.masked_fill(mask == 0, mask.shape[1]).amin(1) if settings.mode == "cls" else (slots * mask).amax(1)
        pooled = hidden[torch.arange(len(hidden), device=mask.device), end]
    return F.normalize(pooled, dim=-1) if settings.normalize else pooled


def _mode(config: dict[str, Any]) -> str:
    mode = config.get("pooling_mode") or [name for flag, name in FLAGS.items() if config.get(flag)] or "mean"
    if isinstance(mode, str):
        return mode
    return str(mode[0]) if len(mode) == 1 else "+".join(mode)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
