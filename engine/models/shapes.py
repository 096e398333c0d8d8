"""ShapesOnly: modules are made on no device and without values, for weights that are loaded into them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

INITIALISED = "torch.nn.init"
FILLED = {torch.randn: 0, torch.zeros: 0, torch.ones: 0, torch.full: 1}  # by how many values follow the shape
SCALED = (Tensor.mul, Tensor.__mul__, torch.mul)


class ShapesOnly(TorchFunctionMode):
    """Weights made under it are of their shape and type on the meta device, as under `torch.device("meta")`. There,
    too, every value would be drawn, filled and scaled, in torch's own decompositions: a second for its compiler's
    imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in FILLED:
            return torch.empty(*args[: len(args) - FILLED[func]], dtype=given.get("dtype"), device="meta")
        if getattr(func, "__module__", None) == INITIALISED:
            return args[0] if args else given["tensor"]
        if func in SCALED and args[0].is_meta:
            return args[0]
        if func is torch.empty:
            given = {**given, "device": "meta"}
        return func(*args, **given)
