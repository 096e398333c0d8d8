"""From a dataset to a checkpoint: features, backbone, staged training, and what a resumed run needs in between."""

import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speeder_engine.catalogue import ItemTable
from speeder_engine.checkpoint import Checkpoint, TrainingState, check_replaceable
from speeder_engine.checks import given_path
from speeder_engine.config import CompressorConfig, ModelConfig
from speeder_engine.data.splits import Histories, Queries, Split
from speeder_engine.errors import ConfigError, DataError, SpeederWarning
from speeder_engine.evaluation.model_scorer import ModelScorer, query_prior
from speeder_engine.evaluation.protocols import evaluate
from speeder_engine.files import ensure_writable, holds_nothing
from speeder_engine.forks import claim_threads
from speeder_engine.live_prior import LivePopularity
from speeder_engine.models.families import decoder_config
from speeder_engine.models.follower_table import FollowerTable
from speeder_engine.models.prior import ConstantPrior, LivePrior, Prior
from speeder_engine.models.recommender import Recommender
from speeder_engine.title_text import TitleText, answer_text
from speeder_engine.training.backbone import checkpoint_layers, drop_residuals, embedding_scale
from speeder_engine.training.batches import TrainingBatches
from speeder_engine.training.calibration import calibrate, scale
from speeder_engine.training.census import warn_of_gaps
from speeder_engine.training.config import TrainingConfig
from speeder_engine.training.features import ItemFeatures, make_features
from speeder_engine.training.follower_counts import follower_table
from speeder_engine.training.incremental import continued_checkpoint
from speeder_engine.training.language import Language, make_language
from speeder_engine.training.language_warmup import warm_up
from speeder_engine.training.parallel import ALONE, Processes
from speeder_engine.training.run_log import RunLog
from speeder_engine.training.sampled import make_sampler
from speeder_engine.training.title_targets import TitleTargets, refuse_untitled
from speeder_engine.training.title_validation import title_probability
from speeder_engine.training.token_table import TokenTable
from speeder_engine.training.trained_on import trained_on
from speeder_engine.training.trainer import DEVICE, Trainer, Validate


def train(
    split: Split,
    config: TrainingConfig,
    out: str | Path,
    *,
    cache_dir: Path | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
    processes: Processes = ALONE,
    start_from: Checkpoint | None = None,
) -> Checkpoint:
    """Trains on `split.train` and leaves a checkpoint in `out`, saved after every epoch.

    cache_dir: where encoded features are kept (default: beside `out`). resume: go on from the epoch `out` stopped at,
    or begin where none was saved; raises ConfigError where it was made with other settings or other data. tensorboard:
    a folder for its scalars. processes: those that train together, each calling this; the first writes. start_from: a
    finished checkpoint whose model goes on learning (that very object), over the items of `split`; it is validated
    before it is trained.
    """
    claim_threads("train")
    out = given_path(out, "train", "the checkpoint to write")
    _refuse_early(split, config)
    check_replaceable(out)
    first = processes.is_first
    if resume and holds_nothing(out):
        warnings.warn(f"{out}: no epoch was saved there yet; begins from the first", SpeederWarning, stacklevel=2)
        resume = False
    with RunLog(_log_path(out) if first else None, tensorboard if first else None) as log:
        if resume:
            checkpoint = _resumable(split, config, out)
            if first and checkpoint.state is not None:
                log.rewind(checkpoint.state.epochs_done)
        else:
            torch.manual_seed(config.seed)
            with processes.first_before_others():
                checkpoint = _beginning(split, config, cache_dir or out.parent / f"{out.name}-cache", start_from)
            if first:
                warn_of_gaps(split, checkpoint.features)
                log.begin_anew()
        state, learned_before = checkpoint.state, start_from is not None and not resume
        if state is not None:
            _train(checkpoint, state, split, config, out, log, processes, validate_first=learned_before)
    return checkpoint


def _train(
    checkpoint: Checkpoint,
    state: TrainingState,
    split: Split,
    config: TrainingConfig,
    out: Path,
    log: RunLog,
    processes: Processes,
    *,
    validate_first: bool,
) -> None:
    """All that is still to do of a run, in place."""
    # a model that is trained in shards can't be saved: its weights are gathered into the checkpoint's
    trained = checkpoint if processes.size == 1 else replace(checkpoint, model=deepcopy(checkpoint.model))
    trainer = _trainer(trained, split, config, log, processes)

    def save(state: TrainingState | None) -> None:
        if trained is not checkpoint:
            trainer.weights.gather_into({"model": checkpoint.model})
        checkpoint.state = state
        # between epochs too: a run that is resumed after its last one has no record of its own
        checkpoint.metrics = trainer.kept or checkpoint.metrics
        if state is None:
            _take_learned(checkpoint, trainer, split)
        if processes.is_first:
            checkpoint.save(out)
        processes.wait()

    if validate_first:
        trainer.validate_untrained(state)
    with drop_residuals(trained.model.backbone, config.backbone.residual_dropout):
        trainer.run(state, save)
    if config.calibrate:
        _calibrate(trained, trainer, state, split)
    save(None)


