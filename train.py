"""Train a GPT.

    python train.py config/shakespeare.py                 one process
    torchrun --nproc_per_node=8 train.py CONFIG           one process per device
    python train.py config/shakespeare.py --max_steps=50 --compile=False
    python train.py config/shakespeare.py --resume        go on from the newest checkpoint

Any setting of configurator.py can be typed as --name=value. Ctrl-C (or SIGTERM) ends the step, saves, and leaves.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import configurator
import data
import machine
import optim
import parallel
from configurator import Config
from model import GPT, UserError


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

    def close(self) -> None:
        """Let go of the threads and processes behind a run."""
        self.reader.shutdown(cancel_futures=True)
        self.pending = {}
        parallel.stop()


class TrainingStopped(UserError):
    """Training cannot go on from here; the parameters are those before the step."""


# ---- building ---------------------------------------------------------------------------------------------------------


def compile_model(model: GPT, cfg: Config) -> nn.Module:
    """The model under torch.compile. With scope "block" its blocks share one graph and the head has another."""
    # else an equal model would find an earlier run's code in this process, and effective() that run's counts
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    if not cfg.compile:
        return model
    if cfg.compile_scope == "model":
        return torch.compile(model)
    for block in model.transformer.h:
        block.compile()
    model.head = torch.compile(model.head)
    return model


def build(cfg: Config) -> tuple[Run, list[str]]:
    """(the objects of a run, what was chosen for each "auto"). The same seed gives the same weights on every device."""
    device = machine.pick_device(cfg.device)
    cfg, said = machine.resolve(cfg, device)
    dataset = data.open_dataset(Path(cfg.data_dir) / cfg.dataset)
    if dataset.tokenizer.vocab_size != cfg.vocab_size:
        raise UserError(
            f"{dataset.folder} has a vocabulary of {dataset.tokenizer.vocab_size}, the model of {cfg.vocab_size}: "
            f"type --vocab_size={dataset.tokenizer.vocab_size}"
        )
    batches = data.TrainBatches(dataset.split("train"), cfg.T, cfg.seed, cfg.batch_order)
    data.sequence_count(dataset.split("val"), cfg.T, "the validation split")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.processes not in (0, started):
        raise UserError(f"processes={cfg.processes}, but {started} started: type torchrun --nproc_per_node={cfg.processes} …")
    micro_batch, accumulation = cfg.split_step(started)
    if micro_batch != cfg.batch_size:
        said.append(
            f"micro-batches of {micro_batch} (batch_size={cfg.batch_size} does not divide a process's share of the step)"
        )
    if cfg.reuse_memory and not machine.keep_freed_memory():
        raise UserError("reuse_memory=True did not take: malloc refused; type --reuse_memory=False")
    machine.set_fp32_precision(cfg.fp32_precision, device)

    world = parallel.start(device)
    torch.manual_seed(cfg.seed)
    model = GPT(cfg).to(device)
    torch.manual_seed(cfg.seed + world.rank)  # dropout differs between processes, weights do not
    optimizer = optim.adamw(cfg, model)
    compiled = compile_model(model, cfg)
    net = parallel.wrap(compiled, world, device)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    return Run(cfg, world, device, dataset, batches, model, compiled, net, optimizer, scaler, micro_batch, accumulation), said


# ---- one step ---------------------------------------------------------------------------------------------------------


def train_step(run: Run, step: int) -> tuple[float, float]:
    """Optimizer step number `step` (0, 1, …): (loss, gradient norm before clipping), both over all processes.

    The loss is the mean over the step's tokens, in nats, before the update. Raises TrainingStopped, with the parameters
    untouched, if either number is not finite.
    """
    cfg = run.cfg
    total = torch.zeros((), device=run.device)
    for micro in range(run.accumulation):
        x, y = run.next_batch(step, micro)
        last = micro == run.accumulation - 1
        with parallel.gradient_sync(run.net, on=last):
            with run.autocast():
                loss = run.net(x, y) / run.accumulation
            run.scaler.scale(loss).backward()
        total += loss.detach()
    total = parallel.sum_over_ranks(total) / run.world.size
    run.scaler.unscale_(run.optimizer)
    gradient_norm = optim.gradient_norm(run.model)
    mean_loss, norm = torch.stack((total, gradient_norm)).tolist()  # the host's one wait for the device in a step
    # fp16 overflows now and then by design: there the scaler leaves the step out and scales less
    bad = "loss" if not math.isfinite(mean_loss) else "gradient norm" if not math.isfinite(norm) else None
    if bad == "loss" or (bad and not run.scaler.is_enabled()):
        run.optimizer.zero_grad(set_to_none=True)
        raise TrainingStopped(
            f"step {step + 1}: the {bad} is not finite (loss {mean_loss}, gradient norm {norm}); the parameters are those "
            f"before the step. Try a lower --learning_rate, a longer --warmup_steps, or --dtype=float32"
        )
    if cfg.grad_clip and norm > cfg.grad_clip:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), cfg.grad_clip, gradient_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = optim.learning_rate(cfg, step)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.scaler.is_enabled() and run.scaler.get_scale() < 1.0:
        raise TrainingStopped(f"step {step + 1}: float16 gradients overflow at any scale; type --dtype=bfloat16 or float32")
    run.optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean loss, in nats per token, over the first eval_tokens of the validation split: the same tokens always, whatever
    the batch and world size.
    """
    cfg, world = run.cfg, run.world
    run.model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # on the CPU: mps has no float64
    for x, y in data.validation_batches(
        run.dataset.split("val"), cfg.T, cfg.eval_tokens, run.micro_batch, world.rank, world.size
    ):
        count = int((y >= 0).sum())
        if count == 0:  # this rank has run out: the mean over nothing is NaN
            continue
        with run.autocast():
            loss = run.compiled(x.to(run.device), y.to(run.device))
        sums += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    run.model.train()
    sums = sums.float().to(run.device) if run.device.type == "mps" else sums.to(run.device)
    total, count = parallel.sum_over_ranks(sums).tolist()
    return total / count


