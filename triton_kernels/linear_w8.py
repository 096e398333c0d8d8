"""Linear layers of 8-bit weights, with a scale for every output channel.

weight-only     out_no = s_o sum_i x_ni w_oi + b_o                w int8 or fp8 (e4m3), x as it comes
W8A8            out_no = t_n s_o sum_i q_ni w_oi + b_o            x_ni = t_n q_ni, of the weights' kind
gated           silu(out_no) * out_n(o + O/2)                     for o < O/2: [gate | up] in one matrix

Every row has a scale t_n of its own: with one for all, a neighbour would change a row's result. Sums are kept in int32
or fp32; fp8 is read bit by bit where a GPU has no instruction for it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import interpreted, on, runs_triton, tl, triton
from speeder_engine.triton_kernels.quantize_rows import W8Weight
from speeder_engine.triton_kernels.specimen import Specimen

NATIVE_FP8 = (8, 9)  # the first compute capability that multiplies it
MULTIPROCESSORS = 132  # of an H100


def linear_w8(x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    """x [N, I] -> [N, O], or [N, O / 2] where `gated`."""
    if runs_triton(x, weight.values, weight.scales, bias):
        with on(x.device):
            return launch_linear_w8(x, weight, bias, gated)
    return linear_w8_ref(x, weight, bias, gated)


def linear_w8_rows(
    rows: W8Weight, weight: W8Weight, dtype: torch.dtype, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """The same of rows in the weight's kind, as `quantize_rows` gives them -> `dtype`."""
    if runs_triton(rows.values, weight.values, weight.scales, bias):
        with on(rows.values.device):
            return launch_linear_w8_rows(rows, weight, dtype, bias, gated)
    return linear_w8_rows_ref(rows, weight, dtype, bias, gated)


def linear_w8_ref(x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    return _behind(x.float() @ weight.values.float().T, weight, x.dtype, bias, gated)


def linear_w8_rows_ref(
    rows: W8Weight, weight: W8Weight, dtype: torch.dtype, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    """Computed in fp64: products of 8-bit numbers are integers or nearly so, and must be exact."""
    products = (rows.values.double() @ weight.values.double().T).float() * rows.scales.unsqueeze(1)
    return _behind(products, weight, dtype, bias, gated)


def _behind(products: Tensor, weight: W8Weight, dtype: torch.dtype, bias: Tensor | None, gated: bool) -> Tensor:
    """Scales, bias and gate."""
    out = products * weight.scales
    if bias is not None:
        out = out + bias.float()
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out.to(dtype)


def launch_linear_w8(x: Tensor, weight: W8Weight, bias: Tensor | None = None, gated: bool = False) -> Tensor:
    return _launch(x, None, weight, x.dtype, bias, gated)


def launch_linear_w8_rows(
    rows: W8Weight, weight: W8Weight, dtype: torch.dtype, bias: Tensor | None = None, gated: bool = False
) -> Tensor:
    assert rows.kind == weight.kind
    return _launch(rows.values, rows.scales, weight, dtype, bias, gated)


def _launch(
    left: Tensor, row_scales: Tensor | None, weight: W8Weight, dtype: torch.dtype, bias: Tensor | None, gated: bool
) -> Tensor:
    """left [N, I]: as it comes, or of the weight's kind with a scale a row."""
    (num_rows, size), num_outputs = left.shape, weight.values.shape[0]
    assert left.is_contiguous() and weight.values.is_contiguous() and weight.values.shape[1] == size
    assert weight.scales.dtype == torch.float32 and weight.scales.shape == (num_outputs,)
    assert bias is None or (bias.is_contiguous() and bias.shape == (num_outputs,))
    assert not gated or num_outputs % 2 == 0
    width = num_outputs // 2 if gated else num_outputs
    out = torch.empty(num_rows, width, dtype=dtype, device=left.device)
    if out.numel() == 0:
        return out
    fp8, has_rows, right = weight.kind == "fp8", row_scales is not None, weight.values
    native = fp8 and multiplies_fp8(left.device)
    if fp8 and not native:
        left, right = left.view(torch.uint8) if has_rows else left, right.view(torch.uint8)
    options = linear_options(num_rows, width, dtype.itemsize)
    blocks = triton.cdiv(num_rows, options["BLOCK_ROWS"]) * triton.cdiv(width, options["BLOCK_OUT"])
    _linear_w8_kernel[(blocks,)](
        left, row_scales, right, weight.scales, bias, out, num_rows, width, SIZE=size, FP8=fp8, NATIVE=native,
        ROWS=has_rows, BIAS=bias is not None, GATED=gated, WIDE=interpreted(left), **options,
    )  # fmt: skip
    return out


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has matrix units for fp8, and instructions that turn it into other types."""
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
        elif NATIVE and ROWS:
            # 32 columns are one instruction of Hopper's: sums leave its short accumulator after each. With 0 Triton
            # takes older instructions, which multiply fp16
            total = tl.dot(left, right, total, max_num_imprecise_acc=32)
        else:
            DOT: tl.constexpr = tl.float32 if WIDE else tl.float16 if ROWS else x.dtype.element_ty
            left = decoded(left) if ROWS else left
            right = decoded(right) if DECODED else right
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


SPECIMENS = (
    _linear_specimen("7B int8 1 row", "*bf16", "*i8", 37888, 3584, 1),
    _linear_specimen("7B int8 64 rows", "*bf16", "*i8", 3584, 18944, 64),
    _linear_specimen("7B int8 512 rows", "*bf16", "*i8", 37888, 3584, 512),
    _linear_specimen("7B int8 32 rows", "*bf16", "*i8", 37888, 3584, 32),
    _linear_specimen("7B int8 out 16 rows", "*bf16", "*i8", 3584, 3584, 16),
    _linear_specimen("0.5B int8 out 32 rows", "*bf16", "*i8", 896, 896, 32),
    _linear_specimen("0.5B int8 out 128 rows", "*bf16", "*i8", 896, 896, 128),
    _linear_specimen("0.5B fp8 decoded 1 row", "*bf16", "*u8", 9728, 896, 1),
    _linear_specimen("7B fp8 decoded 512 rows", "*bf16", "*u8", 37888, 3584, 512),
    _linear_specimen("7B fp8 1 row", "*bf16", "*fp8e4nv", 37888, 3584, 1, since=89),
    _linear_specimen("7B fp8 512 rows", "*bf16", "*fp8e4nv", 37888, 3584, 512, since=89),
    _linear_specimen("0.5B int8 fp32", "*fp32", "*i8", 9728, 896, 64),
    _linear_specimen("7B int8 rows of int8", "*i8", "*i8", 37888, 3584, 512),
    _linear_specimen("0.5B int8 16 rows of int8", "*i8", "*i8", 9728, 896, 16),
    _linear_specimen("7B fp8 rows of fp8 decoded", "*u8", "*u8", 37888, 3584, 512),
    _linear_specimen("7B fp8 rows of fp8", "*fp8e4nv", "*fp8e4nv", 37888, 3584, 512, since=89),
    _linear_specimen("0.5B fp8 out 32 rows of fp8", "*fp8e4nv", "*fp8e4nv", 896, 896, 32, since=89),
    _linear_specimen("0.5B fp8 out 128 rows of fp8", "*fp8e4nv", "*fp8e4nv", 896, 896, 128, since=89),
    _linear_specimen("0.5B fp8 16 rows of fp8", "*fp8e4nv", "*fp8e4nv", 9728, 896, 16, since=89),
)
