"""Settings as frozen dataclasses: checked when made, JSON in and out, unknown keys refused."""

import dataclasses
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Self, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from speeder_engine.errors import ConfigError, shown

MODALITIES = ("text", "image", "collaborative")
MIXINGS = ("experts", "mean", "concat")
POSITIONS = ("added", "token", "none")
MAX_TITLE_TOKENS = 64  # of a generated answer, unless more are asked for
MOST_ANSWER_IDS = 128  # of a longer title the beginning counts
MOST_INT32 = 2**31 - 1
MOST_BYTES = 2**60
NUMBERS = {int: Integral, float: Real}
EXACT_LEN_ENDS = "attention window slides or its rotary frequencies change (sliding_window, rope_type)"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class Config:
    """Base of all settings: checked when made, `to_json` and `from_json` inverse, nested settings included."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in dataclasses.fields(self):
            value = _typed(hints[each.name], getattr(self, each.name), f"{type(self).__name__}.{each.name}")
            object.__setattr__(self, each.name, value)
        self.check_values()

    def check_values(self) -> None:
        """Raises ConfigError for values that can't be. The fields' types have been checked by then."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        check(isinstance(value, dict), f"{cls.__name__}: expected an object, got {type(value).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(value) - known, key=str)  # in YAML a key may be a number
        check(not unknown, f"{cls.__name__}: unknown keys {unknown}; known are {sorted(known)}")
        try:
            return cls(**value)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from None


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` wants it: nested settings and tuples out of JSON too; numbers and strings are checked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        arms = [arg for arg in args if arg is not types.NoneType]
        if len(arms) > 1:
            fitting = [arm for arm in arms if _is(arm, value)]
            check(bool(fitting), f"{where}: expected {' or '.join(arm.__name__ for arm in arms)}, got {shown(value)}")
            arms = fitting
        return _typed(arms[0], value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_json(value)
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{where}: expected a list, got {shown(value)}")
        return tuple(_typed(args[0], item, where) for item in value)
    if origin is dict:
        check(isinstance(value, dict), f"{where}: expected an object, got {shown(value)}")
        return {key: _typed(args[1], item, where) for key, item in value.items()}
    right = _is(hint, value)
    if right and hint is float:
        check(abs(value) <= sys.float_info.max, f"{where}: expected a finite number, such as 1e6, got {shown(value)}")
    if right and hint is int:  # which no message could spell
        check(abs(value) <= sys.float_info.max, f"{where}: expected a number of fewer digits, got {shown(value)}")
    check(right, f"{where}: expected {getattr(hint, '__name__', hint)}, got {shown(value)}")
    return hint(value) if hint in NUMBERS else value  # a number of numpy's is Python's from here on


def _is(hint: Any, value: Any) -> bool:
    """Whether a value is of a plain type; true and false are no numbers."""
    return isinstance(value, NUMBERS.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


@dataclass(frozen=True)
class DecoderConfig(Config):
    """The shape of a decoder, in the words of its Hugging Face config; the defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    attention_scaling: float = 1.0  # on the rotary cos and sin
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norms of single heads' q and k, before they are rotated
    max_positions: int | None = None  # the longest prompt the backbone was made for; None: not known
    exact_len: int | None = None  # beyond it a window would slide or the rotary frequencies change; None: never

    def check_values(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            check(getattr(self, name) > 0, f"DecoderConfig.{name} must be positive, is {getattr(self, name)}")
        check(self.num_heads % self.num_kv_heads == 0, "DecoderConfig: num_heads must be a multiple of num_kv_heads")
        check(self.head_dim % 2 == 0, "DecoderConfig.head_dim must be even (rotary positions turn pairs)")


@dataclass(frozen=True)
class CompressorConfig(Config):
    """MRC: which modalities, how wide their features are, and how their experts are mixed."""

    modalities: dict[str, int]  # name -> width of its feature vectors
    hidden_size: int
    temperature: float = 1.0
    scale: float = 1.0  # root mean square of one element of the backbone's embedding rows
    mixing: str = "experts"  # how modalities become one token: "experts" (gated), "mean" (ungated), "concat" (one MLP)

    def check_values(self) -> None:
        check(bool(self.modalities), "CompressorConfig: at least one modality is needed")
        strange = sorted(set(self.modalities) - set(MODALITIES))
        check(not strange, f"CompressorConfig: unknown modalities {strange}; known are {list(MODALITIES)}")
        check(all(width > 0 for width in self.modalities.values()), "CompressorConfig: feature widths must be positive")
        check(self.temperature > 0, f"CompressorConfig.temperature must be positive, is {self.temperature}")
        check(self.mixing in MIXINGS, f"CompressorConfig.mixing: {self.mixing!r}; choose one of {', '.join(MIXINGS)}")
        check(self.scale > 0, f"CompressorConfig.scale must be positive, is {self.scale}")


@dataclass(frozen=True)
class CalendarConfig(Config):
    """Buckets of absolute time (never ages, which would change cached rows): bucket 1 begins at `first_second`, times
    before it and after the last count to the nearest; bucket 0 is a time that is not known."""

    first_second: int
    bucket_seconds: int
    num_buckets: int

    def check_values(self) -> None:
        check(self.bucket_seconds > 0, f"CalendarConfig.bucket_seconds must be positive, is {self.bucket_seconds}")
        check(self.num_buckets > 0, f"CalendarConfig.num_buckets must be positive, is {self.num_buckets}")

    def buckets(self, times: Sequence[float] | NDArray[np.int64]) -> NDArray[np.int32]:
        """Unix seconds [n] -> buckets [n]."""
        passed = (np.asarray(times, np.float64) - self.first_second) // self.bucket_seconds
        return (np.clip(passed, 0, self.num_buckets - 1) + 1).astype(np.int32)


@dataclass(frozen=True)
class PromptConfig(Config):
    """The one layout of all prompts: instruction, then a window over the history that slides in steps."""

    instruction: str
    instruction_ids: tuple[int, ...]
    window: int = 50
    window_step: int = 10
    question: str = ""  # behind the history, before titles
    question_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()  # tokens that end a generated text, as a newline does
    calendar: CalendarConfig | None = None  # of interaction times; none: they are not read
    positions: str = "added"  # position prompts: on the item's token, a "token" of their own before it, or "none"

    def check_values(self) -> None:
        check(len(self.instruction_ids) > 0, "PromptConfig.instruction_ids: the instruction can't be empty")
        choice = f"PromptConfig.positions: {self.positions!r}; choose one of {', '.join(POSITIONS)}"
        check(self.positions in POSITIONS, choice)
        check(self.window >= 1, f"PromptConfig.window must be at least 1, is {self.window}")
        step = f"PromptConfig.window_step must be within 1..window ({self.window}), is {self.window_step}"
        check(1 <= self.window_step <= self.window, step)

    @property
    def rows_per_item(self) -> int:
        return 2 if self.positions == "token" else 1


@dataclass(frozen=True)
class HeadsConfig(Config):
    """What the model answers with: the heads it was trained with. `rank_residual` adds the retrieve score to a
    candidate's own head."""

    retrieve: bool = True
    rank: bool = True
    rank_residual: bool = True
    prior: bool = True
    title: bool = False
    title_score: str = "sum"  # of a title's log-probabilities, or their mean

    def check_values(self) -> None:
        scores = f"HeadsConfig.title_score: {self.title_score!r}; choose 'sum' or 'mean'"
        check(self.title_score in ("sum", "mean"), scores)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The heads that were trained, in the order retrieve, rank, title."""
        return tuple(name for name in ("retrieve", "rank", "title") if getattr(self, name))


@dataclass(frozen=True)
class LivePriorConfig(Config):
    """The prior is popularity as it stands: log-counts decayed with each half-life, weighed."""

    half_lives_days: tuple[float, ...] = (2.0, 14.0)
    weights: tuple[float, ...] = ()  # learned in training

    def check_values(self) -> None:
        positive = bool(self.half_lives_days) and all(days > 0 for days in self.half_lives_days)
        check(positive, f"live_prior.half_lives_days: at least one, all positive; are {list(self.half_lives_days)}")
        once = f"live_prior.half_lives_days: each once; are {list(self.half_lives_days)}"
        check(len({*self.half_lives_days}) == len(self.half_lives_days), once)
        count = f"live_prior.weights: {len(self.weights)} for {len(self.half_lives_days)} half-lives"
        check(len(self.weights) in (0, len(self.half_lives_days)), count)


@dataclass(frozen=True)
class FollowersConfig(Config):
    """Who follows whom as a part of the scores (models/follower_table.py): followers stand at most `window` events
    behind, or before as well unless `forward`; a history's `last` items count, each `decay` times the weight of the one
    after it; `discounts` are exponents of the counts of the followed and the following item; each item keeps its `keep`
    nearest followers. A share `dropout` of training segments is scored without, so that the rest of the model learns on
    its own."""

    window: int = 10
    forward: bool = True
    last: int = 20
    decay: float = 0.7
    discounts: tuple[float, ...] = (0.5, 0.3)
    keep: int = 200
    dropout: float = 0.0
    num_items: int = 0  # of the table, and its pairs: counted in training
    num_pairs: int = 0

    def check_values(self) -> None:
        for name in ("window", "last", "keep"):
            value = getattr(self, name)
            check(0 < value <= MOST_INT32, f"followers.{name} must be within 1..{MOST_INT32}, is {value}")
        check(0 < self.decay <= 1, f"followers.decay must be within 0..1 and not 0, is {self.decay}")
        check(0 <= self.dropout < 1, f"followers.dropout must be at least 0 and below 1, is {self.dropout}")
        two = len(self.discounts) == 2 and min(self.discounts) >= 0
        check(two, f"followers.discounts: two exponents, none negative; are {list(self.discounts)}")
        for name in ("num_items", "num_pairs"):
            check(getattr(self, name) >= 0, f"followers.{name} can't be negative, is {getattr(self, name)}")

    def sized(self, num_items: int, num_pairs: int) -> "FollowersConfig":
        return dataclasses.replace(self, num_items=num_items, num_pairs=num_pairs)


@dataclass(frozen=True)
class ModelConfig(Config):
    """Everything that decides what a trained model computes."""

    decoder: DecoderConfig
    compressor: CompressorConfig
    prompt: PromptConfig
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    live_prior: LivePriorConfig | None = None  # none: the prior is a constant of the catalogue
    followers: FollowersConfig | None = None  # none: scores know nothing of single pairs of items
    vocabulary_tied: bool = True  # one matrix embeds tokens and scores them; matters to titles alone

    def check_values(self) -> None:
        asked = "PromptConfig.question_ids: heads.title needs a question behind the history; it can't be empty"
        check(not self.heads.title or len(self.prompt.question_ids) > 0, asked)
        wide, narrow = self.decoder.hidden_size, self.compressor.hidden_size
        check(wide == narrow, f"ModelConfig: item tokens are {narrow} wide, the decoder's embeddings {wide}")
        self._check_length()

    def _check_length(self) -> None:
        instruction, window = len(self.prompt.instruction_ids), self.prompt.window * self.prompt.rows_per_item
        tail = len(self.prompt.question_ids) + MOST_ANSWER_IDS if self.heads.title else 1
        longest = instruction + window + tail
        parts = f"instruction {instruction}, window {window}, {'question and title' if tail > 1 else 'a candidate'}"
        prompt = f"ModelConfig: prompts of {longest} positions ({parts})"
        most, exact = self.decoder.max_positions, self.decoder.exact_len
        remedy = "; shorten the window or the instruction"
        check(most is None or longest <= most, f"{prompt}, but the backbone was made for {most}{remedy}")
        check(exact is None or longest <= exact, f"{prompt}, but beyond {exact} its {EXACT_LEN_ENDS}{remedy}")


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(size: str | int, where: str = "kv_budget") -> int:
    """`"1GiB"`, `"300MB"`, `"0"` or a plain number as bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if not found or found[2].lower() not in _UNITS:
        raise ConfigError(f'{where}: {size!r} is no size; write for example "512MiB", "2GiB" or "0"')
    num_bytes = float(found[1]) * _UNITS[found[2].lower()]
    if num_bytes > MOST_BYTES:
        raise ConfigError(f'{where}: {size!r} is more than any memory; write for example "512MiB" or "2GiB"')
    return int(num_bytes)


EIGHT_BITS = ("auto", "int8", "fp8")  # what weights, keys and values may be held in; "auto": as they are computed
DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_PATHS = ("auto", "avx512", "avx2", "plain", "torch")
LAUNCHES = ("apart", "fused", "overlapped")
MOST_WAIT_MS = 3_600_000
MOST_ROWS = 65_536
ROW_TILE = 16  # rows of a pass are padded to it
# steps of 16 where a pass is bound by launches and weights, then by a third or a half: at most a third is padding
ROW_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


@dataclass(frozen=True)
class EngineConfig(Config):
    """How an engine runs: where, in which precision, and how much it may hold and compute at once."""

    device: str = "auto"
    dtype: str = "auto"
    kv_budget: str | int = "1GiB"  # what sessions may keep on the device
    host_budget: str | int = "0"  # what evicted sessions may keep in (pinned) host memory
    user_quota: str | int | None = None  # what one user's session may keep; none: a whole window
    max_sessions: int = 65_536
    block_size: int = 16
    max_batch_users: int = 64
    max_batch_rows: int = 4096
    max_candidates: int = 4096  # that one request may name: they are computed in one step, which others wait for
    catalogue_capacity: int | None = None  # items that fit; none: a quarter more than there are, at least 1,024
    max_waiting: int = 1024  # submitted requests that may wait; one more is refused
    batch_wait_ms: float = 0.0  # how long a submitted request waits for company while the engine is idle
    graphs: str = "auto"  # CUDA graphs: "auto" captures on a GPU, "on" runs their buckets on a CPU too, "off" never
    launches: str = "fused"  # of small bf16 passes on a GPU: "apart" (with fp8 weights: of fp8 rows too), "fused" into
    # layers, "overlapped" on Hopper too
    warm_k: int = 10  # searches for so many items are met by the warm-up; on a GPU the first one for many more compiles
    row_buckets: tuple[int, ...] = ROW_BUCKETS  # passes that are captured, by rows; larger ones run without a graph
    cpu_path: str = "auto"  # on a CPU: "auto", "avx512", "avx2", "plain" for native kernels, "torch" for none of them
    weights: str = "auto"  # of the decoder's linear layers: "auto" has them in dtype, "int8" and "fp8" in a byte each
    kv: str = "auto"  # of cached keys and values: "auto" has them in dtype, "int8" and "fp8" in a byte each
    search: str = "exact"  # of the catalogue: "exact", or "two_stage" over an int8 copy first, where that is certain
    freeze_gc: bool = True  # what stands after the warm-up is never again searched for garbage, in the whole process
    debug: bool = False  # freed blocks are filled with junk, the cache's books checked after every step

    def check_values(self) -> None:
        for name in ("kv_budget", "host_budget"):
            parse_bytes(getattr(self, name), name)
        if self.user_quota is not None:
            parse_bytes(self.user_quota, "user_quota")
        for name, choices in (("dtype", DTYPES), ("launches", LAUNCHES), ("cpu_path", CPU_PATHS)):
            value = getattr(self, name)
            check(value in choices, f"EngineConfig.{name}: {value!r} is not one of {', '.join(choices)}")
        counts = ("max_sessions", "block_size", "max_batch_users", "max_batch_rows", "max_candidates", "max_waiting")
        for name in (*counts, "warm_k"):
            value = getattr(self, name)
            check(0 < value <= MOST_INT32, f"EngineConfig.{name} must be within 1..{MOST_INT32}, is {value}")
        check(
            self.graphs in ("auto", "on", "off"), f"EngineConfig.graphs: {self.graphs!r}; choose 'auto', 'on' or 'off'"
        )
        for name in ("weights", "kv"):
            value = getattr(self, name)
            check(value in EIGHT_BITS, f"EngineConfig.{name}: {value!r}; choose 'auto', 'int8' or 'fp8'")
        searches = f"EngineConfig.search: {self.search!r}; choose 'exact' or 'two_stage'"
        check(self.search in ("exact", "two_stage"), searches)
        tiles = all(0 < size <= MOST_ROWS and size % ROW_TILE == 0 for size in self.row_buckets)
        rising = list(self.row_buckets) == sorted(set(self.row_buckets)) and len(self.row_buckets) > 0
        wanted = f"rising multiples of {ROW_TILE} up to {MOST_ROWS}, at least one"
        check(tiles and rising, f"EngineConfig.row_buckets must be {wanted}, are {list(self.row_buckets)}")
        wait = f"EngineConfig.batch_wait_ms must be within 0..{MOST_WAIT_MS} (an hour), is {self.batch_wait_ms}"
        check(0 <= self.batch_wait_ms <= MOST_WAIT_MS, wait)

    def capacity_for(self, num_items: int) -> int:
        """How many items the catalogue has room for. Raises ConfigError if not even those it begins with."""
        if self.catalogue_capacity is None:
            return num_items + max(1024, num_items // 4)
        capacity = self.catalogue_capacity
        check(capacity >= num_items, f"catalogue_capacity: {capacity} is less than the {num_items} items there are")
        return capacity