# ---- requested and effective ----------------------------------------------------------------------------------------


class _Spy(TorchDispatchMode):
    """Notes the dtypes that matmuls read and the attention kernels that run, below autocast and autograd."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.kernels = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.update(str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, Tensor))
        if "scaled_dot_product" in name:
            self.kernels.add(name.strip("_"))
        return func(*args, **(kwargs or {}))


def effective(run: Run) -> dict:
    """What is really on, read from the built objects and from a probe of them; call it after a step. Changes nothing: no
    random number is drawn, no gradient left.
    """
    model, device = run.model, run.device
    x, y = (t.to(device) for t in run.batches.batch(0, 0, 1, 1, 0, 1))
    # in training mode, since dropout decides which kernels can run; its draws are given back
    kept = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with kept, torch.compiler.set_stance("force_eager"), _Spy() as spy, run.autocast():
        model(x, y)
    stats = torch._dynamo.utils.counters  # what the compiler did in this process
    scope = "block" if "head" in vars(model) else "model" if run.compiled is not model else "none"  # see compile_model()
    # the compiler may fuse attention that was written out: then the naive form is not what runs
    fused = any("math" not in k for k in spy.kernels) or stats["inductor"]["fuse_attention"]
    return {
        "device": next(model.parameters()).device.type,
        "dtype": "+".join(sorted(spy.dtypes)),
        "fp32_precision": machine.fp32_precision_measured(device),
        "attention": "sdpa" if fused else "naive",
        "attention_kernel": "+".join(sorted(spy.kernels)) or "separate matmuls",
        "compile_scope": scope,
        "compile": scope != "none" and stats["stats"]["unique_graphs"] > 0,
        "graphs": stats["stats"]["unique_graphs"],
        "graph_breaks": sum(stats["graph_break"].values()),
        "fused_adamw": bool(run.optimizer.param_groups[0]["fused"]),
        "reuse_memory": machine.memory_is_reused() if device.type == "cpu" else False,
        "prefetch": bool(run.pending),
        "tie_weights": model.lm_head.weight is model.transformer.wte.weight,
        "padded_vocab_size": model.lm_head.weight.size(0),
        "parameters": model.n_params(),
        "parameter_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "processes": parallel.size(),
        "micro_batch": run.micro_batch,
        "accumulation": run.accumulation,
        "threads": torch.get_num_threads(),
    }


def mismatches(run: Run, on: dict) -> list[str]:
    """Each setting that was asked for and is not what effective() found, with a remedy."""
    cfg = run.cfg
    names = ("device", "dtype", "attention", "compile", "fused_adamw", "reuse_memory", "prefetch", "tie_weights")
    asked = {name: getattr(cfg, name) for name in names} | {"padded_vocab_size": cfg.padded_vocab_size}
    asked["processes"] = cfg.processes or run.world.size
    if cfg.compile and on["compile"]:
        asked |= {"graph_breaks": 0, "compile_scope": cfg.compile_scope}
    if cfg.dtype == "float32":
        asked["fp32_precision"] = cfg.fp32_precision
    if not cfg.reuse_memory:
        del asked["reuse_memory"]  # a heap may happen to have room: nothing was asked for
    if cfg.attention == "sdpa" and (on["device"] == "mps" or (on["device"] == "cpu" and cfg.dropout > 0)):
        # PyTorch has no fused kernel for a CPU with dropout, and other names on mps; without one it multiplies in float32.
        # train() says which kernel runs.
        del asked["attention"]
        asked["dtype"] = on["dtype"] if cfg.dtype in on["dtype"].split("+") else cfg.dtype
    remedies = {
        "compile": "type --compile=False, or see TORCH_LOGS=graph_breaks",
        "graph_breaks": "type --compile=False, or see TORCH_LOGS=graph_breaks",
        "dtype": "type --dtype=float32",
        "padded_vocab_size": "type --vocab_multiple=1",
        "attention": "no fused attention kernel takes these shapes here: type --attention=naive",
        "fp32_precision": "this device does not round float32 matmuls that way: type --fp32_precision=ieee",
    }
    return [
        f"{name}={value!r} was asked for, but {on[name]!r} is what runs: {remedies.get(name, f'type --{name}={on[name]}')}"
        for name, value in asked.items()
        if on[name] != value
    ]


# ---- the loop ---------------------------------------------------------------------------------------------------------


class Log:
    """out/<run>/log.jsonl, one JSON object a line, and Weights & Biases if asked. Silent but in the first process."""

    def __init__(self, run: Run, out_dir: Path, resumed: bool):
        self.file = open(out_dir / "log.jsonl", "a", encoding="utf-8") if run.world.first else None
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
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        if self.wandb and "step" in record:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def prepare_out_dir(cfg: Config, world: parallel.World) -> tuple[Path, IO | None]:
    """(the run's folder, the open file that locks it). An earlier run in it is moved aside, aloud, unless this resumes it."""
    out, held = Path(cfg.out_dir), None
    if world.first:
        try:
            if not cfg.resume and out.is_dir() and any(out.iterdir()):
                if not (out / "log.jsonl").is_file():
                    raise UserError(f"out_dir={out} holds something that is not a run: type --out_dir=another/folder")
                checkpoint.lock(out).close()  # nobody else's
                aside = next(p for n in range(1, 10_000) if not (p := out.with_name(f"{out.name}.{n}")).exists())
                out.rename(aside)
                print(f"{out} held an earlier run: moved to {aside} (to go on from a run instead, type --resume)")
            out.mkdir(parents=True, exist_ok=True)
            held = checkpoint.lock(out)
            checkpoint.write_config(out, cfg)
        except OSError as e:
            raise UserError(f"cannot write to out_dir={out}: {e.strerror}; type --out_dir=another/folder") from None
    return out, held


def resume(run: Run, out: Path) -> int:
    """Load the newest checkpoint into the run; returns the steps done. UserError if it is of another model or data set."""
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
        run.scaler.load_state_dict(training["scaler"])
    return training["step"]


def on_signal(number: int, stopping: list[int]) -> None:
    """Note a signal, for the end of the step; a second Ctrl-C does not wait for it."""
    if number == signal.SIGINT and signal.SIGINT in stopping:
        raise KeyboardInterrupt
    stopping.append(number)


def train(cfg: Config) -> None:
    """The whole run of a resolved-as-we-go Config: build, resume, step, validate, save."""
    run, said = build(cfg)
    cfg, world, first = run.cfg, run.world, run.world.first
    say = print if first else lambda *_: None
    if cfg.wandb != "off" and find_spec("wandb") is None:
        raise UserError("wandb is not installed: type pip install wandb, or --wandb=off")
    start_step = resume(run, Path(cfg.out_dir)) if cfg.resume else 0
    out, held = prepare_out_dir(cfg, world)  # once nothing speaks against the run any more
    parallel.wait_for_all()
    log = Log(run, out, resumed=cfg.resume)
    say(f"config of {out}:\n{configurator.describe(cfg)}")
    for line in said:
        say(f"chosen: {line}")
    say(
        f"{run.model.n_params() / 1e6:.2f}M parameters; {len(run.batches.stream):,} tokens in {run.batches.n:,} sequences; "
        f"step = {cfg.tokens_per_step} tokens = {run.accumulation} micro-batches x {run.micro_batch} sequences x "
        f"{cfg.T} tokens x {world.size} process(es)"
    )
    where = machine.describe(run.device)
    log.write({"event": "start", "step_done": start_step, "config": asdict(cfg), "machine": where})
    if start_step >= cfg.max_steps:
        say(f"{out} is at step {start_step} already; max_steps={cfg.max_steps}")

    stopping: list[int] = []  # signals received
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: on_signal(n, stopping))
    peak, began, val_loss = machine.peak_flops(run.device), time.perf_counter(), None

    for step in range(start_step, cfg.max_steps):
        done = step + 1
        tick = time.perf_counter()
        loss, norm = train_step(run, step)
        machine.synchronize(run.device)
        seconds = time.perf_counter() - tick
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
        if done == start_step + 1:
            on = effective(run)
            log.write({"event": "effective", "effective": on})
            if wrong := mismatches(run, on):
                raise UserError("; ".join(wrong))
            say(
                f"running: {on['dtype']} matmuls, attention {on['attention_kernel']}, {on['graphs']} compiled graphs "
                f"({on['graph_breaks']} breaks), {'fused' if on['fused_adamw'] else 'looped'} AdamW, {on['threads']} threads"
            )
        stop = parallel.any_rank(bool(stopping), run.device)
        last = stop or done == cfg.max_steps
        if last or done == start_step + 1 or done % cfg.log_interval == 0:
            eta = (time.perf_counter() - began) / (done - start_step) * (cfg.max_steps - done)
            say(
                f"step {done:>6}/{cfg.max_steps} | loss {loss:.4f} | lr {record['lr']:.2e} | norm {norm:5.2f} | "
                f"{record['ms']:6.0f} ms | {rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | "
                f"mem {record['memory_gib']:.1f} GiB | eta {duration(eta)}"
            )
        if (done % cfg.eval_interval == 0 or done == cfg.max_steps) and not stop:
            tick = time.perf_counter()
            val_loss = evaluate(run)
            log.write({"step": done, "val_loss": val_loss, "eval_ms": 1e3 * (time.perf_counter() - tick)})
            say(f"step {done:>6}/{cfg.max_steps} | val_loss {val_loss:.4f}")
        if last or done % cfg.checkpoint_interval == 0:
            tick = time.perf_counter()
            extra = {
                "loss": loss,
                "val_loss": val_loss,
                "data_sha256": run.dataset.sha256,
                "scaler": run.scaler.state_dict(),
            }
            states = parallel.gather(checkpoint.rng_states(run.device).to(run.device))
            if first:
                states = [s.cpu() for s in states]
                folder = checkpoint.save(
                    out, done, run.model, run.optimizer, cfg, run.dataset.tokenizer, states, extra, cfg.keep_checkpoints
                )
                say(f"saved {folder} in {time.perf_counter() - tick:.1f} s")
            parallel.wait_for_all()
        if stop:
            say(f"stopped by a signal after step {done}: type --resume to go on")
            break
    log.close()
    run.close()
    if held:
        held.close()
    if stopping:
        sys.exit(128 + stopping[0])


def main(argv: list[str]) -> None:
    cfg = configurator.load(argv, __doc__)
    if not argv:
        print(
            f"no config file: GPT-2's own sizes, {cfg.tokens_per_step:,} tokens per step (config/shakespeare.py takes minutes)"
        )
    train(cfg)


if __name__ == "__main__":
    configurator.entry(main)
