"""Settings of a training run that takes a second on the counting data set."""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModel

from speeder_engine.checkpoint import Checkpoint
from speeder_engine.training.backbone import train_tokenizer
from speeder_engine.training.config import BackboneConfig, Stage, TrainingConfig
from speeder_engine.training.fit import train

CONFIG = TrainingConfig(
    instruction="Next:",
    window=10,
    window_step=5,
    backbone=BackboneConfig(vocab_size=270, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64),
    stages=(
        Stage("S1", ("text",), 2, 5e-3),
        Stage("S2", ("text", "collaborative"), 3, 5e-3, 0.5),
    ),
    batch_size=16,
    token_dropout=0.1,
    patience=2,
)


def one_stage(epochs: int = 2, **more) -> TrainingConfig:
    """The same with text alone, for so many epochs."""
    return replace(CONFIG, stages=(Stage("S1", ("text",), epochs, 5e-3),), **more)


def without_dropout(config: TrainingConfig) -> TrainingConfig:
    """Nothing of a step is random but its batch."""
    backbone = replace(config.backbone, dropout=0.0)
    return replace(config, backbone=backbone, token_dropout=0.0, modality_dropout=0.0)


def pretrained(family, folder, **more):
    """A tiny model of random weights as a transformers folder."""
    tokenizer = train_tokenizer(["some words"], 270)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "intermediate_size": 37,
    }
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(family, **shape, **more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return replace(CONFIG, backbone=BackboneConfig(source=str(folder)), stages=(Stage("S1", ("text",), 1, 5e-3),))


def together() -> TrainingConfig:
    """What several processes train as one would."""
    stages = (Stage("S1", ("text",), 1, 3e-4), Stage("S2", ("text", "collaborative"), 2, 3e-4))
    config = replace(without_dropout(CONFIG), stages=stages, validation_users=120, averaging=0.9, calibrate=True)
    return replace(config, collaborative=replace(config.collaborative, tune=True))


def log_of(out) -> list[dict]:
    """The records of a run into `out`, one an epoch."""
    return [json.loads(line) for line in out.with_name(f"{out.name}.log.jsonl").read_text().splitlines()]


def resumed_after(saves: int, split, config: TrainingConfig, out) -> Checkpoint:
    """What a run leaves in `out` that is interrupted right after so many saves, and then resumed."""
    save, saved = Checkpoint.save, []

    def stop(self, folder):
        save(self, folder)
        saved.append(folder)
        if len(saved) == saves:
            raise KeyboardInterrupt

    with patch.object(Checkpoint, "save", stop), pytest.raises(KeyboardInterrupt):
        train(split, config, out)
    return train(split, config, out, resume=True)
