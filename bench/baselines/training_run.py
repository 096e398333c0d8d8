"""What training runs share: LoRA on the subject's backbone, AdamW, the subject's precision."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from baselines.base import Unavailable
from hf_weights import make_causal_lm
from subject import Subject
from torch import Tensor, nn

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
T = TypeVar("T")
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0


class TrainingRun(Protocol):
    """One optimizer step at a time."""

    @property
    def key(self) -> str: ...

    @property
    def label(self) -> str: ...

    def step(self) -> int:
        """Forward, backward and update; returns how many targets were supervised."""
        ...


def causal_lm(subject: Subject) -> Any:
    """The backbone with its vocabulary, as modules of the run's own over the subject's tensors, which stay frozen."""
    embedding = subject.transformers().model.embed_tokens.weight
    weights = subject.weights | {"vocabulary.embedding": embedding}
    return make_causal_lm(subject.config.decoder, weights, subject.device, subject.seed).train()


def with_lora(model: nn.Module, task: str) -> nn.Module:
    """Raises Unavailable without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise Unavailable("peft is not installed: pip install 'speeder-engine[train]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        adapted: nn.Module = get_peft_model(model, LoraConfig(task_type=task, **LORA))
    return adapted


class Stepper:
    """AdamW over what is trained of a model, in half precision by autocast."""

    def __init__(self, model: nn.Module, subject: Subject) -> None:
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)
        half = subject.dtype != torch.float32
        self.autocast = torch.autocast(subject.device.type, subject.dtype if half else torch.bfloat16, enabled=half)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cycle(make: Callable[[int], Iterable[T]]) -> Iterator[T]:
    """`make(0)`, `make(1)`, ... one behind the other, without end."""
    number = 0
    while True:
        yield from make(number)
        number += 1
