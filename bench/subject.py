"""Subject: one set of weights in one precision on one device, as every contender sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from hf_weights import make_causal_lm
from numpy.typing import NDArray
from torch import Tensor
from workload import BenchUser, Workload

from speeder_engine import Engine, EngineConfig
from speeder_engine.config import DecoderConfig, ModelConfig
from speeder_engine.errors import ConfigError
from speeder_engine.models.recommender import ServingModel
from speeder_engine.parts import EngineParts
from speeder_engine.prompt import PromptLayout, isolated_mask
from speeder_engine.random_engine import random_parts
from speeder_engine.triton_kernels.item_embed import EmbedRows, item_embed

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptRows:
    """N rows of one user's prompt: new history rows, then candidates, each of which sees the history and itself."""

    embeddings: Tensor  # [N, d]
    positions: Tensor  # int64 [N]
    mask: Tensor  # bool [N, past + N], true where a row sees a position
    past: int  # positions before them, whose keys and values are known
    num_candidates: int

    @property
    def num_rows(self) -> int:
        return self.embeddings.shape[0]

    @property
    def num_new(self) -> int:
        """Rows that are no candidates; the last of them is h(last)'s."""
        return self.num_rows - self.num_candidates


class Subject:
    """The weights are held once; every engine, and the transformers model, is made over the same tensors."""

    def __init__(self, parts: EngineParts, *, dtype: str, device: str, workload: Workload, seed: int = 0) -> None:
        if not parts.config.heads.rank:
            raise ConfigError("the benchmark ranks candidates, but this model has no rank head; export one that has")
        self.workload, self.seed = workload, seed
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.config: ModelConfig = parts.config
        self.layout = PromptLayout(self.config.prompt)
        self.weights: dict[str, Tensor] = parts.model.to(self.device, self.dtype).state_dict()
        self.catalogue = parts.catalogue.to(self.device, self.dtype)
        self._parts = parts
        self.model = self._serving_model()

    @classmethod
    def random(
        cls,
        shape: str | DecoderConfig,
        *,
        num_items: int,
        dtype: str,
        device: str,
        seed: int = 0,
        workload: Workload | None = None,
    ) -> Self:
        """Random weights in the shape of a well-known model. Raises ConfigError for an unknown shape."""
        workload = workload or Workload()
        parts = random_parts(
            shape,
            num_items=num_items,
            instruction_len=workload.instruction_len,
            window=workload.window,
            window_step=workload.window_step,
            seed=seed,
            dtype=getattr(torch, dtype),
            device=device,
        )
        return cls(parts, dtype=dtype, device=device, workload=workload, seed=seed)

    @classmethod
    def load(cls, engine_dir: Path, *, dtype: str, device: str, workload: Workload | None = None) -> Self:
        """An engine directory; lengths that it settles (instruction, window) replace the workload's. Raises
        ArtifactError, and ConfigError where the workload's users don't fit into its window."""
        parts = EngineParts.load(Path(engine_dir))
        prompt, given = parts.config.prompt, workload or Workload()
        settled = {"instruction_len": len(prompt.instruction_ids), "window": prompt.window}
        workload = Workload(**{**vars(given), **settled, "window_step": prompt.window_step})
        if workload.history_len + 1 > prompt.window:
            wanted = f"{workload.history_len} items and one more"
            raise ConfigError(f"{engine_dir}: a window of {prompt.window} can't hold the benchmark's {wanted}")
        return cls(parts, dtype=dtype, device=device, workload=workload)

    @property
    def num_items(self) -> int:
        return self.catalogue.num_rows

    @property
    def parts(self) -> EngineParts:
        """Made anew each time over the same tensors: an engine may rearrange the modules that it is given."""
        old = self._parts
        return EngineParts(
            self.config,
            self._serving_model(),
            self.catalogue,
            old.compressor,
            old.tokenizer,
            old.write_more,
            old.artifact,
            old.encoders,
        )

    def engine(self, **settings: Any) -> Engine:
        """A fresh engine; `settings` are fields of `EngineConfig`."""
        dtype = str(self.dtype).removeprefix("torch.")
        named = {"device": str(self.device), "dtype": dtype, "freeze_gc": False, **settings}
        return Engine(self.parts, EngineConfig(**named))

    def transformers(self) -> Any:
        """The same decoder as a transformers causal LM, over the same tensors; its vocabulary is random where the
        engine has none. Every call gives the same model."""
        return self._causal_lm

    @cached_property
    def _causal_lm(self) -> Any:
        return make_causal_lm(self.config.decoder, self.weights, self.device, self.seed)

    def rows(self, user: BenchUser, warm: bool = False, whole: bool = False) -> PromptRows:
        """The user's prompt behind the instruction; warm: of a user whose history is known, with one new item;
        whole: everything, the instruction too, and nothing before it."""
        taken = user.grown if warm else user.history
        start = self.layout.start(len(taken))
        if warm and start != self.layout.start(len(user.history)):
            raise ValueError(f"user {user.user_id}: the window slides at {len(taken)} items, nothing known stays valid")
        known = len(taken) - start - 1 if warm else 0
        return self._rows(taken[start:], user.candidates, known, whole)

    def history_rows(self, user: BenchUser) -> PromptRows:
        """The history alone, behind the instruction: what is computed before a user returns."""
        return self._rows(user.history[self.layout.start(len(user.history)) :], (), 0, False)

    def _rows(self, window: Sequence[int], candidates: Sequence[int], known: int, whole: bool) -> PromptRows:
        """Of the window from position `known` on, or from the instruction's first."""
        length, count, prompt = len(window), len(candidates), self.layout.instruction_len
        known = 0 if whole else known
        items = self._longs([*window[known:], *candidates])
        slots = torch.cat([torch.arange(known, length), torch.full((count,), length)]).to(self.device)
        is_candidate = torch.arange(len(items), device=self.device) >= length - known
        nothing = torch.zeros_like(items)
        tables = self.model.embed_tables(self.catalogue.tokens)
        rows = EmbedRows(items, slots, nothing, is_candidate, None, len(items))
        embeddings, positions = item_embed(tables, rows)[0], slots + prompt
        past = 0 if whole else prompt + known
        if whole:
            embeddings = torch.cat([self.model.instruction, embeddings])
            positions = torch.cat([torch.arange(prompt, device=self.device), positions])
        visible = torch.full((1, count), prompt + length, device=self.device)
        mask = isolated_mask(prompt + length, visible)[0, 0, past:]
        return PromptRows(embeddings, positions, mask, past, count)

    def rank(self, last_hidden: Tensor, hidden: Tensor, candidates: Sequence[int]) -> Floats:
        """Scores [C] of the engine's rank head: last_hidden [d] is h(last), hidden [C, d] the candidates' own."""
        rows, head = self._longs(candidates), self.model.rank
        vector = self.model.retrieve(last_hidden)
        retrieved = (vector * self.catalogue.tokens[rows]).sum(dim=-1)
        scores = head(hidden, retrieved).float() + head.beta.float() * self.catalogue.prior[rows].float()
        scores = scores.masked_fill(~self.catalogue.available[rows], float("-inf"))
        found: Floats = scores.cpu().numpy()
        return found

    def item_ids(self, rows: Sequence[int]) -> list[str]:
        return list(self.catalogue.ids(rows))

    def _longs(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def _serving_model(self) -> ServingModel:
        with torch.device("meta"):
            model = ServingModel(self.config)
        model.load_state_dict(self.weights, assign=True)
        return model.requires_grad_(False).eval()
