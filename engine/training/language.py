"""A run's language: a backbone, and prompts in its words."""

from typing import Any, NamedTuple

from speeder_engine.config import CalendarConfig, CompressorConfig, ModelConfig, PromptConfig, check
from speeder_engine.data.splits import Split
from speeder_engine.errors import DataError
from speeder_engine.live_prior import SECONDS_A_DAY
from speeder_engine.models.families import decoder_config
from speeder_engine.title_text import TitleText, answer_text
from speeder_engine.training.backbone import Backbone, end_ids, instruction_ids, make_backbone, question_ids
from speeder_engine.training.config import TrainingConfig


class Language(NamedTuple):
    """A backbone, and prompts in its words."""

    backbone: Backbone
    prompt: PromptConfig


def make_language(split: Split, config: TrainingConfig) -> Language:
    """Untrained. ConfigError for a backbone that can't be served, or not with these prompts and titles."""
    calendar, items, titled = make_calendar(split, config.calendar_days), split.dataset.items, config.heads.title
    titles = [answer_text(title) for title in items.titles]
    read = [config.instruction, *([config.question, *titles] if titled else []), *items.texts]
    backbone = make_backbone(config.backbone, read, with_head=titled)
    hf: Any = backbone.body.config
    prompt = make_prompt(config, backbone.tokenizer, hf, calendar)
    _refuse_unknown_words(hf.vocab_size, prompt)
    if titled:
        TitleText(backbone.tokenizer.backend_tokenizer, hf.vocab_size).answers(titles)
    # how long prompts are depends on no item's vectors
    anything = CompressorConfig(dict.fromkeys(config.modalities, 1), hf.hidden_size)
    ModelConfig(decoder_config(hf), anything, prompt, config.heads)
    return Language(backbone, prompt)


def _refuse_unknown_words(vocab_size: int, prompt: PromptConfig) -> None:
    """A tokenizer may have been given words that the model has no embedding for."""
    for what, ids in {"instruction": prompt.instruction_ids, "question": prompt.question_ids}.items():
        found = max(ids, default=0)
        beyond = f"backbone: its tokenizer writes {what} with token {found}, its vocabulary ends at {vocab_size - 1}"
        check(found < vocab_size, f"{beyond}; give the tokenizer it was trained with")


def make_prompt(config: TrainingConfig, tokenizer: Any, hf: Any, calendar: CalendarConfig | None) -> PromptConfig:
    """The layout in the backbone's tokens; the question and what ends an answer only where titles are asked for."""
    titled = config.heads.title
    return PromptConfig(
        config.instruction,
        instruction_ids(tokenizer, config.instruction),
        config.window,
        config.window_step,
        question=config.question if titled else "",
        question_ids=question_ids(tokenizer, config.question) if titled else (),
        end_ids=end_ids(tokenizer, hf) if titled else (),
        calendar=calendar,
        positions=config.positions,
    )


def make_calendar(split: Split, days: float) -> CalendarConfig | None:
    """Buckets of so many days from the first training event to the last; None for 0 days."""
    if not days:
        return None
    times = split.train.times
    if times is None:
        raise DataError(f"{split.dataset.name}: calendar_days needs times; give a time column or set it to 0")
    seconds = round(days * SECONDS_A_DAY)
    first = int(times.min())
    return CalendarConfig(first, seconds, (int(times.max()) - first) // seconds + 1)
