"""The decoder's linear layers: torch's own, or of 8-bit weights, which replace those once a model is placed."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speeder_engine.triton_kernels.linear_w8 import linear_w8, linear_w8_rows, multiplies_fp8
from speeder_engine.triton_kernels.quantize_rows import Kind, W8Weight, quantize_rows, quantize_weight
from speeder_engine.triton_kernels.swiglu import swiglu


class W8Linear(nn.Module):
    """A linear layer whose weight is int8 or fp8, with one scale an output channel."""

    values: Tensor  # int8 or float8_e4m3fn [O, I]
    scales: Tensor  # fp32 [O]

    def __init__(self, weight: W8Weight, bias: Tensor | None = None, quantize: bool = False) -> None:
        """`quantize`: rows are brought to the weight's kind too, each by a scale of its own."""
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quantize = quantize

    @classmethod
    def of(cls, linear: nn.Linear, kind: Kind, device: torch.device, with_rows: bool = False) -> "W8Linear":
        """On `device`, of the weights as they are held. `with_rows`: fp8 rows too where the device multiplies them."""
        weight = quantize_weight(linear.weight.detach().to(device).contiguous(), kind)
        bias = None if linear.bias is None else linear.bias.detach().to(device)
        return cls(weight, bias, with_rows and kind == "fp8" and multiplies_fp8(device))

    @property
    def weight(self) -> W8Weight:
        return W8Weight(self.values, self.scales)

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """x [N, I] -> [N, O], or [N, O / 2] where `gated`: [gate | up] in one matrix."""
        return self._of(x, self.weight, self.bias, gated)

    def of_rows(self, rows: W8Weight, dtype: torch.dtype, gated: bool = False) -> Tensor:
        """The same of rows that are quantized already."""
        return linear_w8_rows(rows, self.weight, dtype, self.bias, gated)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Some of the outputs."""
        bias = None if self.bias is None else self.bias[outputs]
        return self._of(x, W8Weight(self.values[outputs], self.scales[outputs]), bias)

    def _of(self, x: Tensor, weight: W8Weight, bias: Tensor | None, gated: bool = False) -> Tensor:
        if self.quantize:
            return linear_w8_rows(quantize_rows(x, weight.kind), weight, x.dtype, bias, gated)
        return linear_w8(x, weight, bias, gated)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves values and scales and leaves their types alone: in bf16 they would be what they were made from."""
        values, scales = self.values, self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values, self.scales = values.to(self.scales.device), scales.to(self.scales.device)
        return self


def linear_part(linear: nn.Module, x: Tensor, outputs: slice) -> Tensor:
    """x [N, I] -> some of a layer's outputs [N, o]."""
    if isinstance(linear, W8Linear):
        return linear.part(x, outputs)
    assert isinstance(linear, nn.Linear)
    return F.linear(x, linear.weight[outputs], None if linear.bias is None else linear.bias[outputs])


def gated_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """x [N, I] -> silu(gate) * up [N, O / 2] of a layer [gate | up]."""
    return linear(x, gated=True) if isinstance(linear, W8Linear) else swiglu(linear(x))


def quantize_linears(module: nn.Module, kind: Kind, device: torch.device, with_rows: bool = False) -> None:
    """Puts a W8Linear on `device` in the place of every linear layer below `module`, one after the other: no more than
    one matrix is there in both types."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, W8Linear.of(child, kind, device, with_rows))
        else:
            quantize_linears(child, kind, device, with_rows)
