"""GraphSpec: a graph with everything its tracing needs: example inputs, dynamic dimensions, names, defaults."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from speeder_engine.export.onnx_config import OnnxConfig
from speeder_engine.export.static_graph import (
    CompressGraph,
    ExtendGraph,
    RecommendGraph,
    ScoreGraph,
    StaticModel,
)
from speeder_engine.parts import EngineParts

# sizes of the examples: different from one another, or the exporter would take two dimensions for one
BATCH, HISTORY, NEW, PAST, CANDIDATES, EXCLUDED, K, ITEMS = 3, 7, 4, 6, 5, 2, 8, 9


@dataclass(frozen=True)
class GraphSpec:
    """`inputs`: example tensors by name, lists flattened; `dynamic`: which of their dimensions vary, under which names;
    `defaults`: inputs that may be left out, and what they are then."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: dict[str, tuple[str | int, ...]]  # name -> dimensions
    defaults: dict[str, Tensor] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)  # parameter -> the inputs it takes as one list

    @property
    def static_model(self) -> StaticModel | None:
        """What the decoder's graphs share; None for a graph without a decoder."""
        model = getattr(self.module, "model", None)
        return model if isinstance(model, StaticModel) else None

    @property
    def input_shapes(self) -> dict[str, tuple[str | int, ...]]:
        """Every input's dimensions: a number, or the name of one that varies."""
        return {
            name: tuple(self.dynamic.get(name, {}).get(axis, size) for axis, size in enumerate(tensor.shape))
            for name, tensor in self.inputs.items()
        }

    def of_layers(self, kept: Collection[int]) -> "GraphSpec":
        """Without the inputs and outputs of other layers than these."""

        def keeps(name: str) -> bool:
            layer = LAYER_NAME.match(name)
            return layer is None or int(layer[1]) in kept

        return replace(
            self,
            inputs={name: tensor for name, tensor in self.inputs.items() if keeps(name)},
            dynamic={name: dims for name, dims in self.dynamic.items() if keeps(name)},
            outputs={name: dims for name, dims in self.outputs.items() if keeps(name)},
            lists={each: tuple(filter(keeps, names)) for each, names in self.lists.items()},
        )

    @property
    def input_order(self) -> list[str]:
        """Names as the traced graph has them: lists where their parameter stands."""
        return [each for name in self.arguments for each in self.lists.get(name, (name,))]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `module.forward` is called with."""
        return self._grouped(self.inputs)

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        made = {name: torch.export.Dim(name) for dims in self.dynamic.values() for name in dims.values()}
        dims = {name: {axis: made[dim] for axis, dim in self.dynamic.get(name, {}).items()} for name in self.inputs}
        return self._grouped(dims)

    def _grouped(self, values: dict[str, Any]) -> dict[str, Any]:
        listed = {name for names in self.lists.values() for name in names}
        single = {name: value for name, value in values.items() if name not in listed}
        return single | {name: [values[each] for each in names] for name, names in self.lists.items()}


def dtype_name(tensor: Tensor) -> str:
    """ "float32", "int64", ... as manifests write it."""
    return str(tensor.dtype).removeprefix("torch.")


LAYER_NAME = re.compile(r"(?:past_key_values|present)\.(\d+)\.")


def cache_names(kind: str, num_layers: int) -> tuple[str, ...]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ... as other exporters name them; or `present.`."""
    return tuple(f"{kind}.{index}.{part}" for index in range(num_layers) for part in ("key", "value"))


def graph_specs(parts: EngineParts, config: OnnxConfig) -> Iterable[GraphSpec]:
    """In the order they were asked for. The decoder's graphs share one `StaticModel`."""
    model: StaticModel | None = None
    for name in config.graphs:
        if name == "compress":
            yield _compress(parts)
            continue
        model = model or StaticModel(parts, config)
        make = {"score": _score, "recommend": _recommend, "extend": _extend}[name]
        yield make(model, parts, config)


def _rows(parts: EngineParts, length: int, name: str) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """History rows under this name, their lengths, and the calendar buckets of a model that reads times."""
    rows = torch.arange(BATCH * length).view(BATCH, length) % parts.catalogue.num_rows
    inputs = {name: rows, "lengths": torch.tensor([length, 1, 2])}
    dynamic: dict[str, dict[int, str]] = {name: {0: "batch", 1: name}, "lengths": {0: "batch"}}
    if parts.model.times is not None:
        inputs["buckets"] = torch.zeros_like(rows)
        dynamic["buckets"] = {0: "batch", 1: name}
    return inputs, dynamic


