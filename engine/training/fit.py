"""From a dataset to a checkpoint: features, backbone, staged training, and what a resumed run needs in between."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speeder_engine.catalogue import ItemTable
from speeder_engine.checkpoint import Checkpoint, TrainingState, check_replaceable
from speeder_engine.config import CompressorConfig, ModelConfig, PromptConfig
from speeder_engine.data.splits import Histories, Split
from speeder_engine.errors import ConfigError, DataError
from speeder_engine.evaluation.model_scorer import ModelScorer
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.files import write_atomic
from speeder_engine.models.families import decoder_config
from speeder_engine.models.recommender import Recommender
from speeder_engine.training.backbone import embedding_scale, instruction_ids, make_backbone
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.features import ItemFeatures, make_features
from speeder_engine.training.trainer import Trainer


def train(
    split: Split, config: TrainingConfig, out: Path, *, cache_dir: Path | None = None, resume: bool = False
) -> Checkpoint:
    """Trains on `split.train` and leaves a checkpoint in `out`, saved after every epoch.

    cache_dir: where encoded features are kept (default: beside `out`). resume: go on from the epoch `out` stopped at;
    raises ConfigError where it was made with other settings or other data.
    """
    if not len(split.users):
        raise DataError(f"{split.dataset.name}: no user has the three interactions that training and validation need")
    check_replaceable(out)
    if resume:
        checkpoint = _resumable(split, config, out)
    else:
        torch.manual_seed(config.seed)
        made = make_features(split, config, cache_dir or out.parent / f"{out.name}-cache")
        checkpoint = new_checkpoint(split, config, made)
        write_atomic(_log_path(out), b"")
    if checkpoint.state is None:
        return checkpoint
    trainer = _trainer(checkpoint, split, config, _log_path(out))

    def save(state: TrainingState) -> None:
        checkpoint.state = state
        checkpoint.save(out)

    trainer.run(checkpoint.state, save)
    checkpoint.state = None
    checkpoint.metrics = trainer.history[-1] if trainer.history else checkpoint.metrics
    checkpoint.save(out)
    return checkpoint


def _log_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.log.jsonl")


def new_checkpoint(split: Split, config: TrainingConfig, made: ItemFeatures) -> Checkpoint:
    """An untrained model over these features."""
    items = split.dataset.items
    backbone, tokenizer = make_backbone(config.backbone, [config.instruction, *items.texts])
    prompt = PromptConfig(
        config.instruction, instruction_ids(tokenizer, config.instruction), config.window, config.window_step
    )
    hf = backbone.config
    widths = {name: made.features[name].dim for name in config.modalities if name in made.features}
    compressor = CompressorConfig(widths, hf.hidden_size, scale=embedding_scale(backbone))  # type: ignore[union-attr,arg-type]
    model = Recommender(ModelConfig(decoder_config(hf), compressor, prompt, config.heads), backbone)
    prior = popularity_prior(split.train, len(items)) if config.heads.prior else np.zeros(len(items), np.float32)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        table=ItemTable.fresh(items.item_ids, items.titles, prior),
        features=made.features,
        encoders=made.encoders,
        training={"config": config.to_json(), "data": split.dataset.fingerprint()},
        state=TrainingState(),
    )


def popularity_prior(train: Histories, num_items: int) -> NDArray[np.float32]:
    """log(1 + training events) of every item, standardised; frozen at training time, so blind to the query's."""
    counts = np.log1p(np.bincount(train.rows, minlength=num_items).astype(np.float64))
    prior: NDArray[np.float32] = ((counts - counts.mean()) / max(counts.std(), 1e-6)).astype(np.float32)
    return prior


def _trainer(checkpoint: Checkpoint, split: Split, config: TrainingConfig, log: Path) -> Trainer:
    model, prior = checkpoint.model, torch.from_numpy(checkpoint.table.prior)
    names = model.compressor.modalities
    kept = [(stage, tuple(name for name in stage.modalities if name in names)) for stage in config.stages]
    config = replace(config, stages=tuple(replace(stage, modalities=left) for stage, left in kept if left))
    rng = np.random.default_rng(config.seed)
    users = np.sort(rng.permutation(split.users)[: config.validation_users])
    queries = split.queries("validation", users)

    def validate(tokens: Tensor) -> dict[str, float]:
        with torch.no_grad():
            scorer = ModelScorer(model, tokens, prior.to(tokens.device))
            report = evaluate(scorer, queries, None, ks=(10,), show_progress=False)
        return {name: float(report.metrics[name]) for name in ("hr@10", "ndcg@10")}

    batches = TrainingBatches(split.train, split.dataset.num_items, config)
    return Trainer(model, checkpoint.features, prior, batches, validate, config, log)


def _resumable(split: Split, config: TrainingConfig, out: Path) -> Checkpoint:
    checkpoint = Checkpoint.load(out)
    if TrainingConfig.from_json(checkpoint.training["config"]) != config:
        raise ConfigError(f"{out}: was trained with other settings; resume with the same recipe, or train anew")
    if checkpoint.training["data"] != split.dataset.fingerprint():
        raise ConfigError(f"{out}: was trained on other data; resume with the same data, or train anew")
    return checkpoint
