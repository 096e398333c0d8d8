"""The weights that training moves, by name: copied, put back, averaged, packed for a resume."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from speeder_engine.training.parallel import local, norm_of, placed_like, whole


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
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())

    def copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():  # one at a time: a GPU holds no second copy of all
            parameter.copy_(placed_like(values[name], parameter))

    def placed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of all of them where they are, and sharded as they are."""
        return {name: placed_like(values[name], parameter) for name, parameter in self.parameters.items()}

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
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.sharded:
            return norm_of(gradients)
        norm: Tensor = nn.utils.get_total_norm(gradients)
        return norm

    def clip_gradients(self, longest: float, norm: Tensor) -> None:
        """Scales the gradients, whose norm is `norm`, so that it is at most `longest`."""
        if not self.sharded:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), longest, norm)
            return
        factor = torch.clamp(longest / (norm + 1e-6), max=1.0)
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)

    @torch.no_grad()
    def gather_into(self, modules: Mapping[str, nn.Module]) -> None:
        """Copies the weights, whole, into modules of the same names that are not sharded."""
        targets = {n: p for prefix, module in modules.items() for n, p in module.named_parameters(prefix)}
        for name, parameter in self.parameters.items():
            gathered = whole(parameter)
            if name in targets:
                targets[name].copy_(gathered)

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
    packed |= {f"optimizer.{index}.{name}": v for index, each in moments.items() for name, v in each.items()}
    return {name: whole(value) for name, value in packed.items()}


def unpack(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """A group of what `pack` made, empty where there is none."""
    prefix = f"{group}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """An optimizer's state, as `pack` flattened it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nested: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, key = name.split(".", 1)
        placed = placed_like(value, parameters[int(index)]) if value.ndim else value
        nested.setdefault(int(index), {})[key] = placed
    optimizer.load_state_dict(optimizer.state_dict() | {"state": nested})
