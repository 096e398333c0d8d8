"""A training run as data: backbone, encoders, stages, losses. Recipes (`recipe.py`) are YAML files of these keys."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

from speeder_engine.checks import is_unicode
from speeder_engine.config import (
    MIXINGS,
    MODALITIES,
    MOST_INT32,
    POSITIONS,
    Config,
    FollowersConfig,
    HeadsConfig,
    LivePriorConfig,
    check,
)
from speeder_engine.errors import shown

PRECISIONS = ("float32", "bfloat16", "auto")
MOST_NEGATIVES = 1000  # every one is a row of the forward pass
MOST_DIM = 16_384  # of item vectors: wider than any backbone
MOST_SEED = 2**62  # what is added to it for each epoch and stage still fits 64 bits
SHORTEST_DAYS, LONGEST_DAYS = 1 / 1440, 36_500.0  # of calendar buckets: a minute, a century


@dataclass(frozen=True)
class BackboneConfig(Config):
    """`source`: a transformers causal LM (hub id or local folder) to tune with LoRA; none: a small one from scratch."""

    source: str | None = None
    vocab_size: int = 2048
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 256
    dropout: float = 0.1  # of attention weights
    residual_dropout: float = 0.0  # of what each block adds to a row; of a small one from scratch
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    warmup_epochs: int = 0  # of a small one as a language model on the catalogue's text, before the stages
    warmup_learning_rate: float = 2e-3

    def check_values(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "lora_rank", "lora_alpha"):
            check(getattr(self, name) > 0, f"backbone.{name} must be positive, is {getattr(self, name)}")
        check(self.vocab_size >= 260, f"backbone.vocab_size: {self.vocab_size} can't hold all bytes; at least 260")
        width = f"backbone.hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads}"
        check(self.hidden_size % (2 * self.num_heads) == 0, width)
        for name in ("dropout", "residual_dropout", "lora_dropout"):
            check(
                0 <= getattr(self, name) < 1,
                f"backbone.{name} must be at least 0 and below 1, is {getattr(self, name)}",
            )
        check(self.warmup_epochs >= 0, f"backbone.warmup_epochs can't be negative, is {self.warmup_epochs}")
        rate = self.warmup_learning_rate
        check(rate > 0, f"backbone.warmup_learning_rate must be positive, is {rate}")
        warm = "backbone.warmup_epochs: only a decoder from scratch is warmed up; leave it out beside backbone.source"
        check(self.source is None or not self.warmup_epochs, warm)
        residual = "backbone.residual_dropout is of a decoder from scratch; beside backbone.source use lora_dropout"
        check(self.source is None or not self.residual_dropout, residual)


@dataclass(frozen=True)
class CollaborativeConfig(Config):
    """S0: the SASRec whose item vectors become the collaborative modality.

    `neighbours`: so many factors of who follows whom stand beside them. `tune`: all go on learning with the model,
    instead of being frozen.
    """

    dim: int = 64
    epochs: int = 8
    learning_rate: float = 3e-3
    dropout: float = 0.3
    neighbours: int = 0
    tune: bool = False

    def check_values(self) -> None:
        for name in ("dim", "epochs", "learning_rate"):
            check(getattr(self, name) > 0, f"collaborative.{name} must be positive, is {getattr(self, name)}")
        check(self.dim % 2 == 0, f"collaborative.dim must be even, is {self.dim}")
        check(self.dim <= MOST_DIM, f"collaborative.dim must be at most {MOST_DIM:,}, is {self.dim}")
        check(self.neighbours >= 0, f"collaborative.neighbours can't be negative, is {self.neighbours}")
        check(0 <= self.dropout < 1, f"collaborative.dropout must be at least 0 and below 1, is {self.dropout}")


@dataclass(frozen=True)
class Stage(Config):
    """One step of MPO: these modalities, the last of them brought in over the first `ramp` of the stage."""

    name: str
    modalities: tuple[str, ...]
    epochs: int
    learning_rate: float
    ramp: float = 0.0

    def check_values(self) -> None:
        strange = sorted(set(self.modalities) - set(MODALITIES))
        check(is_unicode(self.name), f"stage {self.name!r}: its name is no valid Unicode text; mend it")
        check(bool(self.modalities), f"stage {self.name!r}: name at least one modality")
        check(not strange, f"stage {self.name!r}: unknown modalities {strange}; known are {list(MODALITIES)}")
        check(self.epochs >= 0, f"stage {self.name!r}: epochs can't be negative")
        check(self.learning_rate > 0, f"stage {self.name!r}: learning_rate must be positive")
        check(0 <= self.ramp <= 1, f"stage {self.name!r}: ramp is a share of the stage, within 0..1")


DEFAULT_STAGES = (
    Stage("S1", ("text",), 2, 2e-3),
    Stage("S2", ("text", "collaborative"), 6, 2e-3, 0.5),
    Stage("S3", ("text", "collaborative", "image"), 6, 1e-3, 0.5),
)


@dataclass(frozen=True)
class TrainingConfig(Config):
    """Everything that decides a training run besides its data."""

    seed: int = 0
    instruction: str = "Recommend the item this user will want next. The user's history, oldest first:"
    question: str = "The next item's title:\n"  # behind the history, before titles; for heads.title alone
    window: int = 50
    window_step: int = 10
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text_encoder: str | None = None  # hub id, folder or "fitted"; none: the best at hand
    image_encoder: str | None = None
    collaborative: CollaborativeConfig = field(default_factory=CollaborativeConfig)
    stages: tuple[Stage, ...] = DEFAULT_STAGES
    mixing: str = "experts"  # MRC: "experts" (gated), "mean" (experts without a router), "concat" (one perceptron)
    positions: str = "added"  # SPAE, absolute: "added" to tokens, "token" (a row of its own before each item), "none"
    calendar_days: float = 0.0  # interaction times as buckets of so many days; 0: times are not read
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    live_prior: LivePriorConfig | None = None  # none: the prior is the popularity of all training events
    followers: FollowersConfig | None = None  # who follows whom as a part of the scores; none: left out
    batch_size: int = 128
    weight_decay: float = 0.05
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    token_dropout: float = 0.3
    modality_dropout: float = 0.1
    time_dropout: float = 0.1  # histories shown without their times
    label_smoothing: float = 0.0
    cold_negatives: bool = True  # false: items without a training event stay out of the full softmax
    averaging: float = 0.0  # decay a step of the averaged weights that are validated and kept; 0: the last weights
    rank_negatives: int = 7
    retrieve_weight: float = 1.0  # 0: a model that answers with titles alone
    rank_weight: float = 0.3
    order_weight: float = 0.1
    title_weight: float = 0.0
    title_targets: int = 1  # titles asked for in each segment, each behind another part of its history
    calibrate: bool = False  # last, weigh prior and followers in retrieve scores by NDCG@10 on the validation users
    judge: str | None = None  # of epochs: "ndcg@10" or "title_probability"; none: the first where retrieve is trained
    patience: int = 3
    validation_users: int = 2000
    precision: str = "float32"  # of forward passes: "bfloat16", or "auto" for that where the hardware has it
    accumulate: int = 1  # batches an optimizer step
    sampled_items: int = 0  # negatives a softmax; 0: all up to `full_softmax_items`, 8,192 drawn beyond
    full_softmax_items: int = 50_000
    packing: bool = False  # segments share rows of the backbone; false: padded, in batches of like length
    checkpoint_layers: bool = False  # compute the backbone's layers again in the backward pass, instead of keeping them

    def check_values(self) -> None:
        check(self.precision in PRECISIONS, f"precision: {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        check(self.accumulate > 0, f"accumulate must be positive, is {self.accumulate}")
        for name in ("sampled_items", "full_softmax_items"):
            check(getattr(self, name) >= 0, f"{name} can't be negative, is {getattr(self, name)}")
        check(len(self.stages) > 0, "stages: at least one is needed")
        self._check_last_stage()
        for name in (
            "batch_size",
            "window",
            "patience",
            "validation_users",
            "max_grad_norm",
            "rank_negatives",
            "title_targets",
        ):
            check(getattr(self, name) > 0, f"{name} must be positive, is {getattr(self, name)}")
        for name in ("text_encoder", "image_encoder"):
            value = getattr(self, name)
            check(value is None or bool(value.strip()), f"{name}: is empty; name a folder or hub id, or leave it out")
        self._check_bounds()
        check(
            self.rank_negatives <= MOST_NEGATIVES,
            f"rank_negatives must be at most {MOST_NEGATIVES}, is {self.rank_negatives}",
        )
        step = f"window_step must be within 1..window ({self.window}), is {self.window_step}"
        check(1 <= self.window_step <= self.window, step)
        check(self.mixing in MIXINGS, f"mixing: {self.mixing!r}; choose one of {', '.join(MIXINGS)}")
        check(self.positions in POSITIONS, f"positions: {self.positions!r}; choose one of {', '.join(POSITIONS)}")
        cold = "cold_negatives: false and label_smoothing contradict each other; leave one of them out"
        check(self.cold_negatives or not self.label_smoothing, cold)
        live = "live_prior and heads.prior: false contradict each other; leave one of them out"
        check(self.live_prior is None or self.heads.prior, live)
        dropouts = ("token_dropout", "modality_dropout", "time_dropout")
        for name in (*dropouts, "warmup", "label_smoothing", "averaging"):
            check(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1, is {getattr(self, name)}")
        for name in ("retrieve", "rank", "title"):
            both = f"give the head a weight, or leave both out ({name}: false, {name}_weight: 0)"
            weighed = getattr(self, f"{name}_weight") > 0
            check(getattr(self.heads, name) == weighed, f"heads.{name} and {name}_weight: {both}")
        check(not self.heads.title or bool(self.question), "question: heads.title needs one; it can't be empty")
        calibrated = "calibrate and heads.retrieve: false contradict each other; it weighs that head's scores"
        check(self.heads.retrieve or not self.calibrate, calibrated)
        judges = {"ndcg@10": self.heads.retrieve, "title_probability": self.heads.title}
        choice = "'ndcg@10' with heads.retrieve or 'title_probability' with heads.title"
        check(self.judge is None or judges.get(self.judge, False), f"judge: {self.judge!r}; choose {choice}")
        nothing = "retrieve_weight and title_weight: both are 0; a model needs one of these heads"
        check(self.retrieve_weight > 0 or self.title_weight > 0, nothing)
        for name in ("retrieve_weight", "rank_weight", "order_weight", "title_weight", "weight_decay"):
            check(getattr(self, name) >= 0, f"{name} can't be negative, is {getattr(self, name)}")

    def _check_last_stage(self) -> None:
        """Items are served with every modality in, as the last stage was validated."""
        last = self.trained_stages[-1]
        left_out = [name for name in self.modalities if name not in last.modalities]
        check(
            not left_out,
            f"stage {last.name!r}: the last that is trained leaves out {', '.join(left_out)}, which earlier ones had; "
            "name it there, too, or nowhere",
        )

    def _check_bounds(self) -> None:
        """What would only fail once it is computed with or saved."""
        check(0 <= self.seed <= MOST_SEED, f"seed must be within 0..{MOST_SEED}, is {self.seed}")
        for name in ("instruction", "question"):
            value = getattr(self, name)
            check(is_unicode(value), f"{name}: {shown(value)} is no valid Unicode text; mend it")
        days = (
            f"calendar_days must be 0 or within a minute ({SHORTEST_DAYS:.1g}) and a century, is {self.calendar_days}"
        )
        check(self.calendar_days == 0 or SHORTEST_DAYS <= self.calendar_days <= LONGEST_DAYS, days)
        for each in fields(self):
            value = getattr(self, each.name)
            small = each.name == "seed" or not isinstance(value, int) or value <= MOST_INT32
            check(small, f"{each.name} must be at most {MOST_INT32}, is {value}")

    @property
    def metric(self) -> str:
        """What an epoch is judged by, on validation users; the higher the better."""
        return self.judge or ("ndcg@10" if self.retrieve_weight else "title_probability")

    @property
    def trained_stages(self) -> tuple[Stage, ...]:
        """Those with an epoch or more; all where there is none, of a model that is only made."""
        return tuple(stage for stage in self.stages if stage.epochs) or self.stages

    @property
    def modalities(self) -> tuple[str, ...]:
        """All that some trained stage uses, in the fixed order."""
        used = {name for stage in self.trained_stages for name in stage.modalities}
        return tuple(name for name in MODALITIES if name in used)

    def stages_with(self, modalities: Collection[str]) -> tuple[Stage, ...]:
        """The stages cut to these modalities, those that some item has; none that is left without any. A stage whose
        own newest is gone, or was there before, has nothing to ramp in."""
        stages: list[Stage] = []
        trained: set[str] = set()
        for stage in self.stages:
            left = tuple(name for name in stage.modalities if name in modalities)
            newest = stage.modalities[-1]
            ramp = stage.ramp if newest in left and newest not in trained else 0.0
            stages += [replace(stage, modalities=left, ramp=ramp)] if left else []
            trained |= {*left} if stage.epochs else set()
        return tuple(stages)
