"""Everything that knows of more than one process: set-up, wrapping, reductions.

`torchrun --nproc_per_node=N train.py …` starts N processes and tells each its place in environment variables. Without
torchrun there is one process, no process group, and every function here is the identity.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import machine


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0


def start(device: torch.device) -> World:
    """Join the processes torchrun started; nccl between GPUs, gloo between CPUs, whose cores they share out."""
    world = World(*(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    if world.size > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timedelta(minutes=10), device_id=device)
    elif world.size > 1:
        # torchrun gives each process one thread, however many cores there are
        torch.set_num_threads(max(1, machine.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    return world


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes are in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Replicate a (compiled) model: gradients are averaged over the processes while backward runs."""
    if world.size == 1:
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, on: bool):
    """A context in which backward exchanges gradients, or (on=False, all but the last micro-step) only adds them up."""
    return contextlib.nullcontext() if on or not isinstance(model, DDP) else model.no_sync()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place, the same in each."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in some process; every process gets the same answer."""
    return sum_over_ranks(torch.tensor(float(flag), device=device)).item() > 0 if dist.is_initialized() else flag


def gather(value: Tensor) -> list[Tensor]:
    """A tensor of equal shape from every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return parts


def wait_for_all() -> None:
    """Return once every process has come here."""
    if dist.is_initialized():
        dist.barrier()
