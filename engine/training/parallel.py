"""Several processes train one model (torchrun): each takes its part of every batch, the layers are sharded by FSDP2.

The decoder's layers, which outgrow one GPU, are sharded; all else (embeddings, compressor, heads) is whole in every
process, and its gradients are summed up here. Everybody validates; only the first process writes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from speeder_engine.errors import ConfigError
from speeder_engine.training.batches import TrainingBatch


@dataclass(frozen=True)
class Processes:
    """This process, `rank` of `size`; one alone needs no torchrun, and for it everything here does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, batch: TrainingBatch) -> TrainingBatch:
        """Every `size`-th segment from `rank` on. Where there are too few segments it is the first one, left out
        of the losses: every process must run every pass."""
        mine = slice(self.rank, None, self.size) if self.has_part(batch) else slice(0, 1)
        return TrainingBatch(*(getattr(batch, field.name)[mine] for field in fields(batch)))

    def has_part(self, batch: TrainingBatch) -> bool:
        return self.rank < len(batch)

    def shard(self, backbone: nn.Module) -> None:
        """Each decoder layer over all processes, in place."""
        from torch.distributed.fsdp import fully_shard

        adapted: Any = backbone
        body = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
        for layer in body.layers:
            fully_shard(layer, reshard_after_forward=True)

    def same(self, *modules: nn.Module) -> None:
        """Every parameter and buffer as the first process has it; before `shard`."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, 0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of what isn't sharded; FSDP has averaged the others, so a loss is to be scaled by `size`."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.size

    def sums(self, values: list[Tensor]) -> list[Tensor]:
        """Each scalar, summed over the processes."""
        if self.size == 1:
            return values
        together = torch.stack([value.float() for value in values])
        dist.all_reduce(together)
        return list(together.unbind())

    def agreed(self, metrics: dict[str, float], device: torch.device) -> dict[str, float]:
        """The first process's metrics: a last bit must not make one process stop and another go on."""
        if self.size == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
        dist.broadcast(values, 0)
        return dict(zip(metrics, values.tolist(), strict=True))

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """What the first process writes to disk, the others find there."""
        if not self.is_first:
            self.wait()
        try:
            yield
        finally:
            if self.is_first:
                self.wait()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


ALONE = Processes()


def join_processes() -> Processes:
    """The group torchrun started this process in; ConfigError where it didn't."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "--fsdp: start it with `torchrun --nproc-per-node 2 -m speeder_engine.cli train ... --fsdp`, "
            "or leave --fsdp out for one process"
        )
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size())


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in every process; another as it is."""
    gathered: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return gathered


def placed_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole `value` on the device of `tensor`, and sharded as that is."""
    if isinstance(value, DTensor):
        return value
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; another as it is."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of sharded and whole gradients together, the same in every process."""
    squares = [torch.zeros((), device=gradients[0].device) for _ in range(2)]
    for gradient in gradients:
        squares[isinstance(gradient, DTensor)] += local(gradient).float().square().sum()
    dist.all_reduce(squares[1])
    return (squares[0] + squares[1]).sqrt()
