"""What an engine directory holds and what it will take to serve it, from its verified manifest and settings alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from speeder_engine.artifact import read_artifact
from speeder_engine.checks import given_path
from speeder_engine.config import EngineConfig, parse_bytes
from speeder_engine.device import DTYPES
from speeder_engine.kv_blocks import KVBlocks
from speeder_engine.models.recommender import ServingModel
from speeder_engine.models.shapes import ShapesOnly
from speeder_engine.parts import model_config

KV_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class EngineSummary:
    """Sizes in bytes; `memory` by dtype is weights and item tokens with the room that new ones have by default, the KV
    budget on top.

    Keys and values by what they are held in: a dtype, or int8 and fp8 with their scales (`EngineConfig.kv`).
    """

    path: str
    revision: str
    num_items: int
    instruction: str
    instruction_len: int
    window: int
    window_step: int
    modalities: tuple[str, ...]
    heads: tuple[str, ...]
    decoder: dict[str, Any]
    num_parameters: int
    disk_bytes: int
    files: dict[str, int]
    kv_bytes_per_position: dict[str, int]
    kv_bytes_per_user: dict[str, int]  # a full window, in whole blocks
    memory: dict[str, int]
    users_per_gib: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_engine(path: str | Path) -> EngineSummary:
    """Raises ArtifactError for anything but a whole engine directory."""
    artifact = read_artifact(given_path(path, "inspect", "an engine directory"))
    config = model_config(artifact)
    decoder, prompt = config.decoder, config.prompt
    num_items = int(artifact.manifest["limits"]["num_items"])
    with ShapesOnly():
        num_parameters = sum(weight.numel() for weight in ServingModel(config).parameters())
    elements = num_parameters + EngineConfig().capacity_for(num_items) * decoder.hidden_size
    per_position = {name: KVBlocks.position_bytes(decoder, dtype) for name, dtype in KV_DTYPES.items()}
    block_size = EngineConfig().block_size
    positions = -(-prompt.window // block_size) * block_size
    per_user = {name: positions * size for name, size in per_position.items()}
    return EngineSummary(
        path=str(path),
        revision=str(artifact.manifest["revision"]),
        num_items=num_items,
        instruction=prompt.instruction,
        instruction_len=len(prompt.instruction_ids),
        window=prompt.window,
        window_step=prompt.window_step,
        modalities=tuple(config.compressor.modalities),
        heads=config.heads.names,
        decoder=decoder.to_json(),
        num_parameters=num_parameters,
        disk_bytes=artifact.total_size,
        files={name: int(entry["size"]) for name, entry in artifact.manifest["files"].items()},
        kv_bytes_per_position=per_position,
        kv_bytes_per_user=per_user,
        memory={name: elements * dtype.itemsize for name, dtype in DTYPES.items()},
        users_per_gib={name: parse_bytes("1GiB") // size for name, size in per_user.items()},
    )
