"""float8: a graph's linear layers in e4m3, as QuantizeLinear and DequantizeLinear around what multiplies.

Weights have one scale a layer. Activations have one too, found by running made histories; what is larger in service is
cut off at the largest number. Everything else stays in half precision. How much accuracy this costs is the model's
affair: it is not measured here.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.export.static_graph import StaticModel

TYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(TYPE).max
HISTORIES, CANDIDATES = 16, 8  # of the made users that scales are taken from
OPSET = 23


class Float8Linear(nn.Module):
    """A linear layer whose weight and input pass through float8; `largest`: of its inputs' absolute values."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax().clamp(min=torch.finfo(torch.float16).tiny) / LARGEST
        dtype = linear.weight.dtype
        self.register_buffer("weight", (weight / scale).to(TYPE))
        self.register_buffer("weight_scale", scale.to(dtype))
        self.register_buffer("input_scale", torch.tensor(max(largest, 1e-3) / LARGEST, dtype=dtype))
        self.register_buffer("zero", torch.zeros((), dtype=TYPE))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return F.linear(self._exported(x), self._operator("Dequantize", self.weight, self.weight_scale), self.bias)
        rounded = (x / self.input_scale).clamp(-LARGEST, LARGEST).to(TYPE).to(x.dtype) * self.input_scale
        return F.linear(rounded, self.weight.to(x.dtype) * self.weight_scale, self.bias)

    def _exported(self, x: Tensor) -> Tensor:
        return self._operator("Dequantize", self._operator("Quantize", x, self.input_scale), self.input_scale)

    def _operator(self, kind: str, x: Tensor, scale: Tensor) -> Tensor:
        """QuantizeLinear, to the type of its third input, or DequantizeLinear, to the type of the scale."""
        quantizes = kind == "Quantize"
        inputs = (x, scale, self.zero) if quantizes else (x, scale)
        dtype = TYPE if quantizes else scale.dtype
        made: Tensor = torch.onnx.ops.symbolic(f"{kind}Linear", inputs, dtype=dtype, shape=x.shape, version=OPSET)
        return made


@torch.no_grad()
def use_float8(model: StaticModel, seed: int = 0) -> None:
    """Replaces the decoder's linear layers, in place."""
    found = _largest_inputs(model, torch.Generator().manual_seed(seed))
    for layer in model.decoder.layers:
        for name, child in list(layer.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer, name, Float8Linear(child, found[child]))


def _largest_inputs(model: StaticModel, generator: torch.Generator) -> dict[nn.Module, float]:
    """The largest absolute value that each linear layer is given, over made histories of a whole window."""
    found: dict[nn.Module, float] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[module] = max(found.get(module, 0.0), float(inputs[0].abs().max()))

    watched = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch) for module in watched]
    num_items = model.item_tokens.shape[0]
    history = torch.randint(num_items, (HISTORIES, model.window), generator=generator)
    candidates = torch.randint(num_items, (HISTORIES, CANDIDATES), generator=generator)
    buckets = None if model.times is None else torch.zeros_like(history)
    try:
        model(history, torch.full((HISTORIES,), model.window), candidates, buckets)
    finally:
        for hook in hooks:
            hook.remove()
    return found
