"""ResidualStream: what a pass's layers read under their norms and add to."""

from typing import Any

from torch import Tensor, nn

from speeder_engine.models.linear import W8Linear, gated_linear
from speeder_engine.models.norm import RMSNorm
from speeder_engine.triton_kernels.add_rms_norm import Norm, add_rms_norm, rms_norm
from speeder_engine.triton_kernels.fused_linear import fused_linear
from speeder_engine.triton_kernels.quantize_rows import Kind, W8Weight, quantize_normed_rows


class ResidualStream:
    """The hidden states [N, d] of a pass. What is added waits for the norm that reads it, and goes with it; where
    layers are fused, norms and sums are part of the layers' own launches and nothing waits."""

    def __init__(self, hidden: Tensor, normed: Tensor | None = None, counters: Tensor | None = None) -> None:
        """`normed`: hidden under the first norm, where the caller has it. `counters`: of `fused_linear`; none where
        layers are not fused."""
        self.hidden, self._normed = hidden, normed
        self._waiting: Tensor | None = None
        self.counters = counters

    def read(self, norm: RMSNorm, linear: nn.Module, gated: bool = False) -> Tensor:
        """The layer's outputs [N, O], or [N, O / 2] where `gated`."""
        if self.counters is not None:
            return self._fused(linear, self.hidden, norm=Norm(norm.weight, norm.eps), gated=gated)
        if isinstance(linear, W8Linear) and linear.quantize and self._normed is None:
            rows = self._quantized(norm, linear.weight.kind)
            return linear.of_rows(rows, self.hidden.dtype, gated)
        normed = self.normed(norm)
        outputs: Tensor = gated_linear(linear, normed) if gated else linear(normed)
        return outputs

    def normed(self, norm: RMSNorm, rows: Tensor | None = None) -> Tensor:
        """All that was added, under a norm; of `rows` alone, if any are named."""
        if self._waiting is not None:
            self.hidden, normed = add_rms_norm(self.hidden, self._waiting, norm.weight, norm.eps)
            self._waiting = None
            return normed if rows is None else normed[rows]
        if self._normed is not None and rows is None:
            return self._normed
        return rms_norm(self.hidden, norm.weight, norm.eps, rows)

    def _quantized(self, norm: RMSNorm, kind: Kind) -> W8Weight:
        """The same in 8 bits, row by row."""
        x, residual = (self.hidden, None) if self._waiting is None else (self._waiting, self.hidden)
        self.hidden, rows = quantize_normed_rows(x, kind, Norm(norm.weight, norm.eps), residual)
        self._waiting = None
        return rows

    def add(self, linear: nn.Module, x: Tensor) -> None:
        """Adds the layer's outputs of x [N, I]."""
        self._normed = None
        if self.counters is not None:
            self.hidden = self._fused(linear, x, residual=self.hidden)
        else:
            self._waiting = linear(x)

    def select(self, rows: Tensor) -> None:
        """Only these rows from now on; before anything waits."""
        assert self._waiting is None
        self.hidden, self._normed = self.hidden[rows], None

    def _fused(self, linear: nn.Module, x: Tensor, **around: Any) -> Tensor:
        assert isinstance(linear, W8Linear | nn.Linear) and self.counters is not None
        return fused_linear(x, linear.weight, self.counters, linear.bias, **around)
