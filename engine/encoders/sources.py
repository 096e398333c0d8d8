"""Where a transformers model comes from: a local folder, or a hub id fetched into the hub's own cache."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from speeder_engine.errors import ConfigError

# Never pytorch_model.bin: a pickle runs what its writer wants
WANTED = ["*.json", "*.txt", "*.model", "*.safetensors"]
UNWANTED = ["onnx/*", "openvino/*"]
TIMEOUT_SECONDS = 5.0
# whatever a config.json asks for: "eager" adds a mask of booleans to its scores, so that rows see what they must not,
# and "flash_attention_2" takes none
ATTENTION = "sdpa"
ENCODER_OTHERWISE = "'fitted' for an encoder fitted on the catalogue"


def resolve_source(source: str | Path, what: str = "encoder", otherwise: str = ENCODER_OTHERWISE) -> Path:
    """The local folder of a model; a `str` may also be a hub id: downloaded, or found in the hub's cache when offline.

    ConfigError names the source and the alternatives where neither works; nothing waits longer than a few seconds for
    an unreachable hub.
    """
    if Path(source).is_dir():
        return Path(source)
    looks_local = isinstance(source, Path) or Path(source).is_absolute() or source.startswith((".", "~"))
    if looks_local or Path(source).exists():
        raise ConfigError(f"{what} {str(source)!r}: no such folder; give a model's folder, or {otherwise}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                etag_timeout=TIMEOUT_SECONDS,
                local_files_only=is_offline(),
            )
        )
    except (OSError, ValueError) as error:
        reason = "offline, and not in the hub's cache" if is_offline() else str(error).splitlines()[0]
        raise ConfigError(
            f"{what} {str(source)!r}: neither a local folder nor a reachable hub id ({reason}); "
            f"give the folder of a downloaded model, or {otherwise}"
        ) from error


def is_offline() -> bool:
    return any(os.environ.get(name, "0").upper() in ("1", "TRUE", "YES", "ON") for name in _OFFLINE_VARIABLES)


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@contextmanager
def without_bars() -> Iterator[None]:
    """Silences the bars that transformers draws while it reads and writes weights: they would tear our own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_reports() -> Iterator[None]:
    """Silences what transformers says of weights that files lack or have beyond a model, line by line: its callers say
    it in one."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def read_weights(kind: Any, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """A model of transformers' class `kind` in fp32, and what is odd about its weights: names by what is wrong."""
    with without_bars(), without_reports():
        model, odd = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named like the missing ones
        )
    # what is mapped from a file begins anywhere: products of such rows may round as those of a new model's don't, and
    # a resumed run would drift away from an unbroken one
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model, {
        "is missing": sorted(odd["missing_keys"]),
        "has another shape than config.json says": sorted(name for name, *_ in odd["mismatched_keys"]),
        "belongs to no part of the model": sorted(odd["unexpected_keys"]),
    }


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def fast_inference(device: torch.device) -> Iterator[None]:
    """Inference mode, in bf16 where it has native instructions (1.7x on two Zen 4 cores, cosine to fp32 > .9999)."""
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=has_native_bf16(device)):
        yield


def has_native_bf16(device: torch.device) -> bool:
    """Whether the GPU, or the CPU by AMX or AVX512-BF16, has instructions for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
