"""The journal of a run: log lines on the terminal, out/<run>/log.jsonl, and Weights & Biases if asked. Rank 0 writes it."""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from base.errors import UserError
from base.files import open_regular
from engine import machine
from engine.run import Run


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step. loss (nats per token) and grad_norm (before clipping) are over all processes."""

    loss: float
    grad_norm: float
    lr: float
    outlier: str | None = None  # what stood out, in words
    seconds: float = field(default=math.nan, compare=False)  # filled in by whoever timed it


@dataclass(kw_only=True)
class Progress:
    """How far a run is: what training.json keeps of it, for the next start."""

    step: int = 0  # optimizer steps done
    loss: float | None = None  # of the last step
    val_loss: float | None = None
    best_step: int | None = None
    best_val_loss: float | None = None

    def advance(self, result: StepResult) -> None:
        self.step, self.loss = self.step + 1, result.loss

    def validated(self, val_loss: float) -> bool:
        """Note a validation; whether it is the best so far."""
        self.val_loss = val_loss
        improved = self.best_val_loss is None or val_loss < self.best_val_loss
        if improved:
            self.best_step, self.best_val_loss = self.step, val_loss
        return improved


def duration(seconds: float) -> str:
    """75 -> '1m15s'."""
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def compact(value: float, decimals: int) -> str:
    """99.9512 -> '99.95', 1234.5 -> '1,234', 1e9 -> '1e+09': five characters, since a log line should fit 120 columns."""
    return f"{value:.{decimals}f}" if value < 99.995 else f"{value:,.0f}" if value < 9999.5 else f"{value:.0e}"


class Journal:
    """One JSON object a line; a line on the terminal now and then. Silent in all processes but rank 0."""

    def __init__(self, run: Run, out_dir: Path, resumed: bool):
        """UserError if log.jsonl cannot be written, or wandb does not start."""
        self.run, self.file, self.wandb = run, None, None
        self.begun = self.first_step = None  # when the first step of this process was done, and its number
        self.micro_batch = run.micro_batch
        self.peak = machine.peak_flops(run.device)
        if not run.world.is_main:
            return
        path = out_dir / "log.jsonl"
        try:
            if path.exists():  # a run that was killed may have left half a line
                with open_regular(path) as f:
                    whole = f.read().rpartition(b"\n")
                os.truncate(path, len(whole[0] + whole[1]))
            self.file = open(path, "a", encoding="utf-8")
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror}; use --out_dir=another/folder") from None
        if run.cfg.wandb != "off":
            self.wandb = self._start_wandb(out_dir, resumed)

    def _start_wandb(self, out_dir: Path, resumed: bool):
        import wandb

        cfg = self.run.cfg
        how = dict(project=cfg.wandb_project, name=out_dir.name, mode=cfg.wandb, dir=out_dir, config=asdict(cfg))
        try:
            return wandb.init(**how, resume=resumed or None)
        except Exception as e:  # of its own many kinds: no key, no network, no quota
            reason = str(e).strip().partition("\n")[0] or type(e).__name__
            raise UserError(f"wandb does not start ({reason}): run wandb login, or use --wandb=offline") from None

    def say(self, line: str) -> None:
        """A line on the terminal."""
        if self.run.world.is_main:
            print(line)

    def write(self, record: dict) -> None:
        """A line of log.jsonl. UserError if the disk does not take it."""
        if self.file:
            # NaN is no JSON
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            try:
                self.file.write(json.dumps(finite) + "\n")
                self.file.flush()
            except OSError as e:
                name = self.file.name
                raise UserError(f"cannot write {name}: {e.strerror}; checkpoints are intact: make room, use --resume") from None
        if self.wandb and "step" in record:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def event(self, event: str, step_done: int, **more: object) -> None:
        """What happened besides a step: {"event", "step_done", …}."""
        self.write({"event": event, "step_done": step_done} | more)

    def step(self, progress: Progress, result: StepResult, last: bool) -> None:
        """A step: always in log.jsonl; on the terminal the first of this process, every log_interval-th, and the last."""
        cfg, step, now = self.run.cfg, progress.step, time.perf_counter()
        if self.begun is None:
            self.begun, self.first_step = now, step
        rate = cfg.tokens_per_step / result.seconds
        mfu = rate * cfg.flops_per_token(cfg.T) / (self.peak * self.run.world.size) if self.peak else None
        memory = machine.memory_gib(self.run.device)
        numbers = {"step": step, "loss": result.loss, "lr": result.lr, "grad_norm": result.grad_norm}
        speed = {"ms": 1e3 * result.seconds, "tokens_per_s": rate, "mfu": mfu, "memory_gib": memory}
        self.write(numbers | speed)
        if self.run.micro_batch != self.micro_batch:
            self.micro_batch = self.run.micro_batch
            self.event("out_of_memory", step, micro_batch=self.micro_batch)
        if not (last or step == self.first_step or step % cfg.log_interval == 0):
            return
        ms = f"{1e3 * result.seconds:.0f} ms" if result.seconds < 10 else f"{result.seconds:.1f} s"
        line = [
            f"step {step:>6}/{cfg.max_steps}",
            f"loss {result.loss:.4f}",
            f"lr {result.lr:.1e}",
            f"norm {compact(result.grad_norm, 2)}",
            ms,
            f"{rate / 1e6:.2f}M tok/s" if rate >= 1e6 else f"{rate:,.0f} tok/s",
            *([f"mfu {mfu:.1%}"] if mfu else []),
            f"{compact(memory, 1)} GiB",
        ]
        if self.first_step < step < cfg.max_steps:  # the first one may compile: it tells nothing about the others
            line.append(f"eta {duration((now - self.begun) / (step - self.first_step) * (cfg.max_steps - step))}")
        self.say(" | ".join(line))

    @contextlib.contextmanager
    def waiting(self, what: str, show: bool = True) -> Iterator[None]:
        """On a terminal, show what takes so long and since when, on a line that disappears afterwards."""
        done = threading.Event()

        def count() -> None:
            began = time.monotonic()
            while not done.wait(1.0):
                print(f"\r{what} … {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            print("\r\033[K", end="", file=sys.stderr, flush=True)

        visible = show and self.run.world.is_main and sys.stderr.isatty()
        thread = threading.Thread(target=count, daemon=True) if visible else None
        if thread:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if thread:
                thread.join()

    def close(self) -> None:
        if self.file:
            with contextlib.suppress(OSError):  # a full disk; write() has reported it
                self.file.close()
        if self.wandb:
            self.wandb.finish()
