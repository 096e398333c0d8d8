"""The graphs that are exported: what `Engine` computes, as modules of fixed weights over rows of ids.

score      history, lengths, candidates                     -> scores
recommend  history, lengths, excluded, k                    -> top_rows, top_scores over the catalogue
extend     rows, lengths, past keys and values, ...         -> present keys and values, and both of the above
compress   features, which are present                      -> item tokens

Histories are padded on the right (`lengths` tells), candidates and excluded rows with -1. The instruction's keys and
values are constants, so that it costs no rows. `available`, `prior` and `exclude_seen` are inputs with defaults.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speeder_engine.config import CompressorConfig, check
from speeder_engine.export.graph_attention import DenseAttend, GraphRows, GroupQueryAttend, LayerPairs
from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.static_followers import StaticFollowers
from speeder_engine.models.compressor import make_compressor
from speeder_engine.models.decoder import CausalAttend, Decoder, DecoderLayer
from speeder_engine.models.norm import RMSNorm
from speeder_engine.parts import EngineParts
from speeder_engine.triton_kernels.qk_norm_rope_store import rotate
from speeder_engine.triton_kernels.swiglu import swiglu_ref

OWN_DOMAIN, MARK = "speeder_engine", "layer_end"  # an operator of our own, in no graph that is written
FLAVOURS: dict[str, type[DenseAttend]] = {"standard": DenseAttend, "ort": GroupQueryAttend}


@dataclass(frozen=True)
class Overrides:
    """What a server may change without a new export: inputs whose defaults are in the file."""

    available: Tensor  # bool [I]: may be answered
    prior: Tensor  # float32 [I], added times the heads' beta
    exclude_seen: Tensor | None = None  # bool []: the history is not recommended again


class StaticModel(nn.Module):
    """An engine's weights as constants of a graph: matrices, item tokens, keys and values in `dtype`; what is small and
    costs accuracy (prompts, norms, rotations, the rows that layers add to, heads and scores) in float32."""

    item_tokens: Tensor
    cos: Tensor
    sin: Tensor
    instruction_hidden: Tensor

    def __init__(self, parts: EngineParts, export: OnnxConfig) -> None:
        super().__init__()
        titles = "heads: this model was trained without a retrieve head, and titles are not exported; serve the engine"
        check(parts.config.heads.retrieve, titles)
        check(parts.catalogue.num_rows > 0, "catalogue: it is empty, and a graph has its items inside; add some first")
        model, dtype = copy.deepcopy(parts.model).float(), export.torch_dtype
        self.export = export
        instruction = run_instruction(model.decoder, model.instruction)
        self.window = parts.config.prompt.window
        positions = len(parts.config.prompt.instruction_ids) + torch.arange(self.window + 1)
        cos, sin = model.decoder.rotary(positions)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("item_tokens", parts.catalogue.tokens[: parts.catalogue.num_rows].to(dtype))
        self.register_buffer("instruction_hidden", instruction.hidden)
        self.decoder = in_half(model.decoder, dtype)
        for layer, (keys, values) in zip(self.decoder.layers, instruction.pairs, strict=True):
            # each layer's beside its weights: what is said of one is said of both
            layer.register_buffer("instruction_keys", keys.to(dtype))
            layer.register_buffer("instruction_values", values.to(dtype))
        self.prompts, self.times = model.prompts, model.times
        self._marks_layers = False
        self.has_rank = parts.config.heads.rank
        self.retrieve, self.rank = model.retrieve, model.rank
        self.followers = None
        if model.followers is not None:
            self.followers = StaticFollowers(model.followers, parts.catalogue.num_rows, export.flavour == "ort")
        self.requires_grad_(False).eval()

    @property
    def instruction(self) -> LayerPairs:
        return [
            (layer.get_buffer("instruction_keys"), layer.get_buffer("instruction_values"))
            for layer in self.decoder.layers
        ]

    @contextmanager
    def only_layers(self, kept: Sequence[int]) -> Iterator[None]:
        """Inside, the decoder has these layers alone, and exports mark where each but the last ends."""
        layers = self.decoder.layers
        self.decoder.layers = nn.ModuleList(layers[index] for index in kept)
        self._marks_layers = True
        try:
            yield
        finally:
            self.decoder.layers = layers
            self._marks_layers = False

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        candidates: Tensor | None = None,
        buckets: Tensor | None = None,
        past_lengths: Tensor | None = None,
        past: LayerPairs | None = None,
    ) -> tuple[Tensor, Tensor, LayerPairs]:
        """history int64 [B, T], lengths [B], candidates [B, C] -> h(last) [B, d] and the candidates' [B, C, d], in
        float32, and the history's keys and values."""
        rows = self._rows(history, lengths, candidates, past_lengths, past)
        rotary = self.cos[rows.slots], self.sin[rows.slots]
        attend = FLAVOURS[self.export.flavour](rows, self.instruction, *rotary, self.export.has_attention_operator)
        hidden = self._embed(history, candidates, buckets, rows.slots)
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            # the last layer finishes only what is read
            only_read = index == len(self.decoder.layers) - 1
            mixed = attend(index, layer, *layer.project(layer.input_norm(hidden)), only_read)
            hidden = _finish(layer, rows.read(hidden) if only_read else hidden, mixed)
            if self._marks_layers and not only_read:
                hidden = mark_layer(hidden)
        hidden = self.decoder.norm(hidden)
        last_hidden = torch.where((rows.lengths == 0).unsqueeze(1), self.instruction_hidden, hidden[:, 0])
        return last_hidden, hidden[:, 1:], attend.present

    def tokens(self, rows: Tensor) -> Tensor:
        """Rows of the catalogue [...] -> item tokens [..., d]; padding reads some item's, which nobody sees."""
        return self.item_tokens[rows.clamp(0, self.item_tokens.shape[0] - 1)]

    def _rows(
        self,
        history: Tensor,
        lengths: Tensor,
        candidates: Tensor | None,
        past_lengths: Tensor | None,
        past: LayerPairs | None,
    ) -> GraphRows:
        batch, num_new = history.shape
        before = torch.zeros_like(lengths) if past_lengths is None else past_lengths
        # padding may count beyond the window
        slots = (before.unsqueeze(1) + torch.arange(num_new)).clamp(max=self.window)
        total = before + lengths
        count = 0
        if candidates is not None:
            count = candidates.shape[1]
            slots = torch.cat([slots, total.clamp(max=self.window).unsqueeze(1).expand(-1, count)], dim=1)
        last = (lengths - 1).clamp(min=0)
        return GraphRows(batch, num_new, count, slots, total, last, past_lengths, past or [])

    def _embed(self, history: Tensor, candidates: Tensor | None, buckets: Tensor | None, slots: Tensor) -> Tensor:
        """[B, T + C, d]: what the kernel `item_embed` gives, history before candidates."""
        embedded = self.tokens(history).float()
        if self.times is not None:
            assert buckets is not None, "a model that reads times takes buckets"
            embedded = embedded + self.times(buckets)
        if candidates is not None:
            embedded = torch.cat([embedded, self.tokens(candidates).float() + self.rank.role], dim=1)
        out: Tensor = embedded + self.prompts(slots)
        return out

    def following(self, history: Tensor, lengths: Tensor) -> Tensor | None:
        """f [B, I] of whole histories; None for a model without followers."""
        return None if self.followers is None else self.followers(self.followers.last_rows(history, lengths))

    def score(
        self, last_hidden: Tensor, hidden: Tensor, candidates: Tensor, overrides: Overrides, following: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The candidates' scores [B, C] by the rank head (by the other where there is none), and by the retrieve head;
        -inf for padding and what is not available."""
        vectors = self.retrieve(last_hidden)
        retrieved = (vectors.unsqueeze(1) * self.tokens(candidates).float()).sum(dim=-1)
        rows = candidates.clamp(min=0)
        prior, closed = overrides.prior[rows], (candidates < 0) | ~overrides.available[rows]
        by_retrieve = retrieved + self.retrieve.beta * prior
        ranked = self.rank(hidden, retrieved) + self.rank.beta * prior
        if self.followers is not None and following is not None:
            followed = following.gather(1, rows)
            by_retrieve = by_retrieve + self.followers.retrieve * followed
            ranked = ranked + self.followers.rank * followed
        by_retrieve = by_retrieve.masked_fill(closed, float("-inf"))
        if not self.has_rank:
            return by_retrieve, by_retrieve.clone()
        return ranked.masked_fill(closed, float("-inf")), by_retrieve

    def search(
        self, vectors: Tensor, closed: Tensor, k: Tensor, overrides: Overrides, following: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """User vectors [B, d] -> the best rows and scores [B, min(k, I)] of what `closed` (bool [B, I]) leaves open;
        equal scores in the catalogue's order, closed items last with -inf."""
        num_items = self.item_tokens.shape[0]
        scores = self.catalogue_scores(vectors, closed, overrides, following)
        depth = torch.minimum(k, torch.tensor([num_items])).item()
        torch._check(depth >= 1)
        torch._check(depth <= num_items)
        values, rows = torch.topk(scores, depth, dim=1)  # type: ignore[arg-type]
        return rows, values

    def catalogue_scores(
        self, vectors: Tensor, closed: Tensor, overrides: Overrides, following: Tensor | None
    ) -> Tensor:
        """User vectors [B, d] -> float32 [B, I], -inf for what is `closed` (bool [B, I]) or not available."""
        # the table stands on the left: on the right a second, transposed copy of it would be a constant too
        scores = (self.item_tokens @ vectors.to(self.item_tokens.dtype).T).T.float()
        scores = scores + self.retrieve.beta * overrides.prior
        if self.followers is not None and following is not None:
            scores = scores + self.followers.retrieve * following
        return scores.masked_fill(closed | ~overrides.available, float("-inf"))

    def closed(self, rows: Tensor) -> Tensor:
        """Rows [B, E], -1 where there is none -> bool [B, I]: true for each that is named."""
        num_items = self.item_tokens.shape[0]
        spare = torch.where(rows < 0, num_items, rows)
        named = torch.zeros(rows.shape[0], num_items + 1).scatter(1, spare, 1.0)
        return named[:, :num_items] > 0


class ScoreGraph(nn.Module):
    """Named candidates."""

    def __init__(self, model: StaticModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        available: Tensor,
        prior: Tensor,
        buckets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        last_hidden, hidden, _ = self.model(history, lengths, candidates, buckets)
        following = self.model.following(history, lengths)
        return self.model.score(last_hidden, hidden, candidates, Overrides(available, prior), following)


class RecommendGraph(nn.Module):
    """The whole catalogue."""

    def __init__(self, model: StaticModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        history: Tensor,
        lengths: Tensor,
        excluded: Tensor,
        k: Tensor,
        available: Tensor,
        prior: Tensor,
        exclude_seen: Tensor,
        buckets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        last_hidden, _, _ = self.model(history, lengths, None, buckets)
        vectors = self.model.retrieve(last_hidden)
        seen = exclude_seen & (torch.arange(history.shape[1]) < lengths.unsqueeze(1))
        closed = self.model.closed(torch.cat([torch.where(seen, history, -1), excluded], dim=1))
        following = self.model.following(history, lengths)
        rows, scores = self.model.search(vectors, closed, k, Overrides(available, prior), following)
        return rows, scores, vectors


class ExtendGraph(nn.Module):
    """A returning user: only rows that are new. At least one, unless nothing is past either."""

    def __init__(self, model: StaticModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        rows: Tensor,
        lengths: Tensor,
        past_lengths: Tensor,
        candidates: Tensor,
        excluded: Tensor,
        k: Tensor,
        available: Tensor,
        prior: Tensor,
        past: list[Tensor],
        buckets: Tensor | None = None,
        last_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """past: keys and values [B, H_kv, P, D] of every layer in turn; so is what is present. last_rows [B, last]: the
        history's last rows, newest first, for a model with followers."""
        pairs = list(zip(past[::2], past[1::2], strict=True))
        last_hidden, hidden, present = self.model(rows, lengths, candidates, buckets, past_lengths, pairs)
        overrides = Overrides(available, prior)
        followers = self.model.followers
        following = None if followers is None or last_rows is None else followers(last_rows)
        scores, by_retrieve = self.model.score(last_hidden, hidden, candidates, overrides, following)
        vectors = self.model.retrieve(last_hidden)
        top_rows, top_scores = self.model.search(vectors, self.model.closed(excluded), k, overrides, following)
        return scores, by_retrieve, top_rows, top_scores, vectors, [part for pair in present for part in pair]


class CompressGraph(nn.Module):
    """New items: features [N, width] of every modality, `present` bool [N, M] -> item tokens [N, d]; float32 always."""

    def __init__(self, config: CompressorConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.compressor = make_compressor(config)
        self.compressor.load_state_dict(dict(weights))
        self.requires_grad_(False).eval()

    def forward(self, present: Tensor, features: list[Tensor]) -> Tensor:
        tokens: Tensor = self.compressor(dict(zip(self.compressor.modalities, features, strict=True)), present)
        return tokens


@dataclass(frozen=True)
class Instruction:
    """What every prompt begins with, computed once."""

    pairs: LayerPairs  # rotated keys, values [H_kv, m, D] of every layer
    hidden: Tensor  # [d] of its last row: an empty history's h(last)


@torch.no_grad()
def run_instruction(decoder: Decoder, embedded: Tensor) -> Instruction:
    positions = torch.arange(embedded.shape[0])
    attend = _Recorder(*decoder.rotary(positions))
    hidden = decoder(embedded, positions, attend)
    # out of inference mode, where the decoder works and whose tensors can't be traced
    return Instruction([(keys.clone(), values.clone()) for keys, values in attend.pairs], hidden[-1].clone())


class _Recorder(CausalAttend):
    """Causal attention that keeps every layer's keys and values."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__(cos, sin)
        self.pairs: LayerPairs = []

    def __call__(self, layer: DecoderLayer, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        self.pairs.append((rotate(layer.norm_k(k), self.cos, self.sin).transpose(0, 1), v.transpose(0, 1)))
        return super().__call__(layer, q, k, v, rows)


def _finish(layer: DecoderLayer, hidden: Tensor, mixed: Tensor) -> Tensor:
    """hidden [..., d] and what attention made of these rows [..., H, D] -> [..., d], in plain operators."""
    hidden = hidden + layer.out(mixed.flatten(-2))
    out: Tensor = hidden + layer.down(swiglu_ref(layer.gate_up(layer.post_norm(hidden))))
    return out


def mark_layer(hidden: Tensor) -> Tensor:
    """What `repeated_layers` finds the end of a layer by."""
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{OWN_DOMAIN}::{MARK}", (hidden,), dtype=hidden.dtype, shape=hidden.shape, version=1
    )
    return marked


class WideNorm(nn.RMSNorm):
    """torch's own RMSNorm, which the exporter knows as one operator, in float32; the result in `dtype`."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        super().__init__(norm.weight.shape[0], eps=norm.eps)
        self.weight = nn.Parameter(norm.weight.float())
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(self.dtype)


def in_half(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Matrices in `dtype`, norms in float32, and so the rows that all layers add to: in half precision every layer
    would round them again."""
    norms = [(module, name, child) for module in decoder.modules() for name, child in module.named_children()]
    decoder = decoder.to(dtype)
    for module, name, child in norms:
        if isinstance(child, RMSNorm):
            setattr(module, name, WideNorm(child, torch.float32 if module is decoder else dtype))
    return decoder
