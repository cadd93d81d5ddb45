"""Start this project's scripts in processes of their own, read what they left, and let none outlive this process."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from base.errors import UserError
from base.files import ROOT, read_bytes

# looked up here: between fork and exec a child must not load anything
prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
PATIENCE = 10.0  # seconds from SIGTERM to SIGKILL: a training run saves at the end of its step


@dataclass(frozen=True)
class Finished:
    """A script that has ended."""

    stdout: str
    stderr: str
    seconds: float
    returncode: int = 0  # minus the signal that ended it


def command(script: str, *arguments: object, processes: int = 1) -> list[str]:
    """The command line of "train.py" or of a module ("-m safety.prove"), under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    target = script.split() if script.startswith("-m ") else [str(ROOT / script)]
    return [sys.executable, *launcher, *target, *map(str, arguments)]


def last_words(stderr: str) -> str:
    """The line that says why a script failed: its own error, rather than what torchrun prints about it afterwards."""
    lines = [line.strip() for line in stderr.splitlines() if any(c.isalnum() for c in line)] or ["no message"]
    ours = ("error: ", "Error: ", "Exception: ")
    errors = [line for line in lines if any(word in line for word in ours) and "ChildFailedError" not in line]
    return (errors or lines)[-1]


def end_with_parent(parent: int, how: int = signal.SIGKILL) -> None:
    """Let this process end when `parent`, which started it, ends: however it ends, SIGKILL included.

    On Linux the kernel sends the signal, prctl(2): in fact when the thread ends that started this process, so start it from
    one that lives as long. Elsewhere a thread of this process looks every second.
    """
    if prctl:
        PR_SET_PDEATHSIG = 1  # linux/prctl.h
        prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)
        if os.getppid() != parent:  # it ended before that call
            os.kill(os.getpid(), how)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), how)

    threading.Thread(target=watch, daemon=True).start()


def end_on_sigterm() -> None:
    """Let SIGTERM end this process in one line, as an exception does: what it has started ends before it. A second SIGTERM must
    not interrupt that.
    """

    def end(number: int, _) -> None:
        signal.signal(number, signal.SIG_IGN)
        os.write(2, b"stopped by SIGTERM\n")  # print() cannot be called again from within itself
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def started(line: list[str], *, stdout: int | IO = subprocess.PIPE, stderr: int | IO | None = None, env=None) -> Iterator:
    """A subprocess.Popen with text streams, in the repository's root. It ends when the block does, by SIGTERM and, if that does
    not help, by SIGKILL. On Linux it gets SIGTERM as well if this process is killed: torchrun passes it on to its own.
    """
    parent = os.getpid()
    before_exec = (lambda: end_with_parent(parent, signal.SIGTERM)) if prctl else None  # no thread may be started there
    streams = dict(stdout=stdout, stderr=stderr, encoding="utf-8", errors="replace")
    process = subprocess.Popen(line, cwd=ROOT, env=env, preexec_fn=before_exec, **streams)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def run(
    script: str,
    *arguments: object,
    processes: int = 1,
    env: dict[str, str] | None = None,
    check: bool = True,
    show: bool = False,
) -> Finished:
    """Run a script to its end, from the repository's root. UserError with its last words if it fails (unless check=False).
    show: what it prints goes to the terminal and is not returned.
    """
    began, line = time.perf_counter(), command(script, *arguments, processes=processes)
    with started(line, stdout=None if show else subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        stdout, stderr = process.communicate()
    if check and process.returncode:
        raise UserError(f"{script} ended with {process.returncode}: {last_words(stderr)}")
    return Finished(stdout or "", stderr, time.perf_counter() - began, process.returncode)


def read_log(run_dir: Path) -> tuple[list[dict], int]:
    """(records of a run's log.jsonl, how many lines are damaged): a run that is killed leaves half a line."""
    records, damaged = [], 0
    for line in read_bytes(run_dir / "log.jsonl", most=2**31).decode("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(record, dict):
            records.append(record)
    return records, damaged