def _calibrate(checkpoint: Checkpoint, trainer: Trainer, state: TrainingState, split: Split) -> None:
    """Weighs the terms of the model that is kept anew, and keeps what it is validated with then."""
    config, processes = trainer.config, trainer.processes
    tokens = trainer.tokens(trainer.share(config.trained_stages[-1], 1.0)).detach()
    checkpoint.model.eval()
    scorer = ModelScorer(checkpoint.model, tokens, query_prior(checkpoint, split, "validation"))
    factors = processes.agreed(calibrate(scorer, validation_queries(split, config)), trainer.device)
    scale(checkpoint.model, factors)
    trainer.validate_calibrated(state, tokens, factors)


def _refuse_early(split: Split, config: TrainingConfig) -> None:
    """What can't be trained on these interactions, before minutes of encoding and fitting."""
    name, num_items, train = split.dataset.name, split.dataset.num_items, split.train
    if not len(split.users):
        raise DataError(f"{name}: no user has the three interactions that training and validation need")
    if num_items < 2:
        raise DataError(f"{name}: there is one item, and nothing to tell it from; add others")
    if train.lengths.max() < 2:
        raise DataError(
            f"{name}: each user's last two interactions are held out, and nobody has two more to learn from"
        )
    if config.live_prior is not None:
        LivePopularity.of_events(config.live_prior, num_items, train.times, train.rows)
    make_sampler(config, np.bincount(train.rows, minlength=num_items))
    if config.heads.title:
        refuse_untitled([split.dataset.items.titles[row] for row in np.unique(train.rows)])


def _beginning(split: Split, config: TrainingConfig, cache_dir: Path, start_from: Checkpoint | None) -> Checkpoint:
    # before minutes of encoding and fitting
    ensure_writable(cache_dir)
    if start_from is None:
        language = make_language(split, config)
        return new_checkpoint(split, config, language, make_features(split, config, cache_dir))
    return continued_checkpoint(start_from, split, config, item_prior(split, config), cache_dir)


def _take_learned(checkpoint: Checkpoint, trainer: Trainer, split: Split) -> None:
    """What stood still until now: tuned item vectors, and the prior as it stands after the last training event."""
    checkpoint.features |= trainer.table.learned_features()
    live, weights = checkpoint.model.config.live_prior, checkpoint.model.prior_weights
    if live is not None and weights is not None:
        learned = replace(live, weights=tuple(float(weight) for weight in weights.detach()))
        checkpoint.model.config = replace(checkpoint.model.config, live_prior=learned)
        train = split.train
        popularity = LivePopularity.of_events(learned, split.dataset.num_items, train.times, train.rows)
        checkpoint.table = replace(checkpoint.table, prior=popularity.prior(int(popularity.times[-1]) + 1))
    checkpoint.frozen_in = None


def _log_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.log.jsonl")


def new_checkpoint(split: Split, config: TrainingConfig, language: Language, made: ItemFeatures) -> Checkpoint:
    """An untrained model over these features."""
    items, (body, tokenizer, head), prompt = split.dataset.items, language.backbone, language.prompt
    texts = [text for text in [*map(answer_text, items.titles), *items.texts] if text]
    warm_up(body, tokenizer, texts, config.backbone, config.seed)
    hf: Any = body.config
    widths = {name: made.features[name].dim for name in config.modalities if name in made.features}
    compressor = CompressorConfig(widths, hf.hidden_size, scale=embedding_scale(body), mixing=config.mixing)
    followers = make_followers(split, config)
    shape = ModelConfig(
        decoder_config(hf),
        compressor,
        prompt,
        config.heads,
        live_prior=config.live_prior,
        followers=None if followers is None else followers.config,
        vocabulary_tied=head is None,
    )
    model = Recommender(shape, body)
    model.followers = followers
    if head is not None:
        model.vocabulary_head = nn.Parameter(head, requires_grad=False)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        table=ItemTable.fresh(items.item_ids, items.titles, item_prior(split, config)),
        features=made.features,
        encoders=made.encoders,
        training=trained_on(split, config),
        state=TrainingState(),
    )


