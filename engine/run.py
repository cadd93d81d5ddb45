"""Run: the objects of one training run, and build(), the one place that makes them."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import optim
from base.errors import UserError
from configurator import Config
from corpus import shards
from engine import checkpoint, machine, parallel, restore
from engine.outliers import Outliers
from model import GPT


@dataclass(kw_only=True)
class Run:
    """What build() makes."""

    cfg: Config  # resolved: nothing in it is "auto"
    chosen: list[str]  # what was chosen for each "auto", and why
    world: parallel.World
    device: torch.device
    dataset: shards.Dataset | None  # None if `batches` were given
    batches: data.TrainBatches
    model: GPT  # the weights
    compiled: nn.Module  # the same weights, compiled if asked
    train_model: nn.Module  # the same, replicated if there are several processes: what a training step calls
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    outliers: Outliers
    micro_batch: int  # sequences per forward pass of this process
    accumulation: int  # forward passes per step of this process
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reader"))
    pending: dict[tuple[int, int], Future] = field(default_factory=dict)  # (step, micro) -> a batch being read

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which forward passes run."""
        return machine.autocast(self.device, self.cfg.dtype)

    def read(self, step: int, micro: int, pin: bool = False) -> list[Tensor]:
        """Inputs and targets of one micro-batch of this process, (B, T) int64 each, on its device."""
        batch = self.batches.batch(step, micro, self.micro_batch, self.accumulation, self.world.rank, self.world.size)
        if pin and self.device.type == "cuda":  # from pinned memory a copy does not hold up the host
            return [t.pin_memory().to(self.device, non_blocking=True) for t in batch]
        return [t.to(self.device) for t in batch]

    def next_batch(self, step: int, micro: int) -> list[Tensor]:
        """The same, read ahead if asked: a batch is a function of (step, micro), so what was read ahead cannot be wrong."""
        ahead = self.pending.pop((step, micro), None)
        batch = ahead.result() if ahead else self.read(step, micro)
        if self.cfg.prefetch:
            following = (step, micro + 1) if micro + 1 < self.accumulation else (step + 1, 0)
            self.pending = {following: self.reader.submit(self.read, *following, pin=True)}
        return batch

    def halve_micro_batch(self, why: str, random_before: Tensor) -> None:
        """Cut the step into micro-batches half as large, or less: it learns from the same tokens. Undoes the half-done step;
        random_before: the random states that it started from."""
        before = self.micro_batch
        self.model.zero_grad(set_to_none=True)
        self.pending = {}
        checkpoint.set_rng_states(random_before, self.device)
        self.micro_batch, self.accumulation = self.cfg.split_step(self.world.size, most=self.micro_batch // 2)
        torch.compiler.reset()  # else the second size it sees makes it compile for all sizes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.world.is_main:
            print(
                f"out of memory with micro-batches of {before} sequences ({why.partition(chr(10))[0][:100]}): repeating the "
                f"step as {self.accumulation} x {self.micro_batch}; use --batch_size={self.micro_batch} to start with that"
            )

    def close(self) -> None:
        """Release the threads and the process group."""
        self.reader.shutdown(cancel_futures=True)
        self.pending = {}
        self.train_model = self.compiled  # what replicates the model must not outlive the process group
        parallel.stop()


def compile_model(model: GPT, cfg: Config) -> nn.Module:
    """The model under torch.compile. With scope "block" its blocks share one graph and the head has another."""
    # else an equal model would find an earlier run's code in this process, and effective() that run's counts
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    if not cfg.compile:
        return model
    # On a CPU, tanh as 2 sigmoid(2x) - 1: half the time of the library's vectorised tanh, and GELU adds 1 to it, so that what
    # cancels near 0 does not matter. 40 of 1,180 ms at B=4, T=256 (LOG.md).
    options = {"cpp.use_decompose_tanh": True} if model.lm_head.weight.device.type == "cpu" else {}
    if cfg.compile_mode != "default":
        options |= torch._inductor.list_mode_options(cfg.compile_mode)
    if cfg.compile_scope == "model":
        return torch.compile(model, options=options)
    for block in model.transformer.h:
        block.compile(options=options)
    model.head = torch.compile(model.head, options=options)
    return model


def open_data(cfg: Config) -> tuple[shards.Dataset, data.TrainBatches]:
    """The data set of a run, and its training batches. UserError if it does not fit the model."""
    dataset = shards.open_dataset(Path(cfg.data_dir) / cfg.dataset)
    if dataset.tokenizer.vocab_size != cfg.vocab_size:
        raise UserError(
            f"{dataset.folder} has a vocabulary of {dataset.tokenizer.vocab_size}, the model of {cfg.vocab_size}: "
            f"use --vocab_size={dataset.tokenizer.vocab_size}"
        )
    data.sequence_count(dataset.split("val"), cfg.T, "the validation split")
    return dataset, data.TrainBatches(dataset.split("train"), cfg.T, cfg.seed, cfg.batch_order)


@torch.no_grad()
def start_from(model: GPT, where: str) -> None:
    """Copy the weights of another model. It may have more positions (the first are taken) and other padding."""
    cfg, (other, _) = model.cfg, restore.load_model(where)
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "tie_weights"):
        if (value := getattr(other.cfg, name)) != getattr(cfg, name):
            raise UserError(f"init_from={where} has {name}={value}, this model {getattr(cfg, name)}: use --{name}={value}")
    if (known := other.cfg.block_size) < cfg.block_size:
        raise UserError(f"init_from={where} has {known} positions, block_size is {cfg.block_size}: use --block_size={known}")
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name not in theirs:
            raise UserError(f"init_from={where} has no {name}: use --bias=False")
        rows = min(len(p), len(theirs[name]))
        p[:rows] = theirs[name][:rows].to(p)


