"""Small random models, and the judge of the engine: plain transformers, full prompts, explicit masks, no cache.

Nothing here is shared with the engine but the weights and the layout's numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.config import CompressorConfig, ModelConfig, PromptConfig
from speeder_engine.models.families import decoder_config
from speeder_engine.models.recommender import Recommender, ServingModel
from speeder_engine.parts import EngineParts


@dataclass
class Tiny:
    """A random model over `num_items` items called "0000", "0001", ..."""

    model: Recommender
    tokens: torch.Tensor
    prior: torch.Tensor
    item_ids: list[str]
    window: int
    step: int

    def parts(self) -> EngineParts:
        """Fresh each time: an engine moves the tensors it is given."""
        table = ItemTable.fresh(self.item_ids, [f"Title {i}" for i in self.item_ids], self.prior.numpy())
        served = ServingModel.from_recommender(self.model)
        compressor = {name: value.clone() for name, value in self.model.compressor.state_dict().items()}
        return EngineParts(self.model.config, served, Catalogue(table, self.tokens.clone()), compressor)

    def ids(self, rows) -> list[str]:
        return [self.item_ids[int(row)] for row in rows]


def make_tiny(num_items=120, window=12, step=4, seed=0, instruction_len=19, scale=0.02, family="llama") -> Tiny:
    torch.manual_seed(seed)
    shape = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=80,
    )
    backbone = AutoModel.from_config(shape).eval()
    compressor = CompressorConfig({"text": 8, "image": 5}, 48, scale=scale)
    prompt = PromptConfig("instruction", tuple(range(1, instruction_len + 1)), window, step)
    model = Recommender(ModelConfig(decoder_config(shape), compressor, prompt), backbone).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    item_ids = [f"{i:04d}" for i in range(num_items)]
    return Tiny(model, torch.randn(num_items, 48) * scale, torch.randn(num_items), item_ids, window, step)


def reference_start(length: int, window: int, step: int) -> int:
    """The sliding window by simulation: drop `step` items whenever the window overflows."""
    start = 0
    while length - start > window:
        start += step
    return start


@torch.no_grad()
def reference_scores(tiny: Tiny, rows, candidates=None):
    """(retrieve scores [I], rank scores [C] or None) of one history by one full forward pass each."""
    model, prompt = tiny.model, tiny.model.config.prompt
    rows = np.asarray(rows, dtype=np.int64)
    rows = rows[reference_start(len(rows), tiny.window, tiny.step) :]
    instruction = model.backbone.embed_tokens(torch.tensor(prompt.instruction_ids))
    history = tiny.tokens[torch.from_numpy(rows)] + model.prompts.weight[: len(rows)]
    prefix = torch.cat([instruction, history])
    hidden = model.backbone(inputs_embeds=prefix[None]).last_hidden_state[0]
    vector = model.retrieve.project(hidden[-1]) / (model.config.compressor.scale * 48**0.5)
    retrieve = tiny.tokens @ vector + model.retrieve.beta * tiny.prior
    if candidates is None:
        return retrieve, None
    ranked = []
    for row in candidates:  # one prompt each: nothing can leak between candidates
        own = tiny.tokens[row] + model.prompts.weight[len(rows)] + model.rank.role
        last = model.backbone(inputs_embeds=torch.cat([prefix, own[None]])[None]).last_hidden_state[0, -1]
        score = last @ model.rank.weight + model.rank.bias + model.rank.alpha * (tiny.tokens[row] @ vector)
        ranked.append(score + model.rank.beta * tiny.prior[row])
    return retrieve, torch.stack(ranked)
