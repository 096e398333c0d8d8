"""A step's own matrix products and nothing else, each in the best form that the library has: what a step is held to."""

from dataclasses import dataclass
from typing import cast

import torch
from limits import Work
from measure import Timed
from torch import Tensor
from torch.nn import functional as F

from speeder_engine.models.decoder import Decoder, DecoderLayer

MOST_BYTES = 1 << 30  # of weights that are held: far more than any cache, so that every product reads from memory


@dataclass(frozen=True)
class Product:
    """x [rows, in] times weight [out, in]."""

    weight: Tensor
    rows: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.weight.numel()


def step_products(decoder: Decoder, rows: int, reads: int) -> list[Product]:
    """The products of a pass over `rows`, of which the last layer computes only `reads` (their keys and values aside).

    A body of more than MOST_BYTES is stood in for by its first layers, again and again.
    """
    layers = cast(list[DecoderLayer], [*decoder.layers])
    layer_bytes = sum(parameter.numel() * parameter.element_size() for parameter in layers[0].parameters())
    held = layers[: max(1, min(len(layers), MOST_BYTES // layer_bytes))]
    found: list[Product] = []
    for index in range(len(layers) - 1):
        layer = held[index % len(held)]
        found += [Product(part.weight, rows) for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    last = held[(len(layers) - 1) % len(held)]
    q, kv = last.qkv.weight[: last.q_size], last.qkv.weight[last.q_size :]
    found += [Product(q, reads), Product(kv, rows)]
    return found + [Product(part.weight, reads) for part in (last.out, last.gate_up, last.down)]


def work_of(products: list[Product]) -> Work:
    num_bytes = sum(product.weight.numel() * product.weight.element_size() for product in products)
    return Work(float(num_bytes), sum(product.flops for product in products))


def forms(products: list[Product]) -> dict[str, Timed]:
    """All products one after the other, in each form there is: "gemm_plain" and, where oneDNN packs this dtype on this
    CPU, "gemm_packed"."""
    inputs = {
        (product.rows, product.weight.shape[1]): torch.randn(product.rows, product.weight.shape[1]).to(product.weight)
        for product in products
    }
    pairs = [(inputs[product.rows, product.weight.shape[1]], product.weight.detach()) for product in products]
    found = {"gemm_plain": Timed(lambda _: _plain(pairs))}
    if products[0].weight.device.type == "cpu" and packs(products[0].weight.dtype):
        made: dict[tuple[int, int, int], Tensor] = {}
        for product in products:
            key = (product.weight.data_ptr(), product.weight.shape[0], product.rows)
            if key not in made:
                made[key] = torch.ops.mkldnn._reorder_linear_weight(product.weight.detach().contiguous(), product.rows)
        packed = [
            (x, made[product.weight.data_ptr(), product.weight.shape[0], product.rows])
            for (x, _), product in zip(pairs, products, strict=True)
        ]
        found["gemm_packed"] = Timed(lambda _: _packed(packed))
    return found


def packs(dtype: torch.dtype) -> bool:
    """Whether this CPU has a packed product: bf16's needs AVX-512."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.zeros(8, 32, dtype=dtype)
    try:
        _packed([(x, torch.ops.mkldnn._reorder_linear_weight(torch.zeros(32, 32, dtype=dtype), len(x)))])
    except RuntimeError:
        return False
    return True


@torch.inference_mode()
def _plain(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, weight in pairs:
        F.linear(x, weight)


@torch.inference_mode()
def _packed(pairs: list[tuple[Tensor, Tensor]]) -> None:
    product = torch.ops.mkldnn._linear_pointwise
    for x, weight in pairs:
        product(x, weight, None, "none", [], "")
