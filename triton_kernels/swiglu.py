"""SwiGLU's product, out of the fused projection.

out_ni = silu(gate_ni) * up_ni      gate_up = [gate | up]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import on, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2 * I] -> [N, I]."""
    if runs_triton(gate_up):
        with on(gate_up.device):
            return launch_swiglu(gate_up)
    return swiglu_ref(gate_up)


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_kernel(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=valid)


def launch_swiglu(gate_up: Tensor) -> Tensor:
    assert gate_up.dim() == 2 and gate_up.is_contiguous() and gate_up.shape[1] % 2 == 0
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _swiglu_kernel[(num_rows, triton.cdiv(size, BLOCK))](gate_up, out, size, BLOCK=BLOCK)
    return out


SPECIMENS = (Specimen("bf16", _swiglu_kernel, {"gate_up": "*bf16", "out": "*bf16", "size": "i32:16", "BLOCK": BLOCK}),)
