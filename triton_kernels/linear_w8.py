"""Linear layers of 8-bit weights, with a scale for every output channel.

weight-only     out_no = s_o sum_i x_ni w_oi + b_o                w int8 or fp8 (e4m3), x as it comes
W8A8            out_no = t_n s_o sum_i q_ni w_oi + b_o            x_ni = t_n q_ni, of the weights' kind
gated           silu(out_no) * out_n(o + O/2)                     for o < O/2: [gate | up] in one matrix

Every row has a scale t_n of its own: with one for all, a neighbour would change a row's result. Sums are kept in int32
or fp32; fp8 is read bit by bit where a GPU has no instruction for it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import interpreted, on, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen

Kind = Literal["int8", "fp8"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST: dict[Kind, float] = {"int8": 127.0, "fp8": 448.0}
NATIVE_FP8 = (8, 9)  # the first compute capability that multiplies it
QUANTIZED_AT_ONCE = 2048
MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class W8Weight:
    """A matrix [O, I] in 8 bits, quantised row by row: a weight's output channels, or rows of activations."""

    values: Tensor  # int8 or float8_e4m3fn [O, I]
    scales: Tensor  # fp32 [O]

    @property
    def kind(self) -> Kind:
        return "int8" if self.values.dtype == torch.int8 else "fp8"

    def dequantized(self) -> Tensor:
        """fp32 [O, I]."""
        return self.values.float() * self.scales.unsqueeze(1)


def quantize_weight(weight: Tensor, kind: Kind) -> W8Weight:
    """[O, I] of any dtype; the largest element of an output channel becomes the largest number of the kind."""
    return quantize_rows(weight.detach(), kind)


def quantize_rows(x: Tensor, kind: Kind) -> W8Weight:
    """x [N, I], each row by its own largest element."""
    if runs_triton(x):
        with on(x.device):
            return launch_quantize_rows(x, kind)
    return quantize_rows_ref(x, kind)


def quantize_rows_ref(x: Tensor, kind: Kind) -> W8Weight:
    wide = x.float()
    largest = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scales = torch.where(largest > 0, largest / LARGEST[kind], 1.0)
    scaled = (wide / scales.unsqueeze(1)).clamp(-LARGEST[kind], LARGEST[kind])
    return W8Weight((scaled.round() if kind == "int8" else scaled).to(DTYPES[kind]), scales)


def linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False, quantize: bool = False
) -> Tensor:
    """x [N, I] -> [N, O], or [N, O / 2] where `gated`. `quantize`: x is brought to the weight's kind, row by row."""
    if runs_triton(x, weight.values, weight.scales, bias):
        with on(x.device):
            return launch_linear_w8(x, weight, bias, gated, quantize)
    return linear_w8_ref(x, weight, bias, gated, quantize)


def linear_w8_ref(
    x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False, quantize: bool = False
) -> Tensor:
    """Computed in fp64 where both sides are 8-bit: their products are integers or nearly so, and must be exact."""
    if quantize:
        rows = quantize_rows_ref(x, weight.kind)
        products = (rows.values.double() @ weight.values.double().T).float() * rows.scales.unsqueeze(1)
    else:
        products = x.float() @ weight.values.float().T
    out = products * weight.scales
    if bias is not None:
        out = out + bias.float()
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out.to(x.dtype)


def launch_quantize_rows(x: Tensor, kind: Kind) -> W8Weight:
    assert x.dim() == 2 and x.is_contiguous()
    num_rows, size = x.shape
    values = torch.empty(num_rows, size, dtype=torch.int8, device=x.device)
    scales = torch.ones(num_rows, dtype=torch.float32, device=x.device)
    if x.numel():
        _quantize_rows_kernel[(num_rows,)](x, values, scales, SIZE=size, BLOCK=QUANTIZED_AT_ONCE, FP8=kind == "fp8")
    return W8Weight(values.view(DTYPES[kind]), scales)


def launch_linear_w8(
    x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False, quantize: bool = False
) -> Tensor:
    (num_rows, size), num_outputs = x.shape, weight.values.shape[0]
    assert x.is_contiguous() and weight.values.is_contiguous() and weight.values.shape[1] == size
    assert weight.scales.dtype == torch.float32 and weight.scales.shape == (num_outputs,)
    assert bias is None or (bias.is_contiguous() and bias.shape == (num_outputs,))
    assert not gated or num_outputs % 2 == 0
    width = num_outputs // 2 if gated else num_outputs
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    fp8, wide = weight.kind == "fp8", interpreted(x)
    native = fp8 and quantize and multiplies_fp8(x.device)
    rows = launch_quantize_rows(x, weight.kind) if quantize else None
    left, right = x if rows is None else rows.values, weight.values
    if fp8 and not native:
        left, right = left if rows is None else left.view(torch.uint8), right.view(torch.uint8)
    options = linear_options(num_rows, width, x.element_size())
    blocks = triton.cdiv(num_rows, options["BLOCK_ROWS"]) * triton.cdiv(width, options["BLOCK_OUT"])
    _linear_w8_kernel[(blocks,)](
        left, None if rows is None else rows.scales, right, weight.scales, bias, out, num_rows, width,
        SIZE=size, FP8=fp8, NATIVE=native, ROWS=quantize, BIAS=bias is not None, GATED=gated, WIDE=wide, **options,
    )  # fmt: skip
    return out


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has matrix units for fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= NATIVE_FP8


