"""What cannot be caused from outside a process: a NaN, a flipped bit, a kill between two system calls.

python tests/rig/inject.py NAME=ARGUMENTS FLAGS arranges it, then is train.py.
"""

import ctypes
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


def at_step(step: str, rank: str, action: Callable[[Run], object]) -> None:
    """Call action(run) before a step (0, 1, …) of one rank."""
    plain = train.train_step

    def train_step(run: Run, now: int):
        if now == int(step) and run.world.rank == int(rank):
            action(run)
        return plain(run, now)

    train.train_step = train_step


def times(factor: float) -> Callable:
    return lambda module, args, output: output * factor  # a forward hook


def inject_die_before(n: str, step: str, calls: str) -> None:
    """Die before the n-th system call of the save of a step that changes the disk's contents; 0: write them down."""
    plain, seen, active = checkpoint.save, [], []

    def counted(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **how):
            if active:
                seen.append(name)
                if len(seen) == int(n):
                    signal.raise_signal(signal.SIGKILL)
            return real(*args, **how)

        return call

    def save(run_dir, snapshot, *args, **how):
        active[:] = [True] * (snapshot.step == int(step))
        saved = plain(run_dir, snapshot, *args, **how)
        active.clear()
        Path(calls).write_text(" ".join(seen))
        return saved

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(name))
    checkpoint.save = save


def inject_die_inside(step: str, rank: str, micro: str) -> None:
    """Die in a step, when so many of its micro-batches are done."""
    done = itertools.count()

    def before_each(*_) -> None:
        if next(done) == int(micro):
            signal.raise_signal(signal.SIGKILL)

    at_step(step, rank, lambda run: run.train_model.register_forward_pre_hook(before_each))


def inject_nan(what: str, step: str, rank: str) -> None:
    """From a step on, the last block's MLP gives NaN in one process, or the gradient of its last bias is."""

    def action(run: Run) -> None:
        mlp = run.model.transformer.h[-1].mlp
        if what == "loss":
            mlp.register_forward_hook(times(math.nan))
        else:
            mlp.c_proj.bias.register_hook(lambda g: g * math.nan)

    at_step(step, rank, action)


def inject_spike(step: str) -> None:
    """In one step, logits are 100 times too large."""
    hooks = []
    at_step(step, "0", lambda run: hooks.append(run.model.transformer.ln_f.register_forward_hook(times(100))))
    at_step(str(int(step) + 1), "0", lambda _: hooks.pop().remove())


def inject_flip(step: str, rank: str, name: str, index: str, bit: str) -> None:
    """Before a step, one bit of one weight of one process changes."""

    def action(run: Run) -> None:
        with torch.no_grad():
            run.model.get_parameter(name).view(torch.int32).flatten()[int(index)] ^= 1 << int(bit)

    at_step(step, rank, action)


def inject_no_root() -> None:
    """Root may write anywhere: give up that right (capability 1, CAP_DAC_OVERRIDE), which takes effect in a new program."""
    if os.geteuid() == 0:
        PR_CAPBSET_DROP = 24  # linux/prctl.h
        if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, 1, 0, 0, 0):
            sys.exit("cannot give it up")
        os.execv(sys.executable, [sys.executable, "train.py", *sys.argv[2:]])


def inject_memory(megabytes: str) -> None:
    """From the first step on (with several processes: from the pass before it), this process may have so much more memory."""
    plain = train.open_session

    def open_session(*args):
        opened = plain(*args)
        used = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(megabytes) * 2**20, resource.RLIM_INFINITY))
        return opened

    train.open_session = open_session


def inject_record(file: str) -> None:
    """Write down which sequences each process reads."""
    plain, start_of, here = data.TrainBatches.batch, data.TrainBatches.start_of, threading.local()
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # so each write() comes whole behind the others

    def noted(self, g: int) -> int:
        here.starts.append(start_of(self, g))
        return here.starts[-1]

    def batch(self, step, micro, batch_size, accumulation, rank, world_size):
        here.starts = []  # batches are read in several threads
        found = plain(self, step, micro, batch_size, accumulation, rank, world_size)
        os.write(descriptor, (json.dumps([step, micro, rank, world_size, here.starts]) + "\n").encode())
        return found

    data.TrainBatches.batch, data.TrainBatches.start_of = batch, noted


def main(argv: list[str]) -> None:
    name, _, arguments = argv[0].partition("=")
    globals()[f"inject_{name}"](*(arguments.split(",") if arguments else []))
    train.main(argv[1:])


if __name__ == "__main__":
    entry(main)