def make_followers(split: Split, config: TrainingConfig) -> FollowerTable | None:
    """Who follows whom in the training histories, where the recipe asks for it."""
    if config.followers is None:
        return None
    return follower_table(config.followers, split.train, split.dataset.num_items)


def item_prior(split: Split, config: TrainingConfig) -> NDArray[np.float32]:
    """`popularity_prior` of the training events; zeros for a model without a prior."""
    num_items = split.dataset.num_items
    return popularity_prior(split.train, num_items) if config.heads.prior else np.zeros(num_items, np.float32)


def popularity_prior(train: Histories, num_items: int) -> NDArray[np.float32]:
    """log(1 + training events) of every item, standardised; frozen at training time, so blind to the query's."""
    counts = np.log1p(np.bincount(train.rows, minlength=num_items).astype(np.float64))
    prior: NDArray[np.float32] = ((counts - counts.mean()) / max(counts.std(), 1e-6)).astype(np.float32)
    return prior


def _trainer(
    checkpoint: Checkpoint, split: Split, config: TrainingConfig, log: RunLog, processes: Processes
) -> Trainer:
    model = checkpoint.model
    config = replace(config, stages=config.stages_with(model.compressor.modalities))
    if config.checkpoint_layers:
        checkpoint_layers(model.backbone)
    tuned = ("collaborative",) if config.collaborative.tune else ()
    table = TokenTable(model.compressor, checkpoint.features, config.modality_dropout, tuned)
    model.to(DEVICE)
    table.to(DEVICE)
    if processes.size > 1:
        processes.same(model, table)
        processes.shard(model.backbone)
    titles = _title_targets(checkpoint, config)
    batches = TrainingBatches(split.train, split.dataset.num_items, config, model.config.prompt.calendar, titles)
    validate = _validation(checkpoint, split, config, titles)
    return Trainer(model, table, training_prior(checkpoint, split), batches, validate, config, log, processes)


def _title_targets(checkpoint: Checkpoint, config: TrainingConfig) -> TitleTargets | None:
    if not config.heads.title:
        return None
    text = TitleText(checkpoint.tokenizer.backend_tokenizer, checkpoint.model.config.decoder.vocab_size)
    return TitleTargets(checkpoint.table.titles, text, config.title_targets)


def training_prior(checkpoint: Checkpoint, split: Split) -> Prior:
    """What is known at each training event: of a live prior, the training events before it."""
    model, train = checkpoint.model, split.train
    if model.prior_weights is None or model.config.live_prior is None:
        return ConstantPrior(torch.from_numpy(checkpoint.table.prior).to(DEVICE))
    popularity = LivePopularity.of_events(model.config.live_prior, split.dataset.num_items, train.times, train.rows)
    return LivePrior(popularity, model.prior_weights, DEVICE)


def validation_queries(split: Split, config: TrainingConfig) -> Queries:
    """Of the users that a run is validated on."""
    rng = np.random.default_rng(config.seed)
    return split.queries("validation", np.sort(rng.permutation(split.users)[: config.validation_users]))


def _validation(checkpoint: Checkpoint, split: Split, config: TrainingConfig, titles: TitleTargets | None) -> Validate:
    queries = validation_queries(split, config)
    prior = query_prior(checkpoint, split, "validation")

    def validate(tokens: Tensor) -> dict[str, float]:
        with torch.no_grad():
            scorer, metrics = ModelScorer(checkpoint.model, tokens, prior), {}
            if config.heads.retrieve:
                report = evaluate(scorer, queries, None, ks=(10,), show_progress=False)
                metrics = {name: float(report.metrics[name]) for name in ("hr@10", "ndcg@10")}
            if titles is not None:
                metrics["title_probability"] = title_probability(scorer, queries, titles)
        return metrics

    return validate


def _resumable(split: Split, config: TrainingConfig, out: Path) -> Checkpoint:
    checkpoint = Checkpoint.load(out)
    if TrainingConfig.from_json(checkpoint.training["config"]) != config:
        raise ConfigError(f"{out}: was trained with other settings; resume with the same recipe, or train anew")
    known = trained_on(split, config)
    if checkpoint.training["data"] != known["data"]:
        raise ConfigError(f"{out}: was trained on other data; resume with the same data, or train anew")
    # features, tokens and counts of the checkpoint are in the order of its items
    same_events = checkpoint.training.get("events", known["events"]) == known["events"]
    if checkpoint.table.item_ids != split.dataset.item_ids or not same_events:
        raise ConfigError(
            f"{out}: was trained on the same data in another order, or with other times; resume with the files as they "
            "were, or train anew"
        )
    return checkpoint
