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

    def gradient_norm(self) -> Tensor:
        """Of all gradients as one vector; a scalar."""
        norm: Tensor = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        return norm

    def clip_gradients(self, longest: float, norm: Tensor) -> None:
        """Scales the gradients, whose norm is `norm`, so that it is at most `longest`."""
        nn.utils.clip_grads_with_norm_(self.parameters.values(), longest, norm)

    def parameter_not_finite(self) -> str | None:
        """The first parameter that holds NaN or infinity."""
        return _first_not_finite(self.parameters)

    def gradient_not_finite(self) -> str | None:
        """The first gradient that does, by its parameter's name."""
        gradients = {f"the gradient of {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
        return _first_not_finite(gradients)


def _first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)


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
