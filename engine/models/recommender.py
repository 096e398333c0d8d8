"""Two faces of one model: `Recommender` for training, on a transformers backbone; `ServingModel`, what the engine runs.

Neither knows how rows are laid out or where keys are kept: the caller brings embeddings, positions and masks.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from speeder_engine.config import ModelConfig, check
from speeder_engine.models.compressor import make_compressor
from speeder_engine.models.decoder import Decoder
from speeder_engine.models.follower_table import FollowerTable
from speeder_engine.models.heads import RankHead, RetrieveHead
from speeder_engine.models.position import OrderHead, PositionPrompts
from speeder_engine.models.vocabulary import Vocabulary
from speeder_engine.triton_kernels.few_rows import suits
from speeder_engine.triton_kernels.fused_linear import fused_linear
from speeder_engine.triton_kernels.item_embed import EmbedTables


class Recommender(nn.Module):
    """Backbone, compressor, position prompts and heads, all trainable."""

    instruction_ids: Tensor

    def __init__(self, config: ModelConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        hidden_size, scale = config.compressor.hidden_size, config.compressor.scale
        self.backbone = backbone
        self.compressor = make_compressor(config.compressor)
        self.prompts = PositionPrompts(config.prompt.window + 1, hidden_size, scale)
        if config.prompt.positions == "none":
            nn.init.zeros_(self.prompts.weight.requires_grad_(False))
        self.times = _time_prompts(config)
        self.retrieve = RetrieveHead(hidden_size, scale)
        self.rank = RankHead(hidden_size, scale, config.heads)
        self.prior_weights: nn.Parameter | None = None
        if config.live_prior is not None:
            count = len(config.live_prior.half_lives_days)
            self.prior_weights = nn.Parameter(torch.full((count,), 1.0 / count))
        self.followers = FollowerTable(config.followers) if config.followers is not None else None
        self.order = OrderHead(hidden_size, scale)
        self.vocabulary_head: nn.Parameter | None = None
        if config.heads.title and not config.vocabulary_tied:
            # as pretrained: it is not trained
            head = torch.zeros(config.decoder.vocab_size, hidden_size)
            self.vocabulary_head = nn.Parameter(head, requires_grad=False)
        self.register_buffer("instruction_ids", torch.tensor(config.prompt.instruction_ids), persistent=False)

    def instruction(self, batch_size: int) -> Tensor:
        """The instruction's embeddings [B, m, d]."""
        embed = self.backbone.get_input_embeddings()  # type: ignore[operator]
        rows: Tensor = embed(self.instruction_ids)
        return rows.unsqueeze(0).expand(batch_size, -1, -1)

    def history(self, tokens: Tensor, buckets: Tensor | None) -> Tensor:
        """Tokens [B, L, d] of items and their calendar buckets [B, L] -> rows [B, L * rows_per_item, d]."""
        prompts = self.prompts(torch.arange(tokens.shape[1], device=tokens.device))
        if self.times is not None and buckets is not None:
            tokens = tokens + self.times(buckets)
        if self.config.prompt.positions == "token":
            return torch.stack([prompts.expand_as(tokens), tokens], dim=2).flatten(1, 2)
        rows: Tensor = tokens + prompts
        return rows

    def vocabulary(self) -> Vocabulary:
        """The token embeddings and the vocabulary head, shared with this model."""
        return Vocabulary(self.backbone.get_input_embeddings().weight, self.vocabulary_head)  # type: ignore[operator]

    def forward(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Final hidden states [B, T, d] of embeddings [B, T, d] at positions [B, T].

        mask: bool [B, 1, T, T], true where a row (dim 2) sees a row (dim 3); None is causal.
        """
        out = self.backbone(inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def own_state(self) -> dict[str, Tensor]:
        """Everything but the backbone, for a checkpoint."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}


class ServingModel(nn.Module):
    """What the engine needs of a trained model: decoder, instruction embeddings, position prompts, heads."""

    instruction: Tensor
    placed: tuple[torch.device, torch.dtype] | None = None  # where an engine has taken it, and in which type

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden_size, scale = config.compressor.hidden_size, config.compressor.scale
        self.decoder = Decoder(config.decoder)
        self.register_buffer("instruction", torch.zeros(len(config.prompt.instruction_ids), hidden_size))
        self.prompts = PositionPrompts(config.prompt.window + 1, hidden_size, scale)
        self.times = _time_prompts(config)
        self.retrieve = RetrieveHead(hidden_size, scale)
        self.rank = RankHead(hidden_size, scale, config.heads)
        self.followers = FollowerTable(config.followers) if config.followers is not None else None
        self.vocabulary: Vocabulary | None = None
        if config.heads.title:
            self.vocabulary = Vocabulary.empty(config.decoder.vocab_size, hidden_size, config.vocabulary_tied)

    @classmethod
    @torch.no_grad()
    def from_recommender(cls, model: Recommender) -> "ServingModel":
        """The same weights, q/k/v and gate/up fused; adapters must have been merged. ConfigError for position prompts
        that are rows of their own: they are for comparison in training."""
        own_rows = "PromptConfig.positions: the engine serves prompts 'added' to items, not a 'token' of their own"
        check(model.config.prompt.positions != "token", f"{own_rows}; train with another setting")
        served = cls(model.config)
        served.decoder = Decoder.from_transformers(model.backbone)
        served.instruction.copy_(model.instruction(1)[0])
        for part in ("prompts", "retrieve", "rank"):
            getattr(served, part).load_state_dict(getattr(model, part).state_dict())
        if served.times is not None and model.times is not None:
            served.times.load_state_dict(model.times.state_dict())
        if served.followers is not None and model.followers is not None:
            served.followers.load_state_dict(model.followers.state_dict())
        if served.vocabulary is not None:
            served.vocabulary.load_state_dict(model.vocabulary().state_dict())
        return served.requires_grad_(False).eval()

    def beside_packed(self, dtype: torch.dtype) -> "ServingModel":
        """A copy for whoever has packed the decoder's matrices: these are shared and read no more, all else is its own,
        what is not the decoder's in `dtype`."""
        matrices: dict[int, Any] = {id(part): part for part in self.decoder.modules() if isinstance(part, nn.Linear)}
        copied = copy.deepcopy(self, matrices)
        for name, part in copied.named_children():
            if name != "decoder":
                part.to(dtype)
        copied.instruction = copied.instruction.to(dtype)
        return copied

    def embed_tables(self, item_tokens: Tensor) -> EmbedTables:
        """What `item_embed` looks rows up in, beside item tokens [I, d]."""
        first: Any = self.decoder.layers[0]
        return EmbedTables(
            items=item_tokens,
            prompts=self.prompts.weight,
            role=self.rank.role,
            norm=first.input_norm.weight,
            eps=first.input_norm.eps,
            times=None if self.times is None else self.times.weight,
            text=None if self.vocabulary is None else self.vocabulary.embedding,
        )

    def user_vectors(self, last_hidden: Tensor, counters: Tensor | None) -> Tensor:
        """h(last) [B, d] -> [B, d], by the retrieve head; `counters` as of the decoder."""
        if counters is not None and suits(last_hidden):
            return fused_linear(last_hidden, self.retrieve.project.weight, counters, factor=self.retrieve.factor)
        vectors: Tensor = self.retrieve(last_hidden)
        return vectors

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids [N] -> rows [N, d], without position prompts: those are of items."""
        return self._vocabulary().embed(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [N, d] -> the next token's logits [N, V]; for titles only."""
        return self._vocabulary().logits(hidden)

    def _vocabulary(self) -> Vocabulary:
        assert self.vocabulary is not None, "a model without a title head has no words"
        return self.vocabulary


def _time_prompts(config: ModelConfig) -> PositionPrompts | None:
    """One for each calendar bucket, and one for a time that is not known."""
    calendar = config.prompt.calendar
    if calendar is None:
        return None
    return PositionPrompts(calendar.num_buckets + 1, config.compressor.hidden_size, config.compressor.scale)
