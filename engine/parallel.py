"""Several processes: how they meet, check that they agree, share out a model, and exchange numbers.

`torchrun --nproc_per_node=N train.py …` starts N processes and gives each its place in environment variables. Without
torchrun there is one process, no process group, and every function here is the identity.

The setting `parallel` decides what the processes share out besides the tokens:

    ddp    nothing: every process has everything; gradients are averaged while backward runs
    zero1  AdamW's moments: each process keeps, and updates, only its share of the parameters
    fsdp   every parameter, gradient and moment; those of a block are gathered while it computes

engine/run.py wraps in this order: compile, shard, replicate, then the optimizer over the result.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import optim
from base import system
from base.errors import UserError
from base.files import ROOT
from model import GPT

MEETING_SECONDS = 15  # to reach the store that rank 0, or torchrun, opens: all start together, so later is never
REMEDY = "start all with one torchrun per machine and the same --rdzv-endpoint, on a free port"


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = field(default=None, repr=False)  # key-value store shared by all; None in a lone process

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0


def attempt() -> int:
    """How often torchrun (--max-restarts) has restarted this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """End the process with one line if the block takes longer: torch's own client would try for minutes more, and print its
    stack each time.
    """

    def give_up() -> None:
        print(f"[rank {os.environ.get('RANK', '0')}] error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def start(device: torch.device, timeout_minutes: float = 10.0) -> World:
    """Join the process group that torchrun started: nccl between GPUs, gloo between CPUs, whose cores are divided.

    UserError if the processes do not find each other. A collective fails a minute after timeout_minutes: by then the watchdog
    has reported which process is stuck.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # torchrun gives each process one thread, however many cores there are
        torch.set_num_threads(max(1, system.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", size))))
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        wait = timedelta(minutes=timeout_minutes)
        with deadline(MEETING_SECONDS, f"process {rank} of {size} could not reach the rendezvous at {host}:{port}: {REMEDY}"):
            store = dist.TCPStore(host, int(port), size, hosting, timeout=wait, wait_for_workers=False)
        store = dist.PrefixStore(f"attempt_{attempt()}", store)
        patience = timedelta(minutes=timeout_minutes + 1)
        store.set_timeout(patience)
        backend, where = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=where)
    except (ValueError, RuntimeError) as e:  # dist.DistError is a RuntimeError
        reason = str(e).strip().partition("\n")[0]
        address = f"{host or '(no MASTER_ADDR)'}:{port or '(no MASTER_PORT)'}"
        raise UserError(f"process {rank} of {size} could not join the others at {address} ({reason}): {REMEDY}") from None
    return World(rank, size, store)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes are in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process has ended; gloo and nccl have many words for it."""
    return size() > 1 and bool(re.search(r"by peer|gloo|NCCL|ProcessGroup|Broken pipe|[Ss]ocket", str(error)))


def check_same_on_all_ranks(world: World, facts: dict) -> None:
    """UserError, the same in every process, unless the facts (one level of names, JSON values) are equal on all ranks.

    Processes that were started with different settings, code or data would hang, or train a mixture.
    """
    if world.store is None:
        return
    world.store.set(f"facts/{world.rank}", json.dumps(facts))
    if world.is_main:
        different = []
        for rank in range(1, world.size):
            theirs = json.loads(world.store.get(f"facts/{rank}"))
            for n in sorted(n for n in facts.keys() | theirs.keys() if facts.get(n) != theirs.get(n)):
                different.append(f"{n} is {facts.get(n)!r} in process 0 and {theirs.get(n)!r} in process {rank}")
        world.store.set("facts/verdict", "; ".join(different[:3]))
    if verdict := world.store.get("facts/verdict").decode():
        world.store.set(f"facts/read/{world.rank}", "")
        if world.is_main:  # it may keep the store: the others must have read before it ends
            with contextlib.suppress(RuntimeError):
                world.store.wait([f"facts/read/{rank}" for rank in range(world.size)], timedelta(seconds=10))
        raise UserError(f"ranks disagree: {verdict}; start all with the same command, code and data")


def code_sha256() -> str:
    """Of all Python and C files of the scripts and the rooms. Config files do not count, settings are compared by value."""
    rooms = [p.parent for p in ROOT.glob("*/__init__.py") if p.parent.name not in ("tests", "config")]
    found = [*ROOT.glob("*.py"), *(p for room in rooms for p in room.rglob("*"))]
    files = sorted(p for p in found if p.suffix in (".py", ".c"))
    content = (str(p.relative_to(ROOT)).encode() + b"\0" + hashlib.sha256(p.read_bytes()).digest() for p in files)
    return hashlib.sha256(b"".join(content)).hexdigest()[:16]


# ---- sharding and replicating ------------------------------------------------------------------------------------------


def shard(model: GPT, how: str, world: World, device: torch.device) -> None:
    """Under fsdp, leave each process its share of every parameter, in place. Block by block, so that no more than one
    block (and the embeddings) is ever whole."""
    if how == "fsdp" and world.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # half a second, for those who shard

        mesh = init_device_mesh(device.type, (world.size,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)  # or a look at the weights between steps finds them whole


def replicate(model: nn.Module, how: str, world: World, device: torch.device) -> nn.Module:
    """Replicate a (compiled) model, unless it is sharded: gradients are averaged over the processes while backward runs."""
    if world.size == 1 or how == "fsdp":
        return model
    return DDP(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def state_mib(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> list[float]:
    """MiB of parameters, gradients and moments that each process holds, in rank order."""
    moments = [t for state in optim.inner_optimizer(optimizer).state.values() for t in state.values()]
    held = [*model.parameters(), *model.parameters(), *moments]  # twice: a gradient is as large as its parameter
    size = sum(optim.local_shard(t).numel() * t.element_size() for t in held)
    return [round(part.item(), 2) for part in gather(torch.tensor(size / 2**20, device=device))]


def shares_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether each process has only its share of the state, so that all must write it."""
    return optim.is_sharded(model) or optim.shards_state(optimizer)


def parallel_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The setting `parallel`, read back from the objects; "none" if several processes share nothing, not even gradients."""
    if optim.is_sharded(model):
        return "fsdp"
    if size() > 1 and not isinstance(model, DDP):
        return "none"
    return "zero1" if optim.shards_state(optimizer) else "ddp"


def gradient_sync(model: nn.Module, on: bool):
    """A context in which backward exchanges gradients, or (on=False, all but the last micro-step) only adds them up.

    A sharded model exchanges every time: whole gradients would take the memory that sharding saves.
    """
    return contextlib.nullcontext() if on or not isinstance(model, DDP) else model.no_sync()


# ---- reductions -------------------------------------------------------------------------------------------------------


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place, the same in each."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set in any process (of a group); every process gets the same answer."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, group=group)
    return flags.item() > 0


def gather(value: Tensor) -> list[Tensor]:
    """A tensor of equal shape from every process, in rank order."""
    if not dist.is_initialized():
        return [value]
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return parts


def barrier() -> None:
    """Return once every process has called this."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def different_replicas(model: nn.Module) -> list[str]:
    """["transformer.wte.weight in process 1", …]: parameters whose bits are not those of process 0. Compares 8 bytes each.

    The checksum is the sum of the bits as integers: any single change shows. Sharded models have no replicas.
    """
    if not dist.is_initialized() or optim.is_sharded(model):
        return []
    names = [n for n, _ in model.named_parameters()]
    sums = torch.stack([p.contiguous().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()])
    parts = gather(sums)
    return [f"{names[i]} in process {r}" for r, s in enumerate(parts) for i in (s != parts[0]).nonzero().flatten().tolist()]
