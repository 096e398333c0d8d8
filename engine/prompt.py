"""PromptLayout: which rows, in which order, at which positions. Training, evaluation, engine and export all ask here.

    [instruction]  [z_1 + p_1] ... [z_n + p_n]  [candidates: z_c + p_{n+1} + role]
                                                [question] [titles]

Slots count oldest first from 0, so that adding an interaction changes no earlier row. Text has no position prompts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from speeder_engine.config import PromptConfig


@dataclass(frozen=True)
class PromptLayout:
    config: PromptConfig

    @property
    def instruction_len(self) -> int:
        return len(self.config.instruction_ids)

    def start(self, length: int) -> int:
        """Where the window over a history of `length` items begins: 0, then growing in whole steps.

        start(n) = 0 if n <= W else s * ceil((n - W) / s): a function of the full length alone, so that warm and cold
        see the same rows, and a window holds between W - s + 1 and W items once it slides.
        """
        over = length - self.config.window
        step = self.config.window_step
        return 0 if over <= 0 else step * -(-over // step)


def isolated_mask(prefix_len: int, visible: Tensor) -> Tensor:
    """Who sees whom in a padded batch of prompts: bool [B, 1, T, T], true where a row (dim 2) sees another (dim 3).

    The first `prefix_len` rows (instruction and history, padded on the right) are causal. Behind them stand E rows
    a sequence; row e sees the first `visible[b, e]` (int64 [B, E]) of the prefix and itself, no other.
    """
    batch_size, num_extra = visible.shape
    mask = torch.eye(prefix_len + num_extra, dtype=torch.bool, device=visible.device).repeat(batch_size, 1, 1)
    columns = torch.arange(prefix_len, device=visible.device)
    mask[:, :prefix_len, :prefix_len] = columns <= columns.unsqueeze(1)
    mask[:, prefix_len:, :prefix_len] = columns < visible.unsqueeze(2)
    return mask.unsqueeze(1)
