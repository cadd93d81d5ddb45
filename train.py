"""Train a GPT.

    python train.py config/shakespeare.py                 one process
    torchrun --nproc_per_node=8 train.py CONFIG           one process per device
    python train.py config/shakespeare.py --max_steps=50 --compile=False
    python train.py config/shakespeare.py --resume        go on from the newest checkpoint
    python train.py config/gpt2_124m.py --plan            what it will take: memory, time, disk; touches no device
    python train.py config/shakespeare.py --prove_resume  kill a short run while it saves, resume it, compare every bit
    python train.py config/shakespeare.py --record_curve  train it three times: the loss curve that later runs compare with
    python train.py --replay out/<run>/crash_<step> --dtype=float32      run the step of a crash capsule again

Any setting of configurator.py can be typed as --name=value. Ctrl-C (or SIGTERM) ends the step, saves, and leaves.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

import checkpoint
import configurator
import curve
import data
import evaluate as evaluation
import guards
import machine
import optim
import parallel
import sample
from configurator import Config
from effective import effective, mismatches
from model import GPT, UserError

SAMPLE_TOKENS = 100  # of a text written while training


@dataclass
class Run:
    """What build() makes: the objects of one training run."""

    cfg: Config  # resolved: nothing in it is "auto"
    world: parallel.World
    device: torch.device
    dataset: data.Dataset
    batches: data.TrainBatches
    model: GPT  # the weights
    compiled: nn.Module  # the same weights, compiled if asked
    net: nn.Module  # the same, replicated if there are several processes: what a training step calls
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch: int  # sequences per forward pass of this process
    accumulation: int  # forward passes per step of this process
    outliers: guards.Outliers
    random_before: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))  # the random state before the step
    found: str | None = None  # what stood out in the last step
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reader"))
    pending: dict[tuple[int, int], Future] = field(default_factory=dict)  # (step, micro) -> a batch being read

    def autocast(self):
        """The context in which forward passes run."""
        if self.cfg.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=machine.DTYPES[self.cfg.dtype])

    def read(self, step: int, micro: int, pin: bool = False) -> list[Tensor]:
        """Inputs and targets of one micro-batch of this process, on its device."""
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

    def halve(self, why: str) -> None:
        """Cut the step into micro-batches half as large, or less: it learns from the same tokens. Undoes its half-done work."""
        before = self.micro_batch
        self.model.zero_grad(set_to_none=True)
        self.pending = {}
        checkpoint.set_rng_states(self.random_before, self.device)
        self.micro_batch, self.accumulation = self.cfg.split_step(self.world.size, most=self.micro_batch // 2)
        torch.compiler.reset()  # else the second size it sees makes it compile for all sizes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.world.first:
            print(
                f"out of memory with micro-batches of {before} sequences ({why.partition(chr(10))[0][:100]}): the same step "
                f"again as {self.accumulation} x {self.micro_batch}; type --batch_size={self.micro_batch} to begin so"
            )

    def close(self) -> None:
        """Let go of the threads and processes behind a run."""
        self.reader.shutdown(cancel_futures=True)
        self.pending = {}
        self.net = self.compiled  # what replicates the model must not outlive the process group
        parallel.stop()


# ---- building ---------------------------------------------------------------------------------------------------------


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


def open_data(cfg: Config) -> tuple[data.Dataset, data.TrainBatches]:
    """The data set of a run, and its training batches. UserError if it does not fit the model."""
    dataset = data.open_dataset(Path(cfg.data_dir) / cfg.dataset)
    if dataset.tokenizer.vocab_size != cfg.vocab_size:
        raise UserError(
            f"{dataset.folder} has a vocabulary of {dataset.tokenizer.vocab_size}, the model of {cfg.vocab_size}: "
            f"type --vocab_size={dataset.tokenizer.vocab_size}"
        )
    data.sequence_count(dataset.split("val"), cfg.T, "the validation split")
    return dataset, data.TrainBatches(dataset.split("train"), cfg.T, cfg.seed, cfg.batch_order)


@torch.no_grad()
def start_from(model: GPT, where: str) -> None:
    """Copy the weights of another model. It may know more positions (the first are taken) and have other padding."""
    cfg, (other, _) = model.cfg, checkpoint.load_model(where)
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "tie_weights"):
        if getattr(cfg, name) != getattr(other.cfg, name):
            value = getattr(other.cfg, name)
            raise UserError(f"init_from={where} has {name}={value}, this model {getattr(cfg, name)}: type --{name}={value}")
    if other.cfg.block_size < cfg.block_size:
        known = other.cfg.block_size
        raise UserError(f"init_from={where} knows {known} positions, block_size is {cfg.block_size}: type --block_size={known}")
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name not in theirs:
            raise UserError(f"init_from={where} has no {name}: type --bias=False")
        rows = {"transformer.wpe.weight": cfg.block_size}.get(name, min(len(p), len(theirs[name])))
        p[:rows] = theirs[name][:rows].to(p)


def build(cfg: Config, recorded: guards.Recorded | None = None) -> tuple[Run, list[str]]:
    """(the objects of a run, what was chosen for each "auto"). The same seed gives the same weights on every device.

    recorded: the batch of a crash capsule, in place of a data set.
    """
    machine.set_deterministic(cfg.deterministic)
    device = machine.pick_device(cfg.device)
    cfg, said = machine.resolve(cfg, device)
    dataset, batches = (None, recorded) if recorded else open_data(cfg)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.processes not in (0, started):
        raise UserError(f"processes={cfg.processes}, but {started} started: type torchrun --nproc_per_node={cfg.processes} …")
    micro_batch, accumulation = cfg.split_step(started)
    if cfg.batch_size == "auto":
        said.append(f"batch_size = {micro_batch}, the whole share of a process; halved until it fits")
    elif micro_batch != cfg.batch_size:
        said.append(
            f"micro-batches of {micro_batch} (batch_size={cfg.batch_size} does not divide a process's share of the step)"
        )
    if cfg.reuse_memory and not machine.keep_freed_memory():
        raise UserError("reuse_memory=True did not take: malloc refused; type --reuse_memory=False")
    machine.set_fp32_precision(cfg.fp32_precision, device)
    machine.set_sdpa_backend(cfg.sdpa_backend, device)
    if device.type == "cpu":
        machine.limit_memory()

    world = parallel.start(device, cfg.timeout_minutes)
    facts = {"code": parallel.code_sha256(), "torch": torch.__version__, "data": dataset.sha256 if dataset else None}
    parallel.agree(world, facts | asdict(cfg))
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(device)
    if cfg.init_from and cfg.resume is not True:
        start_from(model, cfg.init_from)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between processes, weights do not
    compiled = compile_model(model, cfg)
    parallel.shard(model, cfg.parallel, world, device)
    net = parallel.wrap(compiled, cfg.parallel, world, device)
    optimizer = optim.adamw(cfg, model)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    objects = (cfg, world, device, dataset, batches, model, compiled, net, optimizer, scaler, micro_batch, accumulation)
    run = Run(*objects, guards.Outliers(cfg))
    run.reader.submit(int)  # its thread begins while there is memory for it
    return run, said


# ---- one step ---------------------------------------------------------------------------------------------------------


def accumulate(run: Run, step: int) -> Tensor:
    """Forward and backward of all micro-batches of a step: gradients of the mean loss. Returns this process's mean loss."""
    total = torch.zeros((), device=run.device)
    for micro in range(run.accumulation):
        x, y = run.next_batch(step, micro)
        last = micro == run.accumulation - 1
        with parallel.gradient_sync(run.net, on=last):
            with run.autocast():
                loss = run.net(x, y) / run.accumulation
            run.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def train_step(run: Run, step: int) -> tuple[float, float]:
    """Optimizer step number `step` (0, 1, …): (loss, gradient norm before clipping), both over all processes.

    The loss is the mean over the step's tokens, in nats, before the update. Raises TrainingStopped, with the parameters
    untouched, if either number is not finite, or is an outlier and on_outlier="stop". Out of memory, one process halves its
    micro-batch and tries again; several cannot, in the middle of an exchange.
    """
    cfg = run.cfg
    run.random_before = checkpoint.rng_states(run.device)
    while True:
        try:
            total = accumulate(run, step)
            break
        except RuntimeError as e:
            if not configurator.is_out_of_memory(e) or run.world.size > 1 or run.micro_batch == 1:
                raise
            why = str(e)
        run.halve(why)  # here, where the exception no longer holds on to the activations
    total = parallel.sum_over_ranks(total) / run.world.size
    run.scaler.unscale_(run.optimizer)
    gradient_norm = optim.gradient_norm(run.model)
    mean_loss, norm = torch.stack((total, gradient_norm)).tolist()  # the host's one wait for the device in a step
    # fp16 overflows now and then by design: there the scaler leaves the step out and scales less
    bad = "loss" if not math.isfinite(mean_loss) else "gradient norm" if not math.isfinite(norm) else None
    if bad == "loss" or (bad and not run.scaler.is_enabled()):
        run.optimizer.zero_grad(set_to_none=True)
        raise guards.TrainingStopped(
            step,
            f"the {bad} is not finite (loss {mean_loss}, gradient norm {norm}); try a lower --learning_rate, a longer "
            f"--warmup_steps, or --dtype=float32",
        )
    run.found = run.outliers.judge(loss=mean_loss, gradient_norm=norm)
    if run.found and cfg.on_outlier == "stop":
        run.optimizer.zero_grad(set_to_none=True)
        raise guards.TrainingStopped(step, f"{run.found} (on_outlier=stop)")
    if cfg.grad_clip and norm > cfg.grad_clip:
        optim.clip(run.model, run.optimizer, cfg.grad_clip, gradient_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = optim.learning_rate(cfg, step)
    if not (run.found and cfg.on_outlier == "skip"):
        run.scaler.step(run.optimizer)
    optim.unclip(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1.0:
        raise guards.TrainingStopped(step, "float16 gradients overflow at any scale; type --dtype=bfloat16 or float32")
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


def fit_batch(run: Run) -> None:
    """Find a micro-batch that fits all processes, before they begin to exchange anything: one forward and backward pass
    each, beside memory for what the optimizer will keep. Leaves no trace but the compiled code.
    """
    run.random_before = checkpoint.rng_states(run.device)
    while True:
        why = None
        try:
            mine = [p for group in parallel.own(run.optimizer).param_groups for p in group["params"]]
            kept = [] if parallel.own(run.optimizer).state else [torch.empty_like(p) for p in mine for _ in range(2)]
            with parallel.gradient_sync(run.net, on=False), run.autocast():
                loss = run.net(*run.read(0, 0))
            loss.backward()
            del kept, loss
        except RuntimeError as e:
            if not configurator.is_out_of_memory(e):
                raise
            why = str(e)
        if not parallel.any_rank(why is not None, run.device):
            run.model.zero_grad(set_to_none=True)
            checkpoint.set_rng_states(run.random_before, run.device)
            return
        if run.micro_batch == 1:
            raise RuntimeError(why or "out of memory in another process")
        run.halve(why or "in another process")


@torch.no_grad()
def evaluate(run: Run, broken_off: Callable[[], bool] = lambda: False) -> float | None:
    """Mean loss, in nats per token, over the first eval_tokens of the validation split: the same tokens always, whatever
    the batch and world size. None if broken_off(), asked before each batch, says so.
    """
    cfg, world = run.cfg, run.world
    run.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # on the CPU: mps has no float64
    for x, y in data.validation_batches(
        run.dataset.split("val"), cfg.T, cfg.eval_tokens, run.micro_batch, world.rank, world.size
    ):
        if broken_off():
            run.model.train()
            return None
        count = int((y >= 0).sum())
        with run.autocast():  # also where there is nothing left to count: sharded parameters are gathered from all processes
            loss = run.compiled(x.to(run.device), y.to(run.device))
        if count:  # the mean over nothing is NaN
            sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    run.model.train()
    sums = sums.float().to(run.device) if run.device.type == "mps" else sums.to(run.device)
    total, count = parallel.sum_over_ranks(sums).tolist()
    return total / count


# ---- the loop ---------------------------------------------------------------------------------------------------------


class Log:
    """out/<run>/log.jsonl, one JSON object a line, and Weights & Biases if asked. Silent but in the first process."""

    def __init__(self, run: Run, out_dir: Path, resumed: bool):
        path, self.file = out_dir / "log.jsonl", None
        if run.world.first:
            if path.is_file():  # a run that was killed may have left half a line
                whole = path.read_bytes().rpartition(b"\n")
                os.truncate(path, len(whole[0] + whole[1]))
            self.file = open(path, "a", encoding="utf-8")
        self.wandb = None
        if run.world.first and run.cfg.wandb != "off":
            import wandb

            mode, name = run.cfg.wandb, out_dir.name
            try:
                self.wandb = wandb.init(
                    project=run.cfg.wandb_project,
                    name=name,
                    mode=mode,
                    dir=out_dir,
                    config=asdict(run.cfg),
                    resume=resumed or None,
                )
            except Exception as e:  # of its own many kinds: no key, no network, no quota
                reason = str(e).strip().partition("\n")[0] or type(e).__name__
                raise UserError(f"wandb does not start ({reason}): type wandb login, or --wandb=offline") from None

    def write(self, record: dict) -> None:
        if self.file:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
            }  # NaN is no JSON
            try:
                self.file.write(json.dumps(finite) + "\n")
                self.file.flush()
            except OSError as e:
                name = self.file.name
                raise UserError(
                    f"cannot write {name}: {e.strerror}; checkpoints are untouched: make room, type --resume"
                ) from None
        if self.wandb and "step" in record:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # a full disk; write() has said so
                self.file.close()
        if self.wandb:
            self.wandb.finish()


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def prepare_out_dir(run: Run, resuming: bool) -> tuple[Path, IO | None]:
    """(the run's folder, the open file that locks it). An earlier run in it is moved aside, aloud, unless this resumes it.
    UserError if nobody can write there, or if there is no room for a checkpoint.
    """
    cfg, out, held = run.cfg, Path(run.cfg.out_dir), None
    if run.world.first:
        try:
            if not resuming and out.is_dir() and any(out.iterdir()):
                if not (out / "log.jsonl").is_file():
                    raise UserError(f"out_dir={out} holds something that is not a run: type --out_dir=another/folder")
                checkpoint.lock(out).close()  # nobody else's
                aside = next(p for n in range(1, 10_000) if not (p := out.with_name(f"{out.name}.{n}")).exists())
                out.rename(aside)
                print(f"{out} held an earlier run: moved to {aside} (to go on from a run instead, type --resume)")
            out.mkdir(parents=True, exist_ok=True)
            held = checkpoint.lock(out)
            checkpoint.clean_up(out)
            (out / ".writing_probe").mkdir()  # a folder may hold files that can be written, and take no new ones
            (out / ".writing_probe").rmdir()
            checkpoint.write_config(out, cfg)
        except OSError as e:
            raise UserError(f"cannot write to out_dir={out}: {e.strerror}; type --out_dir=another/folder") from None
        needed, free = 12 * sum(p.numel() for p in run.model.parameters()), shutil.disk_usage(out).free
        if free < needed:
            raise UserError(
                f"a checkpoint takes {needed / 2**30:.1f} GiB, {out} has {free / 2**30:.1f} GiB left: "
                f"type --out_dir=another/folder, or make room"
            )
    return out, held


def resume(run: Run, out: Path) -> dict:
    """Load the newest checkpoint into the run; returns its training.json. UserError if it is of another model or data set."""
    folder = checkpoint.newest(out, say=print if run.world.first else lambda _: None)
    before = checkpoint.read_config(folder)
    if before.dataset != run.cfg.dataset:
        raise UserError(f"{folder} was trained on {before.dataset}, not {run.cfg.dataset}: type --dataset={before.dataset}")
    model_fields = set(configurator.GPTConfig.__dataclass_fields__) - {"attention", "dropout"}
    for name, (old, new) in configurator.diff(before, run.cfg).items():
        if name in model_fields:
            raise UserError(f"{folder} was trained with {name}={old!r}, not {new!r}: type --{name}={old}")
        if run.world.first and name not in ("resume", "out_dir"):
            print(f"resuming with {name} = {new!r} (was {old!r})")
    step = int(folder.name.removeprefix("step_"))
    rates = [optim.learning_rate(c, step) for c in (before, run.cfg)]
    if run.world.first and rates[0] != rates[1]:
        print(f"the learning rate goes on at {rates[1]:.2e}; the schedule before had {rates[0]:.2e} here")
    checkpoint.load_weights(folder, run.model)
    training = checkpoint.load_training(folder, run.model, run.optimizer, run.world.rank, run.device)
    if training["data_sha256"] != run.dataset.sha256:
        raise UserError(f"{run.dataset.folder} has changed since {folder} was saved: prepare the same data again")
    if training["scaler"]:  # empty unless the run was in float16
        try:
            run.scaler.load_state_dict(training["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{folder}/training.json: scaler is no state of a GradScaler ({e!r})") from None
    run.outliers.load(training["outliers"])
    return training


class Stop:
    """Whether, and why, the run should end after this step: a signal, or the time that it was given."""

    def __init__(self, cfg: Config, device: torch.device):
        self.deadline = time.monotonic() + 60 * cfg.max_minutes if cfg.max_minutes else math.inf
        self.device, self.signals, self.anything_done = device, [], False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: self.on_signal(n))

    def on_signal(self, number: int) -> None:
        """Note a signal, for the end of the step; a second Ctrl-C does not wait for it, nor a first before any step: compiling
        may take longer than whoever sent it waits, and there is nothing to lose.
        """
        if number == signal.SIGINT and signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
        if not self.anything_done:
            sys.exit(128 + number)

    def __call__(self) -> bool:
        """The same answer in every process; each must ask equally often."""
        return parallel.any_rank(bool(self.signals) or time.monotonic() > self.deadline, self.device)


def snapshot(run: Run, step: int, extra: dict) -> checkpoint.Snapshot:
    """The state after `step` steps, to be written. Every process must call it."""
    states = parallel.gather(checkpoint.rng_states(run.device).to(run.device))
    extra = {
        "sequences_seen": step * run.cfg.tokens_per_step // run.cfg.T,  # the data's cursor: batches follow from it
        "data_sha256": run.dataset.sha256,
        "scaler": run.scaler.state_dict(),
        "outliers": run.outliers.state(),
    } | extra
    tensors = checkpoint.state_tensors(run.model, run.optimizer)
    return checkpoint.Snapshot(step, *tensors, [s.cpu() for s in states], run.cfg, run.dataset.tokenizer, extra)


def train(cfg: Config) -> None:
    """The whole run of a resolved-as-we-go Config: build, resume, step, validate, save."""
    machine.keep_compiled_code()
    if parallel.attempt() and cfg.resume is False:
        cfg = replace(cfg, resume="auto")  # torchrun has started a run anew whose processes were killed
    run, said = build(cfg)
    watch = parallel.Watch(run.world, 60 * cfg.timeout_minutes)
    try:
        reason = session(run, said, watch)
    except RuntimeError as e:
        if not parallel.is_lost_peer(e):
            raise
        if watch.reporting:
            watch.join()  # it says who is stuck, and ends the process
        lost = str(e).partition("\n")[0][:120]
        raise UserError(f"{watch.doing}: another process has gone ({lost}); checkpoints are untouched: type --resume") from None
    finally:
        watch.close()
    run.close()
    if reason:
        sys.exit(128 + reason)


def session(run: Run, said: list[str], watch: parallel.Watch) -> int:
    """All of a run but its building. Returns the signal that ended it, or 0."""
    cfg, world, first = run.cfg, run.world, run.world.first
    say = print if first else lambda *_: None
    if cfg.wandb != "off" and find_spec("wandb") is None:
        raise UserError("wandb is not installed: type pip install wandb, or --wandb=off")
    out, held = Path(cfg.out_dir), None
    began_before = (out / "log.jsonl").is_file()
    resuming = cfg.resume is True or (cfg.resume == "auto" and bool(checkpoint.candidates(out)))
    training = resume(run, out) if resuming else {"step": 0, "val_loss": None, "best_step": None, "best_val_loss": None}
    parallel.wait_for_all()  # a process that finds no checkpoint must not meet the folder of one that has begun
    # once nothing speaks against the run any more
    out, held = prepare_out_dir(run, resuming or (cfg.resume == "auto" and began_before))
    parallel.wait_for_all()
    log = Log(run, out, resumed=resuming)
    say(f"config of {out}:\n{configurator.describe(cfg)}")
    for line in said:
        say(f"chosen: {line}")
    say(
        f"{run.model.n_params() / 1e6:.2f}M parameters; {len(run.batches.stream):,} tokens in {run.batches.n:,} sequences; "
        f"step = {cfg.tokens_per_step} tokens = {run.accumulation} micro-batches x {run.micro_batch} sequences x "
        f"{cfg.T} tokens x {world.size} process(es)"
    )
    where = machine.describe(run.device)
    log.write({"event": "start", "step_done": training["step"], "config": asdict(cfg), "machine": where})
    saver = checkpoint.Saver(out, world, parallel.shares_state(run.net, run.optimizer), cfg.background_save)
    try:
        return loop(run, training, out, log, saver, watch, say)
    except guards.TrainingStopped as stopped:
        unknown = dict.fromkeys(("loss", "val_loss", "best_step", "best_val_loss"))
        state = snapshot(run, stopped.step, unknown)
        state.random_states = parallel.gather(run.random_before.to(run.device))
        try:
            folder, module = guards.write_capsule(run, out, stopped, state)
        except UserError as e:
            raise UserError(f"{stopped}; and no crash capsule could be written: {e}") from None
        again = f"python train.py --replay {folder} --dtype=float32"
        raise UserError(f"{stopped}. First wrong: {module}. To run that step again: {again}") from None
    finally:
        saver.close()
        log.close()
        if held:
            held.close()


def loop(run: Run, training: dict, out: Path, log: Log, saver: checkpoint.Saver, watch: parallel.Watch, say: Callable) -> int:
    """The steps from training["step"] on. Returns the signal that ended them, or 0."""
    cfg, world = run.cfg, run.world
    start_step, val_loss = training["step"], training["val_loss"]
    best = training["best_step"], training["best_val_loss"]
    if start_step >= cfg.max_steps:
        say(f"{out} is at step {start_step} already; max_steps={cfg.max_steps}")
    stop = Stop(cfg, run.device)
    peak, began, saved = machine.peak_flops(run.device), time.perf_counter(), start_step

    def tell_saved(final: bool) -> None:
        """Log what became of the save under way. A full disk in the middle of a run is told; at its end it is an error."""
        try:
            done = saver.wait()
        except UserError as e:
            log.write({"event": "save_failed", "reason": str(e)})
            if final:
                raise
            print(f"WARNING: {e}; training goes on, the next attempt is in {cfg.checkpoint_interval} steps", file=sys.stderr)
            return
        if done and world.first:
            folder, seconds = done
            log.write({"event": "saved", "step_done": int(folder.name.removeprefix("step_")), "save_ms": 1e3 * seconds})
            say(f"saved {folder} in {seconds:.1f} s" + (" while training went on" if cfg.background_save and not final else ""))

    track = curve.Tracker(cfg, run.dataset.sha256) if cfg.curve not in ("", "off") else None
    if track and (unlike := track.unlike()):
        say(f"not compared with {cfg.curve}, which was recorded with {', '.join(unlike)}")
        track = None
    rows = []
    if cfg.hellaswag_interval:
        rows = evaluation.hellaswag_rows(cfg.hellaswag_rows, say)
        for row in rows[:100]:  # not every tokenizer knows every character: known before the first step
            evaluation.encode_row(row, run.dataset.tokenizer, cfg.block_size)
    if world.size > 1 and cfg.parallel != "fsdp" and start_step < cfg.max_steps:
        fit_batch(run)  # under fsdp every pass is an exchange
    for step in range(start_step, cfg.max_steps):
        done = step + 1
        micro_batch, tick = run.micro_batch, time.perf_counter()
        loss, norm = train_step(run, step)
        machine.synchronize(run.device)
        seconds = time.perf_counter() - tick
        watch.beat(f"after step {done}")
        stop.anything_done = True
        rate = cfg.tokens_per_step / seconds
        mfu = rate * cfg.flops_per_token(cfg.T) / (peak * world.size) if peak else None
        record = {
            "step": done,
            "loss": loss,
            "lr": optim.learning_rate(cfg, step),
            "grad_norm": norm,
            "ms": 1e3 * seconds,
            "tokens_per_s": rate,
            "mfu": mfu,
            "memory_gib": machine.memory_gib(run.device),
        }
        log.write(record)
        if run.micro_batch != micro_batch:
            log.write({"event": "out_of_memory", "step_done": done, "micro_batch": run.micro_batch})
        if run.found:
            log.write({"event": "outlier", "step_done": done, "what": run.found, "on_outlier": cfg.on_outlier})
            say(f"step {done:>6}: {run.found}; on_outlier={cfg.on_outlier}; {run.outliers.count} so far")
        if done == start_step + 1:
            on = effective(run)
            log.write({"event": "effective", "effective": on})
            if wrong := mismatches(run, on):
                raise UserError("; ".join(wrong))
            say(
                f"running: {on['dtype']} matmuls, attention {on['attention_kernel']}, {on['graphs']} compiled graphs "
                f"({on['graph_breaks']} breaks), {'fused' if on['fused_adamw'] else 'looped'} AdamW, {on['threads']} threads"
            )
            if world.size > 1:
                held = ", ".join(f"{mib:,.1f}" for mib in on["state_mib"][:8]) + (", …" if world.size > 8 else "")
                say(f"parameters, gradients and moments ({on['parallel']}): {held} MiB in processes 0, 1, …")
        due = cfg.replica_interval and done % cfg.replica_interval == 0
        if due and (different := parallel.different_replicas(run.model)):
            raise UserError(
                f"step {done}: the processes no longer hold the same parameters ({', '.join(different[:3])}, "
                f"{len(different)} in all), so one has computed wrongly: type --resume, and watch that machine"
            )
        expected = f" {said}" if track and (said := track.step(done, loss)) else ""
        ending = stop()
        last = ending or done == cfg.max_steps
        if last or done == start_step + 1 or done % cfg.log_interval == 0:
            eta = (time.perf_counter() - began) / (done - start_step) * (cfg.max_steps - done)
            say(
                f"step {done:>6}/{cfg.max_steps} | loss {loss:.4f}{expected} | lr {record['lr']:.2e} | norm {norm:5.2f} | "
                f"{record['ms']:6.0f} ms | {rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | "
                f"mem {record['memory_gib']:.1f} GiB | eta {duration(eta)}"
            )
        improved = False
        if (done % cfg.eval_interval == 0 or done == cfg.max_steps) and not ending:
            tick = time.perf_counter()
            if (found := evaluate(run, stop)) is not None:
                val_loss = found
                improved = best[1] is None or val_loss < best[1]
                best = (done, val_loss) if improved else best
                said = track.validated(done, val_loss) if track else ""
                log.write({"step": done, "val_loss": val_loss, "eval_ms": 1e3 * (time.perf_counter() - tick)})
                say(f"step {done:>6}/{cfg.max_steps} | val_loss {val_loss:.4f}{f' {said}' if said else ''}")
            ending = found is None or stop()
            last = last or ending
            watch.beat(f"after the validation of step {done}")
        if rows and done % cfg.hellaswag_interval == 0 and not ending:
            record = evaluation.hellaswag(
                run.model,
                run.dataset.tokenizer,
                rows,
                batch_tokens=run.micro_batch * cfg.T,
                autocast=run.autocast,
                world=world,
                broken_off=lambda: (watch.beat("in HellaSwag"), stop())[1],
            )
            ending = record is None or stop()
            last = last or ending
            if record:
                log.write({"step": done, "hellaswag": record["acc"], "hellaswag_norm": record["acc_norm"]})
                say(f"step {done:>6}/{cfg.max_steps} | HellaSwag acc {record['acc']:.4f} | acc_norm {record['acc_norm']:.4f}")
            watch.beat(f"after HellaSwag of step {done}")
        if cfg.sample_interval and done % cfg.sample_interval == 0:
            write_sample(run, say)
        if track and (causes := track.causes()):
            log.write({"event": "off_track", "step_done": done, "causes": causes})
            say(f"step {done:>6}: {causes}")
        if saver.done():
            tell_saved(final=False)
        if last or done % cfg.checkpoint_interval == 0 or (improved and cfg.keep_best):
            extra = {"loss": loss, "val_loss": val_loss, "best_step": best[0], "best_val_loss": best[1]}
            tick = time.perf_counter()
            tell_saved(final=False)
            saver.save(snapshot(run, done, extra), cfg.keep_checkpoints, best[0] if cfg.keep_best else None)
            log.write({"event": "saving", "step_done": done, "pause_ms": 1e3 * (time.perf_counter() - tick)})
            saved = done
            watch.beat(f"after the save of step {done}")
        if ending:
            break
    tell_saved(final=True)
    parallel.wait_for_all()
    if stop.signals:
        say(f"stopped by a signal after step {saved}: type --resume to go on")
    elif saved < cfg.max_steps:
        say(f"stopped after {cfg.max_minutes:g} minutes, after step {saved}: type --resume to go on")
    return stop.signals[0] if stop.signals else 0


def write_sample(run: Run, say: Callable) -> None:
    """Let the model write a text; draws nothing from the random states of training. Every process must call it."""
    tokenizer = run.dataset.tokenizer
    prompt = tokenizer.encode(run.cfg.sample_prompt) or [tokenizer.start]
    run.model.eval()
    how = dict(temperature=0.8, top_k=200, seed=run.cfg.seed)
    ids = [int(token[0]) for token in sample.generate(run.model, prompt, SAMPLE_TOKENS, **how)]
    run.model.train()
    say(f"sample | {run.cfg.sample_prompt}{tokenizer.decode(ids)}".replace("\n", "\n       | "))


def replay(folder: Path, flags: list[str]) -> None:
    """Run the forward and backward passes of a crash capsule again, with other settings if flags are given."""
    cfg, crash, recorded = guards.read_capsule(folder)
    cut = cfg.T, cfg.tokens_per_step
    cfg = configurator.parse(replace(cfg, processes=0), flags, __doc__)
    if (cfg.T, cfg.tokens_per_step) != cut:
        raise UserError(f"sequence_length and tokens_per_step are the capsule's, {cut[0]} and {cut[1]}: try other settings")
    run, said = build(cfg, recorded)
    say = print if run.world.first else lambda *_: None
    say(f"{folder}: {crash['reason']}\nfirst wrong then: {crash['first_wrong']}")
    for line in said:
        say(f"chosen: {line}")
    checkpoint.load_weights(folder, run.model)
    states = guards.random_states(folder)
    checkpoint.set_rng_states(states[run.world.rank % len(states)], run.device)
    if run.world.size != crash["processes"] and cfg.dropout:
        say(f"dropout draws other numbers: {crash['processes']} processes ran this step")
    run.random_before = checkpoint.rng_states(run.device)
    loss = (parallel.sum_over_ranks(accumulate(run, 0)) / run.world.size).item()
    run.scaler.unscale_(run.optimizer)
    norm = optim.gradient_norm(run.model).item()
    module = guards.seen_first(run, 0)
    run.close()
    say(f"step {crash['step']} again, dtype={run.cfg.dtype}: loss {loss}, gradient norm {norm}; first wrong: {module}")
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError("the step goes wrong again with these settings")
    say("the step is fine with these settings")


def main(argv: list[str]) -> None:
    if argv and argv[0].partition("=")[0] == "--replay":
        folder, flags = (argv[0][9:], argv[1:]) if "=" in argv[0] else ("".join(argv[1:2]), argv[2:])
        return replay(Path(folder), flags)
    if "--prove_resume" in argv:
        import prove

        return prove.prove_resume([a for a in argv if a != "--prove_resume"])
    if "--plan" in argv:
        import plan

        return plan.main([a for a in argv if a != "--plan"])
    if "--record_curve" in argv:
        return curve.record([a for a in argv if a != "--record_curve"])
    cfg = configurator.load(argv, __doc__)
    if not argv:
        print(
            f"no config file: GPT-2's own sizes, {cfg.tokens_per_step:,} tokens per step (config/shakespeare.py takes minutes)"
        )
    train(cfg)


if __name__ == "__main__":
    configurator.entry(main)