def linear_options(num_rows: int, width: int, element_size: int) -> dict[str, int]:
    """Block sizes: few rows leave a step to the weights' bytes, many to the matrix units; fp32 has none of those. Tiles
    of narrow outputs are halved until every multiprocessor of a large GPU has one."""
    if element_size == 4:
        return {"BLOCK_ROWS": 16, "BLOCK_OUT": 64, "BLOCK_SIZE": 32, "num_warps": 4, "num_stages": 3}
    if num_rows <= 16:
        options = {"BLOCK_ROWS": 16, "BLOCK_OUT": 32, "BLOCK_SIZE": 128, "num_warps": 4, "num_stages": 4}
    elif num_rows <= 64:
        rows = 32 if num_rows <= 32 else 64
        options = {"BLOCK_ROWS": rows, "BLOCK_OUT": 64, "BLOCK_SIZE": 128, "num_warps": 4, "num_stages": 3}
    else:
        options = {"BLOCK_ROWS": 128, "BLOCK_OUT": 64, "BLOCK_SIZE": 64, "num_warps": 8, "num_stages": 3}
    least, row_blocks = 16 if num_rows <= 32 else 32, -(-num_rows // options["BLOCK_ROWS"])
    while options["BLOCK_OUT"] > least and row_blocks * -(-width // options["BLOCK_OUT"]) < MULTIPROCESSORS:
        options["BLOCK_OUT"] //= 2
    return options


@triton.jit(do_not_specialize=["num_rows"])
def _linear_w8_kernel(
    x, x_scales, weight, scales, bias, out, num_rows, width,
    SIZE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """A tile of the output; of its up half too, where gated."""
    # programs of the same outputs stand side by side, so that the weights are read once
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = (tl.program_id(0) // row_blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    real, made = rows < num_rows, outputs < width
    found = _products(x, weight, rows, outputs, real, made, SIZE, BLOCK_SIZE, FP8, NATIVE, ROWS, WIDE)
    found = _scaled(found, x_scales, scales, bias, rows, outputs, real, made, ROWS, BIAS)
    if GATED:
        outputs += width
        up = _products(x, weight, rows, outputs, real, made, SIZE, BLOCK_SIZE, FP8, NATIVE, ROWS, WIDE)
        up = _scaled(up, x_scales, scales, bias, rows, outputs, real, made, ROWS, BIAS)
        found = found / (1 + tl.exp(-found)) * up
        outputs -= width
    places = out + rows.to(tl.int64)[:, None] * width + outputs[None, :]
    tl.store(places, found.to(out.dtype.element_ty), mask=real[:, None] & made[None, :])


@triton.jit
def _products(
    x, weight, rows, outputs, real, made, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x . w [rows, outputs] in fp32, without scales."""
    WHOLE: tl.constexpr = ROWS and not FP8
    DECODED: tl.constexpr = FP8 and not NATIVE
    columns = tl.arange(0, BLOCK_SIZE)
    left_at = x + rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    right_at = weight + outputs.to(tl.int64)[None, :] * SIZE + columns[:, None]
    total = tl.zeros([rows.shape[0], outputs.shape[0]], tl.int32 if WHOLE else tl.float32)
    for start in range(0, SIZE, BLOCK_SIZE):
        inside = columns < SIZE - start
        left = tl.load(left_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_at + start, mask=made[None, :] & inside[:, None], other=0.0)
        if WHOLE:
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        elif NATIVE:
            # 32 columns are one instruction of Hopper's: sums leave its short accumulator after each. With 0 Triton
            # takes older instructions, which multiply fp16
            total = tl.dot(left, right, total, max_num_imprecise_acc=32)
        else:
            DOT: tl.constexpr = tl.float32 if WIDE else tl.float16 if ROWS else x.dtype.element_ty
            left = decoded(left) if ROWS else left
            right = decoded(right) if FP8 else right
            total = tl.dot(cast(left, DOT), cast(right, DOT), total, input_precision="ieee")
    # what is decoded is too small by 2 ** 8
    shrunk: tl.constexpr = (65536.0 if ROWS else 256.0) if DECODED else 1.0
    return total.to(tl.float32) * shrunk


@triton.jit
def _scaled(found, x_scales, scales, bias, rows, outputs, real, made, ROWS: tl.constexpr, BIAS: tl.constexpr):
    if ROWS:
        found = found * tl.load(x_scales + rows, mask=real, other=0.0)[:, None]
    found = found * tl.load(scales + outputs, mask=made, other=0.0)[None, :]
    if BIAS:
        found = found + tl.load(bias + outputs, mask=made, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit
def decoded(bits):
    """e4m3 in a uint8 -> fp16, too small by 2 ** 8: the exponents' biases are 7 and 15. Exact, subnormals too."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """By way of fp32, from where every target is reached."""
    return x if x.dtype == DTYPE else x.to(tl.float32).to(DTYPE)


@triton.jit
def _quantize_rows_kernel(x, values, scales, SIZE: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr):
    """A row a program, read twice: its largest element first."""
    LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
    start = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for at in range(0, SIZE, BLOCK):
        part = tl.load(x + start + at + columns, mask=columns < SIZE - at, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
    top = tl.max(largest, axis=0)
    scale = tl.where(top > 0, tl.div_rn(top, top * 0 + LARGEST), 1.0)
    tl.store(scales + tl.program_id(0), scale)
    for at in range(0, SIZE, BLOCK):
        inside = columns < SIZE - at
        part = tl.load(x + start + at + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.div_rn(part, tl.zeros([BLOCK], tl.float32) + scale)
        code = _e4m3(scaled) if FP8 else _whole(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int32)
        tl.store(values + start + at + columns, code.to(tl.int8), mask=inside)


@triton.jit
def _whole(x):
    """To the nearest whole number, halves to the even one, for |x| < 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x):
    """The eight bits of the nearest e4m3, as torch rounds to it."""
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = _whole(size * ((130 - exponent) << 23).to(tl.float32, bitcast=True))  # eighths of 2 ** exponent
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return sign | (((exponent + 6) << 3) + steps.to(tl.int32))


def _linear_specimen(
    label: str, kind: str, stored: str, outputs: int, size: int, num_rows: int, since: int = 80
) -> Specimen:
    """`kind` is of x or of its quantised rows; `stored` of the weights: u8 is fp8 to be decoded."""
    gated = outputs > 2 * size
    options = linear_options(num_rows, outputs // 2 if gated else outputs, 4 if kind == "*fp32" else 2)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    rows = kind in ("*i8", "*u8", "*fp8e4nv")
    types = {"x": kind, "x_scales": "*fp32", "weight": stored, "scales": "*fp32", "bias": "*bf16"}
    types |= {"out": "*fp32" if kind == "*fp32" else "*bf16", "num_rows": "i32", "width": "i32:16"}
    flags = {"SIZE": size, "FP8": stored != "*i8", "NATIVE": stored == "*fp8e4nv", "ROWS": rows}
    flags |= {"BIAS": True, "GATED": gated, "WIDE": False}
    return Specimen(label, _linear_w8_kernel, {**types, **flags, **options}, **launch, since=since)


def _quantize_specimen(label: str, kind: str, fp8: bool) -> Specimen:
    arguments = {"x": kind, "values": "*i8", "scales": "*fp32", "SIZE": 3584, "BLOCK": QUANTIZED_AT_ONCE, "FP8": fp8}
    return Specimen(label, _quantize_rows_kernel, arguments)


SPECIMENS = (
    _linear_specimen("7B int8 1 row", "*bf16", "*i8", 37888, 3584, 1),
    _linear_specimen("7B int8 64 rows", "*bf16", "*i8", 3584, 18944, 64),
    _linear_specimen("7B int8 512 rows", "*bf16", "*i8", 37888, 3584, 512),
    _linear_specimen("7B int8 32 rows", "*bf16", "*i8", 37888, 3584, 32),
    _linear_specimen("7B int8 out 16 rows", "*bf16", "*i8", 3584, 3584, 16),
    _linear_specimen("0.5B int8 out 32 rows", "*bf16", "*i8", 896, 896, 32),
    _linear_specimen("0.5B int8 out 128 rows", "*bf16", "*i8", 896, 896, 128),
    _linear_specimen("0.5B fp8 1 row", "*bf16", "*u8", 9728, 896, 1),
    _linear_specimen("7B fp8 512 rows", "*bf16", "*u8", 37888, 3584, 512),
    _linear_specimen("0.5B int8 fp32", "*fp32", "*i8", 9728, 896, 64),
    _linear_specimen("7B int8 rows of int8", "*i8", "*i8", 37888, 3584, 512),
    _linear_specimen("0.5B int8 16 rows of int8", "*i8", "*i8", 9728, 896, 16),
    _linear_specimen("7B fp8 rows of fp8 decoded", "*u8", "*u8", 37888, 3584, 512),
    _linear_specimen("7B fp8 rows of fp8", "*fp8e4nv", "*fp8e4nv", 37888, 3584, 512, since=89),
    _linear_specimen("0.5B fp8 out 32 rows of fp8", "*fp8e4nv", "*fp8e4nv", 896, 896, 32, since=89),
    _linear_specimen("0.5B fp8 out 128 rows of fp8", "*fp8e4nv", "*fp8e4nv", 896, 896, 128, since=89),
    _linear_specimen("0.5B fp8 16 rows of fp8", "*fp8e4nv", "*fp8e4nv", 9728, 896, 16, since=89),
    _quantize_specimen("7B int8", "*bf16", False),
    _quantize_specimen("7B fp8", "*bf16", True),
)