def build(cfg: Config, batches: data.TrainBatches | None = None) -> Run:
    """The objects of a run. The same seed gives the same weights on every device. UserError if this machine cannot do what was
    asked, or the data does not fit.

    batches: what to learn from in place of a data set (a crash capsule's).
    """
    machine.set_deterministic(cfg.deterministic)
    device = machine.pick_device(cfg.device)
    cfg, chosen = machine.resolve(cfg, device)
    dataset, batches = (None, batches) if batches else open_data(cfg)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.processes not in (0, started):
        raise UserError(f"processes={cfg.processes}, but {started} started: use torchrun --nproc_per_node={cfg.processes} …")
    micro_batch, accumulation = cfg.split_step(started)
    if cfg.batch_size == "auto":
        chosen.append(f"batch_size = {micro_batch}, the whole share of a process; halved until it fits")
    elif micro_batch != cfg.batch_size:
        chosen.append(
            f"micro-batches of {micro_batch} (batch_size={cfg.batch_size} does not divide a process's share of a step)"
        )
    machine.set_up(cfg, device)

    world = parallel.start(device, cfg.timeout_minutes)
    facts = {"code": parallel.code_sha256(), "torch": torch.__version__, "data": dataset.sha256 if dataset else None}
    parallel.check_same_on_all_ranks(world, facts | asdict(cfg))
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(device)
    if cfg.init_from and cfg.resume is not True:
        start_from(model, cfg.init_from)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between processes, weights do not
    compiled = compile_model(model, cfg)
    parallel.shard(model, cfg.parallel, world, device)
    train_model = parallel.replicate(compiled, cfg.parallel, world, device)
    run = Run(
        cfg=cfg,
        chosen=chosen,
        world=world,
        device=device,
        dataset=dataset,
        batches=batches,
        model=model,
        compiled=compiled,
        train_model=train_model,
        optimizer=optim.adamw(cfg, model),
        scaler=torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16"),
        outliers=Outliers(cfg),
        micro_batch=micro_batch,
        accumulation=accumulation,
    )
    run.reader.submit(int)  # its thread starts while there is memory for it
    return run
