"""LLaRA-style training: titles in a prompt of `Workload.text_prompt_len` tokens, one answer a prompt."""

import torch
from baselines.text_generation import TextGeneration
from baselines.training_run import Stepper, causal_lm, with_lora
from subject import Subject
from torch import Tensor
from torch.nn import functional as F
from workload import BenchUser, make_users

PROMPTS = 64  # different ones


class TextTraining:
    """Cross-entropy on the answer's title; the vocabulary's head runs on its tokens alone."""

    key, label = "text_training", "titles in the prompt, one target a prompt (LLaRA style), LoRA"

    def __init__(self, subject: Subject, batch_size: int = 1) -> None:
        self.workload, self.batch_size, self.device = subject.workload, batch_size, subject.device
        self.text = TextGeneration(subject)
        self.model = with_lora(causal_lm(subject), "CAUSAL_LM")
        self.stepper = Stepper(self.model, subject)
        self.users = make_users(PROMPTS, subject.num_items, subject.workload, subject.seed)
        self.taken = 0

    def step(self) -> int:
        """One target a prompt: the item that came next."""
        with self.stepper.autocast:
            ids, answer = self._batch(), self.workload.generated_tokens
            logits = self.model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=answer).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, -answer:].flatten())
        self.stepper.step(loss)
        return len(ids)

    def _batch(self) -> Tensor:
        """Token ids [B, prompt + answer] of the next users."""
        numbers = range(self.taken, self.taken + self.batch_size)
        self.taken += self.batch_size
        return torch.stack([self._prompt(self.users[number % PROMPTS]) for number in numbers])

    def _prompt(self, user: BenchUser) -> Tensor:
        prompt = torch.arange(1, self.workload.prompt_tokens + 1, device=self.device)
        titles = self.text.title_ids((*user.history, *user.candidates))
        answer = self.text.title_ids((user.next_item,))[: self.workload.generated_tokens]
        return torch.cat([prompt, titles, answer])
