"""Settings of a training run that takes a second on the counting data set."""

from dataclasses import replace

from speeder_engine.training.config import BackboneConfig, Stage, TrainingConfig

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


def together() -> TrainingConfig:
    """What several processes train as one would."""
    stages = (Stage("S1", ("text",), 1, 3e-4), Stage("S2", ("text", "collaborative"), 2, 3e-4))
    config = replace(without_dropout(CONFIG), stages=stages, validation_users=30, averaging=0.9)
    return replace(config, collaborative=replace(config.collaborative, tune=True))
