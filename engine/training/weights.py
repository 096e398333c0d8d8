"""The weights that training moves, by name: copied, put back, averaged, packed for a resume."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Weights:
    """All parameters of some modules that learn; one that several share counts once."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters(prefix):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.parameters[name] = parameter

    def copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def replaced_by(self, values: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Other values for a while; None leaves them as they are."""
        if values is None:
            yield
            return
        kept = self.copy()
        self.load(values)
        try:
            yield
        finally:
            self.load(kept)

    @torch.no_grad()
    def average_into(self, averaged: Mapping[str, Tensor], decay: float) -> None:
        """averaged = decay averaged + (1 - decay) weights, in place."""
        for name, parameter in self.parameters.items():
            averaged[name].lerp_(parameter, 1 - decay)

    def name_not_finite(self) -> str | None:
        """The first parameter that holds NaN or infinity, or whose gradient does."""
        for name, parameter in self.parameters.items():
            for what, tensor in ((name, parameter), (f"the gradient of {name}", parameter.grad)):
                if tensor is not None and not torch.isfinite(tensor).all():
                    return what
        return None


def pack(parts: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Named groups of tensors and an optimizer's moments under flat names."""
    packed = {f"{group}.{name}": value for group, values in parts.items() for name, value in values.items()}
    moments = optimizer.state_dict()["state"]
    return packed | {f"optimizer.{index}.{name}": v for index, each in moments.items() for name, v in each.items()}


def unpack(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """A group of what `pack` made, empty where there is none."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """An optimizer's state, as `pack` flattened it."""
    nested: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        nested.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": nested})
