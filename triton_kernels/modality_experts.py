"""Mixture of modality experts: the features of items become one token each.

x_m = LayerNorm_m(e_m)            zero where an item lacks modality m
E_m = W2_m GELU(W1_m x_m)         with biases
a   = W_g [x_1 ; ... ; x_M] + b   -inf where a modality is missing; + log(share) for one that is being brought in
g   = softmax(a / T)              all missing: a fallback in the sum's place
z   = s * LayerNorm(sum_m g_m E_m)

The kernels' tiles don't depend on the number of items: a token is the same whatever is computed beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.triton_kernels.language import interpreted, next_power_of_2, on, runs_triton, tl, triton
from speeder_engine.triton_kernels.specimen import Specimen

MAX_MODALITIES = 4
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Affine:
    """A linear layer's matrix [O, I] and bias [O], or a norm's [N] and [N]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Mixture:
    """The weights of M experts over features of `widths`, and how they are mixed into tokens [d]."""

    norms: Sequence[Affine]  # [width]
    ups: Sequence[Affine]  # [d, width]
    downs: Sequence[Affine]  # [d, d]
    gate: Affine  # [M, sum of widths]
    norm: Affine  # [d]
    fallback: Tensor  # [d]
    temperature: float
    scale: float
    eps: float


def modality_experts(
    features: Sequence[Tensor], present: Tensor, mixture: Mixture, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """features: M of [I, width], anything where absent; present bool [I, M]; share [M] in 0..1, None is 1 for all.

    Returns tokens [I, d] and gates [I, M], zero where all modalities are missing.
    """
    if features[0].dtype in KERNEL_DTYPES and runs_triton(*features, present, share, *_tensors(mixture)):
        with on(present.device):
            return launch_modality_experts(features, present, mixture, share)
    return modality_experts_ref(features, present, mixture, share)


def _tensors(mixture: Mixture) -> list[Tensor]:
    layers = (*mixture.norms, *mixture.ups, *mixture.downs, mixture.gate, mixture.norm)
    return [mixture.fallback, *(tensor for layer in layers for tensor in (layer.weight, layer.bias))]


def modality_experts_ref(
    features: Sequence[Tensor], present: Tensor, mixture: Mixture, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    normed = [
        _layer_norm(x, norm, mixture.eps) * present[:, index : index + 1]
        for index, (x, norm) in enumerate(zip(features, mixture.norms, strict=True))
    ]
    logits = F.linear(torch.cat(normed, dim=-1), mixture.gate.weight, mixture.gate.bias) / mixture.temperature
    open_ = present
    if share is not None:
        open_ = present & (share > 0)
        logits = logits + torch.log(share.clamp_min(1e-9))
    some = open_.any(dim=-1, keepdim=True)
    # a row without any modality would be a softmax over nothing but -inf: NaN, also in its gradient
    gates = torch.softmax(logits.masked_fill(~open_ & some, float("-inf")), dim=-1) * some
    outputs = torch.stack(
        [
            F.linear(F.gelu(F.linear(x, up.weight, up.bias)), down.weight, down.bias)
            for x, up, down in zip(normed, mixture.ups, mixture.downs, strict=True)
        ],
        dim=1,
    )
    mixed = torch.where(some, (gates.unsqueeze(-1) * outputs).sum(dim=1), mixture.fallback)
    return mixture.scale * _layer_norm(mixed, mixture.norm, mixture.eps), gates


def _layer_norm(x: Tensor, norm: Affine, eps: float) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, eps)


def launch_modality_experts(
    features: Sequence[Tensor], present: Tensor, mixture: Mixture, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(features, present, mixture, share)
    num_items, modalities = present.shape
    size, dtype, device = mixture.fallback.shape[0], features[0].dtype, present.device
    tokens = torch.empty(num_items, size, dtype=dtype, device=device)
    gates = torch.empty(num_items, modalities, dtype=dtype, device=device)
    if num_items == 0:
        return tokens, gates
    shares = torch.ones(modalities, device=device) if share is None else share.float()
    logits = torch.empty(num_items, modalities, modalities, dtype=torch.float32, device=device)
    hidden = torch.empty(num_items, size, dtype=dtype, device=device)
    mixed = torch.empty(num_items, size, dtype=torch.float32, device=device)
    options = expert_options(dtype.itemsize)
    blocks = (triton.cdiv(num_items, options["BLOCK_ITEMS"]) * triton.cdiv(size, options["BLOCK_OUT"]),)
    wide, offset = interpreted(present), 0
    normed = [torch.empty_like(x) for x in features]
    for index, (x, norm) in enumerate(zip(features, mixture.norms, strict=True)):
        _norm_kernel[(num_items,)](
            x, present, norm.weight, norm.bias, mixture.gate.weight, normed[index], logits, offset, mixture.eps,
            WIDTH=x.shape[1], WIDTHS=mixture.gate.weight.shape[1], INDEX=index, MODALITIES=modalities,
            BLOCK=next_power_of_2(x.shape[1]),
        )  # fmt: skip
        offset += x.shape[1]
    router = (logits, present, shares, mixture.gate.bias)
    for index, (x, up, down) in enumerate(zip(normed, mixture.ups, mixture.downs, strict=True)):
        _up_kernel[blocks](x, up.weight, up.bias, hidden, num_items, WIDTH=x.shape[1], SIZE=size, WIDE=wide, **options)
        _down_kernel[blocks](
            hidden, down.weight, down.bias, *router, mixed, num_items, mixture.temperature,
            SIZE=size, INDEX=index, MODALITIES=modalities, WIDE=wide, **options,
        )  # fmt: skip
    _finish_kernel[(num_items,)](
        mixed, *router, mixture.fallback, mixture.norm.weight, mixture.norm.bias, tokens, gates,
        mixture.temperature, mixture.scale, mixture.eps, SIZE=size, MODALITIES=modalities, BLOCK=next_power_of_2(size),
    )  # fmt: skip
    return tokens, gates


def _check(features: Sequence[Tensor], present: Tensor, mixture: Mixture, share: Tensor | None) -> None:
    """The layout the kernels rely on."""
    (num_items, modalities), size, dtype = present.shape, mixture.fallback.shape[0], features[0].dtype
    assert modalities == len(features) <= MAX_MODALITIES and present.dtype == torch.bool and present.is_contiguous()
    assert share is None or share.shape == (modalities,)
    for x, norm, up, down in zip(features, mixture.norms, mixture.ups, mixture.downs, strict=True):
        assert x.shape == (num_items, norm.weight.shape[0]) and x.dtype == dtype and x.is_contiguous()
        assert up.weight.shape == (size, x.shape[1]) and down.weight.shape == (size, size)
    assert mixture.gate.weight.shape == (modalities, sum(x.shape[1] for x in features))
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in _tensors(mixture))


def expert_options(element_size: int) -> dict[str, int]:
    if element_size == 4:
        return {"BLOCK_ITEMS": 16, "BLOCK_OUT": 64, "BLOCK_SIZE": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_ITEMS": 64, "BLOCK_OUT": 64, "BLOCK_SIZE": 64, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["offset"])
def _norm_kernel(
    features, present, weight, bias, gate, normed, logits, offset, eps,
    WIDTH: tl.constexpr, WIDTHS: tl.constexpr, INDEX: tl.constexpr, MODALITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item's features of one modality, normed; and what they add to every logit."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = (column < WIDTH) & (tl.load(present + item * MODALITIES + INDEX) != 0)
    row = tl.load(features + item * WIDTH + column, mask=valid, other=0.0).to(tl.float32)
    row = _normed(row, weight, bias, eps, column, valid, WIDTH)
    tl.store(normed + item * WIDTH + column, row.to(normed.dtype.element_ty), mask=column < WIDTH)
    row = row.to(normed.dtype.element_ty).to(tl.float32)
    for each in tl.static_range(MODALITIES):
        router = tl.load(gate + each * WIDTHS + offset + column, mask=valid, other=0.0).to(tl.float32)
        tl.store(logits + (item * MODALITIES + INDEX) * MODALITIES + each, tl.sum(row * router, axis=0))


@triton.jit
def _normed(row, weight, bias, eps, column, valid, SIZE: tl.constexpr):
    """LayerNorm of a row [BLOCK] in fp32, zero where it is not valid."""
    centred = tl.where(valid, row - tl.sum(row, axis=0) / SIZE, 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    scale = tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
    return centred * deviation * scale + tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_items"])
def _up_kernel(
    normed, weight, bias, hidden, num_items, WIDTH: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """GELU(W1 x) of one modality."""
    items, outputs, real, made = _tile(num_items, SIZE, BLOCK_ITEMS, BLOCK_OUT)
    found = _linear(normed, weight, bias, items, outputs, real, made, WIDTH, BLOCK_SIZE, WIDE)
    found = 0.5 * found * (1 + tl.erf(found * 0.7071067811865476))
    places = hidden + items.to(tl.int64)[:, None] * SIZE + outputs[None, :]
    tl.store(places, found.to(hidden.dtype.element_ty), mask=real[:, None] & made[None, :])


@triton.jit(do_not_specialize=["num_items"])
def _down_kernel(
    hidden, weight, bias, logits, present, shares, gate_bias, mixed, num_items, temperature,
    SIZE: tl.constexpr, INDEX: tl.constexpr, MODALITIES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Adds g_m W2 h of one modality; where no item of the tile has it, its weights are not read."""
    items, outputs, real, made = _tile(num_items, SIZE, BLOCK_ITEMS, BLOCK_OUT)
    places = mixed + items.to(tl.int64)[:, None] * SIZE + outputs[None, :]
    valid = real[:, None] & made[None, :]
    gates, _ = _gates(logits, present, shares, gate_bias, temperature, items, real, MODALITIES)
    gate = tl.sum(tl.where(tl.arange(0, 4)[None, :] == INDEX, gates, 0.0), axis=1)
    total = tl.zeros([BLOCK_ITEMS, BLOCK_OUT], tl.float32)
    if tl.max(gate, axis=0) > 0:
        total = _linear(hidden, weight, bias, items, outputs, real, made, SIZE, BLOCK_SIZE, WIDE) * gate[:, None]
    if INDEX > 0:
        total += tl.load(places, mask=valid, other=0.0)
    tl.store(places, total, mask=valid)


@triton.jit
def _finish_kernel(
    mixed, logits, present, shares, gate_bias, fallback, weight, bias, tokens, gates_out, temperature, scale, eps,
    SIZE: tl.constexpr, MODALITIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item: the fallback where it has nothing, the norm, the scale; its gates beside."""
    item = tl.program_id(0).to(tl.int64)
    column, modality = tl.arange(0, BLOCK), tl.arange(0, 4)[None, :]
    items = item + tl.zeros([1], tl.int64)
    gates, some = _gates(logits, present, shares, gate_bias, temperature, items, items >= 0, MODALITIES)
    places = gates_out + items[:, None] * MODALITIES + modality
    tl.store(places, gates.to(gates_out.dtype.element_ty), mask=modality < MODALITIES)
    valid = column < SIZE
    row = tl.load(mixed + item * SIZE + column, mask=valid, other=0.0)
    other = tl.load(fallback + column, mask=valid, other=0.0).to(tl.float32)
    row = _normed(tl.where(tl.max(some, axis=0) > 0, row, other), weight, bias, eps, column, valid, SIZE)
    tl.store(tokens + item * SIZE + column, (row * scale).to(tokens.dtype.element_ty), mask=valid)


@triton.jit
def _tile(num_items, SIZE: tl.constexpr, BLOCK_ITEMS: tl.constexpr, BLOCK_OUT: tl.constexpr):
    """A program's items and outputs, and which of them exist; those of the same outputs stand side by side."""
    blocks = tl.cdiv(num_items, BLOCK_ITEMS)
    items = (tl.program_id(0) % blocks) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    outputs = (tl.program_id(0) // blocks) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    return items, outputs, items < num_items, outputs < SIZE


@triton.jit
def _linear(
    x, weight, bias, items, outputs, real, made, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """W x + b [items, outputs] in fp32."""
    DOT: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    columns = tl.arange(0, BLOCK_SIZE)
    left_at = x + items.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    right_at = weight + outputs.to(tl.int64)[None, :] * WIDTH + columns[:, None]
    total = tl.zeros([items.shape[0], outputs.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK_SIZE):
        inside = columns < WIDTH - start
        left = tl.load(left_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_at + start, mask=made[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    return total + tl.load(bias + outputs, mask=made, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gates(logits, present, shares, gate_bias, temperature, items, real, MODALITIES: tl.constexpr):
    """Gates [items, 4] in fp32, zero beyond MODALITIES; and 1 for items that have any modality, else 0."""
    modality = tl.arange(0, 4)[None, :]
    known = real[:, None] & (modality < MODALITIES)
    total = tl.zeros([items.shape[0], 4], tl.float32)
    for each in tl.static_range(MODALITIES):
        places = logits + (items.to(tl.int64)[:, None] * MODALITIES + each) * MODALITIES + modality
        total += tl.load(places, mask=known, other=0.0)
    total += tl.load(gate_bias + modality, mask=modality < MODALITIES, other=0.0).to(tl.float32)
    share = tl.load(shares + modality, mask=modality < MODALITIES, other=0.0)
    is_open = (tl.load(present + items.to(tl.int64)[:, None] * MODALITIES + modality, mask=known, other=0) != 0) & (
        share > 0
    )
    some = tl.max(is_open.to(tl.int32), axis=1)
    total = total / temperature + tl.log(tl.maximum(share, 1e-9))
    total = tl.where(is_open, total, float("-inf"))
    top = tl.where(some > 0, tl.max(total, axis=1), 0.0)
    weights = tl.exp(total - top[:, None])
    return weights / tl.where(some > 0, tl.sum(weights, axis=1), 1.0)[:, None], some


def _specimens(label: str, kind: str, element_size: int, size: int, width: int) -> tuple[Specimen, ...]:
    options: dict[str, Any] = dict(expert_options(element_size))
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    router: dict[str, Any] = {
        "logits": "*fp32",
        "present": "*i1",
        "shares": "*fp32",
        "gate_bias": kind,
        "temperature": "fp32",
    }
    layer: dict[str, Any] = {"weight": kind, "bias": kind}
    tile = {"num_items": "i32", "SIZE": size, "WIDE": False, **options}
    norm: dict[str, Any] = {
        "features": kind,
        "present": "*i1",
        **layer,
        "gate": kind,
        "normed": kind,
        "logits": "*fp32",
    }
    norm |= {"offset": "i32", "eps": "fp32", "WIDTH": width, "WIDTHS": 2 * width + 64, "INDEX": 0, "MODALITIES": 3}
    finish: dict[str, Any] = {"mixed": "*fp32", **router, "fallback": kind, **layer, "tokens": kind, "gates_out": kind}
    finish |= {"scale": "fp32", "eps": "fp32", "SIZE": size, "MODALITIES": 3, "BLOCK": next_power_of_2(size)}
    up = {"normed": kind, **layer, "hidden": kind, "WIDTH": width, **tile}
    down = {"hidden": kind, **layer, **router, "mixed": "*fp32", "INDEX": 1, "MODALITIES": 3, **tile}
    return (
        Specimen(label, _norm_kernel, {**norm, "BLOCK": next_power_of_2(width)}),
        Specimen(label, _up_kernel, up, **launch),
        Specimen(label, _down_kernel, down, **launch),
        Specimen(label, _finish_kernel, finish),
    )


SPECIMENS = (
    *_specimens("experts 0.5B fp32", "*fp32", 4, 896, 384),
    *_specimens("experts 7B bf16", "*bf16", 2, 3584, 1024),
)