def _defaults(parts: EngineParts) -> dict[str, Tensor]:
    size = parts.catalogue.num_rows
    return {"available": parts.catalogue.available[:size].clone(), "prior": parts.catalogue.prior[:size].float()}


def _candidates() -> Tensor:
    return torch.zeros(BATCH, CANDIDATES, dtype=torch.int64)


def _score(model: StaticModel, parts: EngineParts, config: OnnxConfig) -> GraphSpec:
    inputs, dynamic = _rows(parts, HISTORY, "history")
    defaults = _defaults(parts)
    dims = ("batch", "candidates")
    return GraphSpec(
        "score",
        ScoreGraph(model),
        {**inputs, "candidates": _candidates(), **defaults},
        {**dynamic, "candidates": {0: "batch", 1: "candidates"}},
        {"scores": dims, "retrieve_scores": dims},
        defaults,
    )


def _recommend(model: StaticModel, parts: EngineParts, config: OnnxConfig) -> GraphSpec:
    inputs, dynamic = _rows(parts, HISTORY, "history")
    defaults = _defaults(parts) | {"exclude_seen": torch.tensor(True)}
    return GraphSpec(
        "recommend",
        RecommendGraph(model),
        {**inputs, **_search_inputs(), **defaults},
        {**dynamic, "excluded": {0: "batch", 1: "excluded"}},
        _search_outputs(parts),
        defaults,
    )


def _search_inputs() -> dict[str, Tensor]:
    return {"excluded": torch.full((BATCH, EXCLUDED), -1), "k": torch.tensor([K])}


def _search_outputs(parts: EngineParts) -> dict[str, tuple[str | int, ...]]:
    found = ("batch", "k")
    return {"top_rows": found, "top_scores": found, "user_vectors": ("batch", parts.config.decoder.hidden_size)}


def _extend(model: StaticModel, parts: EngineParts, config: OnnxConfig) -> GraphSpec:
    inputs, dynamic = _rows(parts, NEW, "rows")
    decoder, defaults = parts.config.decoder, _defaults(parts)
    past = cache_names("past_key_values", decoder.num_layers)
    # buffers of one user are written in place; otherwise what is present is the past and the new rows
    in_place = config.flavour == "ort"
    length = len(parts.config.prompt.instruction_ids) + PAST + NEW + 1 if in_place else PAST
    shape = (BATCH, decoder.num_kv_heads, length, decoder.head_dim)
    present = ("batch", decoder.num_kv_heads, "past" if in_place else "past + rows", decoder.head_dim)
    inputs |= {"past_lengths": torch.tensor([2, 0, 4]), "candidates": _candidates(), **_search_inputs(), **defaults}
    inputs |= {name: torch.zeros(shape, dtype=config.torch_dtype) for name in past}
    if parts.config.followers is not None:
        inputs["last_rows"] = torch.full((BATCH, parts.config.followers.last), -1)
        dynamic["last_rows"] = {0: "batch"}
    dynamic |= {"past_lengths": {0: "batch"}, "candidates": {0: "batch", 1: "candidates"}}
    dynamic |= {"excluded": {0: "batch", 1: "excluded"}} | {name: {0: "batch", 2: "past"} for name in past}
    scores = dict.fromkeys(("scores", "retrieve_scores"), ("batch", "candidates"))
    kept = dict.fromkeys(cache_names("present", decoder.num_layers), present)
    outputs = {**scores, **_search_outputs(parts), **kept}
    return GraphSpec("extend", ExtendGraph(model), inputs, dynamic, outputs, defaults, {"past": past})


def _compress(parts: EngineParts) -> GraphSpec:
    widths = parts.config.compressor.modalities
    inputs = {"present": torch.ones(ITEMS, len(widths), dtype=torch.bool)}
    inputs |= {name: torch.zeros(ITEMS, width) for name, width in widths.items()}
    dynamic = {name: {0: "items"} for name in inputs}
    outputs: dict[str, tuple[str | int, ...]] = {"tokens": ("items", parts.config.compressor.hidden_size)}
    module = CompressGraph(parts.config.compressor, parts.compressor)
    return GraphSpec("compress", module, inputs, dynamic, outputs, lists={"features": tuple(widths)})
