"""The graphs of a model server: every input and output begins with the batch, and what is not a request's is constant.

recommend  history, lengths, excluded                      -> rows, scores
score      history, lengths, candidates                    -> scores
session    history, lengths, candidates, excluded + state  -> rows, scores, candidate_scores, total_lengths + state

A server forms batches by stacking requests, so that nothing may be shared by a batch: k, availability and priors are
constants, and a session's state has one shape whatever its length.
"""

import torch
from torch import Tensor, nn

from speeder_engine.export.graph_spec import BATCH, CANDIDATES, EXCLUDED, NEW, GraphSpec, cache_names
from speeder_engine.export.static_graph import Overrides, StaticModel
from speeder_engine.parts import EngineParts

LENGTHS, ROWS = "past_lengths", "past_rows"


class ServedGraph(nn.Module):
    """What the graphs share: the model and the constants."""

    available: Tensor
    prior: Tensor

    def __init__(self, model: StaticModel, parts: EngineParts, k: int) -> None:
        super().__init__()
        self.model = model
        size = parts.catalogue.num_rows
        self.k = min(k, size)
        self.register_buffer("available", parts.catalogue.available[:size].clone())
        self.register_buffer("prior", parts.catalogue.prior[:size].float())

    @property
    def overrides(self) -> Overrides:
        return Overrides(self.available, self.prior)

    def best(self, last_hidden: Tensor, closed: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        """h(last) [B, d] and rows that are not answered [B, E] -> the best rows and scores [B, k]."""
        vectors = self.model.retrieve(last_hidden)
        scores = self.model.catalogue_scores(vectors, self.model.closed(closed), self.overrides, following)
        values, rows = torch.topk(scores, self.k, dim=1)
        return rows, values


class ServedRecommend(ServedGraph):
    def forward(
        self, history: Tensor, lengths: Tensor, excluded: Tensor, buckets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        last_hidden, _, _ = self.model(history, lengths.squeeze(1), None, buckets)
        return self.best(last_hidden, excluded, self.model.following(history, lengths.squeeze(1)))


class ServedScore(ServedGraph):
    def forward(self, history: Tensor, lengths: Tensor, candidates: Tensor, buckets: Tensor | None = None) -> Tensor:
        last_hidden, hidden, _ = self.model(history, lengths.squeeze(1), candidates, buckets)
        following = self.model.following(history, lengths.squeeze(1))
        scores, _ = self.model.score(last_hidden, hidden, candidates, self.overrides, following)
        return scores


class ServedSession(ServedGraph):
    """New rows of a user who has been here. The state is padded to the window: past_lengths [B, 1], past_rows [B, W]
    (each row + 1, so that zeros are no rows), and keys and values [B, H_kv, W, D] of every layer."""

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        excluded: Tensor,
        past_lengths: Tensor,
        past_rows: Tensor,
        past: list[Tensor],
        buckets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        known, new, window = past_lengths.squeeze(1), lengths.squeeze(1), self.model.window
        pairs = list(zip(past[::2], past[1::2], strict=True))
        last_hidden, hidden, present = self.model(history, new, candidates, buckets, known, pairs)
        rows = append_rows(past_rows, known, history, new)
        following = self.model.following(rows - 1, known + new)
        scores, _ = self.model.score(last_hidden, hidden, candidates, self.overrides, following)
        # what the user has taken is not answered again
        best_rows, best_scores = self.best(last_hidden, torch.cat([rows - 1, excluded], dim=1), following)
        kept = [part[:, :, :window] for pair in present for part in pair]
        return best_rows, best_scores, scores, past_lengths + lengths, rows, kept


def append_rows(past: Tensor, known: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """past [B, W] holds rows + 1, `known` [B] of them; puts `count` [B] of `new` [B, T] behind them -> [B, W]."""
    slots = torch.arange(past.shape[1])
    behind = past.shape[1] + (slots - known.unsqueeze(1)).clamp(0, new.shape[1] - 1)
    source = torch.where(slots < known.unsqueeze(1), slots, behind)
    rows = torch.cat([past, new + 1], dim=1).gather(1, source)
    return torch.where(slots < (known + count).unsqueeze(1), rows, 0)


def served_specs(parts: EngineParts, model: StaticModel, names: tuple[str, ...], k: int) -> list[GraphSpec]:
    """Specifications of "recommend", "score" and "session"; they share one model."""
    make = {"recommend": _recommend, "score": _score, "session": _session}
    return [make[name](parts, model, k) for name in names]


def _history(parts: EngineParts) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    rows = torch.arange(BATCH * NEW).view(BATCH, NEW) % parts.catalogue.num_rows
    inputs = {"history": rows, "lengths": torch.tensor([[NEW], [1], [2]])}
    dynamic: dict[str, dict[int, str]] = {"history": {0: "batch", 1: "history"}, "lengths": {0: "batch"}}
    if parts.model.times is not None:
        inputs["buckets"] = torch.zeros_like(rows)
        dynamic["buckets"] = {0: "batch", 1: "history"}
    return inputs, dynamic


def _recommend(parts: EngineParts, model: StaticModel, k: int) -> GraphSpec:
    inputs, dynamic = _history(parts)
    module = ServedRecommend(model, parts, k)
    inputs["excluded"] = torch.full((BATCH, EXCLUDED), -1)
    dynamic["excluded"] = {0: "batch", 1: "excluded"}
    return GraphSpec("recommend", module, inputs, dynamic, dict.fromkeys(("rows", "scores"), ("batch", module.k)))


def _score(parts: EngineParts, model: StaticModel, k: int) -> GraphSpec:
    inputs, dynamic = _history(parts)
    inputs["candidates"] = torch.zeros(BATCH, CANDIDATES, dtype=torch.int64)
    dynamic["candidates"] = {0: "batch", 1: "candidates"}
    return GraphSpec("score", ServedScore(model, parts, k), inputs, dynamic, {"scores": ("batch", "candidates")})


def _session(parts: EngineParts, model: StaticModel, k: int) -> GraphSpec:
    inputs, dynamic = _history(parts)
    module = ServedSession(model, parts, k)
    decoder, window = parts.config.decoder, model.window
    past = cache_names("past_key_values", decoder.num_layers)
    shape = (BATCH, decoder.num_kv_heads, window, decoder.head_dim)
    inputs |= {
        "candidates": torch.zeros(BATCH, CANDIDATES, dtype=torch.int64),
        "excluded": torch.full((BATCH, EXCLUDED), -1),
        LENGTHS: torch.tensor([[2], [0], [4]]).clamp(max=window - NEW),
        ROWS: torch.zeros(BATCH, window, dtype=torch.int64),
    }
    inputs |= {name: torch.zeros(shape, dtype=model.export.torch_dtype) for name in past}
    dynamic |= {"candidates": {0: "batch", 1: "candidates"}, "excluded": {0: "batch", 1: "excluded"}}
    dynamic |= {name: {0: "batch"} for name in (LENGTHS, ROWS, *past)}
    outputs: dict[str, tuple[str | int, ...]] = dict.fromkeys(("rows", "scores"), ("batch", module.k))
    outputs |= {
        "candidate_scores": ("batch", "candidates"),
        "total_lengths": ("batch", 1),
        "present_rows": ("batch", window),
    }
    outputs |= dict.fromkeys(cache_names("present", decoder.num_layers), ("batch", *shape[1:]))
    return GraphSpec("session", module, inputs, dynamic, outputs, lists={"past": past})
