"""Where a run's language model comes from: a pretrained one under LoRA, or a small Llama made here from scratch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.config import check
from speeder_engine.encoders.sources import read_weights, resolve_source
from speeder_engine.errors import ConfigError, MissingDependency, SpeederError
from speeder_engine.memory import host_memory
from speeder_engine.models.families import decoder_config
from speeder_engine.training.config import BackboneConfig

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
# in fp32: itself, where it is moved to a GPU, else its gradient and two moments, too
BYTES_A_PARAMETER = 4 if torch.cuda.is_available() else 16


class Backbone(NamedTuple):
    body: nn.Module
    tokenizer: Any
    head: Tensor | None = None  # the vocabulary head [V, d]; None: tied to the embeddings, or not asked for


def make_backbone(config: BackboneConfig, texts: Iterable[str], with_head: bool = False) -> Backbone:
    """The body of a causal LM and its tokenizer; `with_head`: its vocabulary head too, where that is not tied.

    texts: what a from-scratch tokenizer is trained on.
    """
    if config.source is None:
        tokenizer = train_tokenizer(texts, config.vocab_size)
        return Backbone(small_llama(config, len(tokenizer)), tokenizer)
    return load_pretrained(config, with_head)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE trained on the catalogue's text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def small_llama(config: BackboneConfig, vocab_size: int) -> nn.Module:
    """Raises ConfigError for one that can't be trained in this machine's memory."""
    from transformers import LlamaConfig, LlamaModel

    width, inner = config.hidden_size, config.intermediate_size
    count = vocab_size * width + config.num_layers * (4 * width * width + 3 * width * inner)
    needed, there = count * BYTES_A_PARAMETER, host_memory()
    message = f"backbone: {count:,} parameters take {needed:,} bytes in training, there are {there:,}; make it smaller"
    check(needed <= there, message)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        attention_dropout=config.dropout,
        max_position_embeddings=4096,
    )
    return LlamaModel(shape)


@contextmanager
def drop_residuals(body: nn.Module, share: float) -> Iterator[None]:
    """Dropout, in training, of what attention and perceptron add to their rows: GPT-2 has it, Llama has not.

    Inside the `with` alone: a body that is trained again is not dropped from twice.
    """

    def drop(module: nn.Module, inputs: Any, added: Tensor) -> Tensor:
        return F.dropout(added, share, module.training)

    adding = [module for name, module in body.named_modules() if name.endswith((".o_proj", ".down_proj"))]
    hooks = [module.register_forward_hook(drop) for module in adding if share]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def checkpoint_layers(backbone: nn.Module) -> None:
    """Computes layers again in the backward pass, by the name transformers has for it now, or by that of releases which
    don't have it yet."""
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # type: ignore[operator]


def load_pretrained(config: BackboneConfig, with_head: bool = False) -> Backbone:
    """A pretrained body with LoRA on all its linear layers; its own weights and its head are frozen.

    ConfigError for a folder that can't be read whole, and for a model that could be tuned, but not served.
    """
    # absolute: the adapters remember it, and the next command may be started elsewhere
    source = resolve_source(str(config.source), "backbone", "none for a small decoder from scratch").resolve()
    from transformers import AutoConfig, AutoTokenizer

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingDependency("peft", "train", "tuning a pretrained backbone") from None
    with _reading(source):
        shape = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    _refuse_quantized(source, shape)
    decoder_config(shape)
    body, head = _load_body(source, with_head)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="FEATURE_EXTRACTION",
    )
    return Backbone(get_peft_model(body, lora), tokenizer, head)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """What goes wrong inside, as one ConfigError that names `source`."""
    try:
        yield
    except (SpeederError, MemoryError):
        raise
    except Exception as error:  # what transformers and safetensors raise about a damaged folder is no narrower
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"backbone {str(source)!r}: can't be loaded ({reason}); give another folder") from error


def _refuse_quantized(source: Path, shape: Any) -> None:
    quantized = getattr(shape, "quantization_config", None)
    if quantized is None:
        return
    method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
    message = f"its config says quantization_config ({method}), and adapters are merged into plain weights"
    raise ConfigError(f"backbone {str(source)!r}: {message}; give a folder with those")


def _load_body(source: Path, with_head: bool) -> tuple[Any, Tensor | None]:
    """Raises ConfigError where the files lack a weight, as a head that is asked for."""
    from transformers import AutoModel, AutoModelForCausalLM

    with _reading(source):
        model, odd = read_weights(AutoModelForCausalLM if with_head else AutoModel, source)
    untied = with_head and not model.config.tie_word_embeddings
    if untied and any("lm_head" in name for name in odd["is missing"]):
        raise ConfigError(f"backbone {str(source)!r}: has no vocabulary head; heads.title needs a whole causal LM")
    for what in ("is missing", "has another shape than config.json says"):
        if odd[what]:
            raise ConfigError(f"backbone {str(source)!r}: {odd[what][0]} {what}; give another folder")
    if not with_head:
        return model, None
    return model.base_model, model.get_output_embeddings().weight.detach() if untied else None


def embedding_scale(backbone: nn.Module) -> float:
    """Root mean square of one element of the embedding rows (not a row's norm)."""
    weight = backbone.get_input_embeddings().weight  # type: ignore[operator]
    return float(weight.detach().float().square().mean().sqrt())


def instruction_ids(tokenizer: Any, instruction: str) -> tuple[int, ...]:
    """The instruction's token ids, after the tokenizer's beginning-of-sequence token where it has one."""
    ids = tokenizer(instruction, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return tuple(int(i) for i in [*start, *ids])


def question_ids(tokenizer: Any, question: str) -> tuple[int, ...]:
    """The question's token ids, as they stand behind a history."""
    return tuple(int(i) for i in tokenizer(question, add_special_tokens=False)["input_ids"])


def end_ids(tokenizer: Any, hf: Any) -> tuple[int, ...]:
    """Tokens that end a text: the tokenizer's end of sequence and those the model's config names."""
    named = getattr(hf, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])}
    return tuple(sorted(int(i) for i in found if i is not None))
