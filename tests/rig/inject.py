"""What cannot be caused from outside a process: a NaN, a flipped bit, a kill between two system calls.

python tests/rig/inject.py --inject=NAME=ARGUMENTS … -- FLAGS arranges it, then trains.
"""

import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the scripts are flat modules, not an installed package

import torch

import data
import train
from base.errors import entry
from engine import checkpoint
from engine.run import Run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: str, action: Callable[[Run], object], rank: int | None = None, after: Callable[[], object] = int) -> None:
    """Call action(run) before a step (0, 1, …) of this process, or of one rank only; and after() when that step is done."""
    plain = train.train_step

    def train_step(run: Run, now: int):
        here = now == int(step) and rank in (None, run.world.rank)
        if here:
            action(run)
        result = plain(run, now)
        if here:
            after()
        return result

    train.train_step = train_step


def inject_die_before(n: str, step: str, calls: str) -> None:
    """Die before the n-th system call of the save of a step that changes the disk's contents; 0: write them down."""
    plain, seen, active = checkpoint.save, [], []

    def counted(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **how):
            if active:
                seen.append(name)
                if len(seen) == int(n):
                    die()
            return real(*args, **how)

        return call

    def save(run_dir, snapshot, *args, **how):
        here = snapshot.step == int(step)
        active.extend([True] * here)
        try:
            return plain(run_dir, snapshot, *args, **how)
        finally:
            active.clear()
            if here:
                Path(calls).write_text(" ".join(seen))

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(name))
    checkpoint.save = save


def inject_die_inside(step: str, micro: str) -> None:
    """Die in the last process, in a step, when so many of its micro-batches are done."""

    def action(run: Run) -> None:
        done = itertools.count()
        if run.world.rank == run.world.size - 1:
            run.train_model.register_forward_pre_hook(lambda *_: die() if next(done) == int(micro) else None)

    at_step(step, action)


def inject_nan(what: str, step: str, rank: str) -> None:
    """From a step on, the last block's MLP gives NaN in one process, or the gradient of its last bias is."""

    def action(run: Run) -> None:
        mlp = run.model.transformer.h[-1].mlp
        if what == "loss":
            mlp.register_forward_hook(lambda module, args, output: output * math.nan)
        else:
            mlp.c_proj.bias.register_hook(lambda g: g * math.nan)

    at_step(step, action, int(rank))


def inject_spike(step: str) -> None:
    """In one step, logits are 100 times too large."""
    hooks = []

    def action(run: Run) -> None:
        hooks.append(run.model.transformer.ln_f.register_forward_hook(lambda module, args, output: output * 100))

    at_step(step, action, after=lambda: hooks.pop().remove())


def inject_flip(step: str, rank: str, name: str, index: str, bit: str) -> None:
    """Before a step, one bit of one weight of one process changes."""

    def action(run: Run) -> None:
        with torch.no_grad():
            run.model.get_parameter(name).view(torch.int32).flatten()[int(index)] ^= 1 << int(bit)

    at_step(step, action, int(rank))


def inject_memory(megabytes: str) -> None:
    """From the first step on (with several processes: from the pass before it), this process may have so much more memory."""
    plain = train.open_session

    def open_session(*args):
        opened = plain(*args)
        used = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(megabytes) * 2**20, resource.RLIM_INFINITY))
        return opened

    train.open_session = open_session


def inject_record(folder: str) -> None:
    """Write down which sequences this process reads."""
    plain, start_of, here, lock = data.TrainBatches.batch, data.TrainBatches.start_of, threading.local(), threading.Lock()
    file = open(Path(folder) / f"{os.getpid()}.jsonl", "a", encoding="utf-8")

    def noted(self, g: int) -> int:
        here.starts.append(start_of(self, g))
        return here.starts[-1]

    def batch(self, step, micro, batch_size, accumulation, rank, world_size):
        here.starts = []  # batches are read in several threads
        found = plain(self, step, micro, batch_size, accumulation, rank, world_size)
        with lock:
            file.write(json.dumps([step, micro, rank, world_size, here.starts]) + "\n")
            file.flush()
        return found

    data.TrainBatches.batch, data.TrainBatches.start_of = batch, noted


def main(argv: list[str]) -> None:
    """Arrange what --inject=name=arguments says, then be train.py."""
    where = argv.index("--")
    for what in argv[:where]:
        name, _, arguments = what.removeprefix("--inject=").partition("=")
        globals()[f"inject_{name}"](*arguments.split(","))
    train.main(argv[where + 1 :])


if __name__ == "__main__":
    entry(main)
