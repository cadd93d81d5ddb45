"""Processes of a fault: started, watched, ended, judged.

A process and all that it starts carry a mark in their environment, by which whatever is left over is found. Under torchrun each
process's output goes to files of its own, so that torchrun's report, a traceback, does not count as ours.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from base.files import ROOT

PATIENCE = 60  # seconds in which a process that cannot continue must have ended
START = 10  # seconds that Python and torch may take to start, where several processes do so at once


class Failed(Exception):
    """A fault was not survived as it should have been; the message says how."""


def need(condition: object, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


@dataclass
class Done:
    """What a process, and those that it started, left behind."""

    status: int
    seconds: float
    out: str
    err: str
    orphans: list[str]

    def errors(self) -> list[str]:
        """The "error: …" lines, each once, without the rank in front."""
        return list(dict.fromkeys(re.findall(r"^(?:\[rank \d+\] )?error: (.*)", self.err, re.MULTILINE)))


class Process:
    """A command in a session of its own, with output in files; ranks > 1: under torchrun."""

    def __init__(self, folder: Path, command: list[str], ranks: int, env: dict[str, str | None]):
        self.mark, self.ranks = f"{time.time_ns()}-{random.getrandbits(32)}", ranks
        self.logs = folder / f"logs-{self.mark}"
        self.logs.mkdir()
        if ranks > 1:
            starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            command = [*starter, "--redirects=3", f"--log-dir={self.logs}", *command]
        own = os.environ | {"OMP_NUM_THREADS": "1", "NANOLADDER_FAULT": self.mark} | env
        self.began = time.monotonic()
        with open(self.logs / "stdout.log", "wb") as out, open(self.logs / "stderr.log", "wb") as err:
            how = dict(cwd=ROOT, env={k: v for k, v in own.items() if v is not None}, start_new_session=True)
            streams = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            self.popen = subprocess.Popen([sys.executable, *command], **how, **streams)

    def family(self) -> dict[int, str]:
        """{process id: its rank, or ""} of all living processes with this one's mark."""
        found, mark = {}, f"NANOLADDER_FAULT={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
                environment = (path / "environ").read_bytes().split(b"\0")  # empty of one that has ended and waits to be reaped
                if mark in environment:
                    found[int(path.name)] = "".join(e[5:].decode() for e in environment if e.startswith(b"RANK="))
        return found

    def pid_of(self, rank: int) -> int:
        found = [pid for pid, r in sorted(self.family().items()) if r == str(rank)]
        need(found, f"there is no process {rank}: {self.last_words()}")
        return found[0]

    def said(self) -> tuple[str, str]:
        """(stdout, stderr) so far, of all ranks one after another; after a restart by torchrun, of all attempts."""
        place = self.logs.glob if self.ranks == 1 else lambda name: self.logs.glob(f"*/attempt_*/*/{name}")
        files = (sorted(place(f"{name}.log")) for name in ("stdout", "stderr"))
        return tuple("".join(f.read_text(encoding="utf-8", errors="replace") for f in found) for found in files)

    def wait(self, seconds: float = PATIENCE) -> Done:
        """Its end; Failed if it does not come. Then gives what it started 5 s to end as well."""
        try:
            status = self.popen.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            said = f"{len(self.family())} processes; last words: {self.last_words()}"
            self.kill()
            raise Failed(f"still running {seconds:.0f} s later, {said}") from None
        ended, deadline = time.monotonic(), time.monotonic() + 5
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        orphans = [f"process {pid} (rank {rank or '?'})" for pid, rank in left.items()]
        if orphans:
            self.kill()
        return Done(status, ended - self.began, *self.said(), orphans)

    def kill(self) -> None:
        """Kill it and all that it started."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until something is so; Failed if it does not become so, or if the process has ended before."""
        deadline = time.monotonic() + 4 * PATIENCE
        while not ready():
            ended = self.popen.poll() is not None and not ready()
            need(not ended, f"ended with {self.popen.returncode} before {what}: {self.last_words()}")
            need(time.monotonic() < deadline, f"{4 * PATIENCE} s without {what}")
            time.sleep(0.002)

    def last_words(self) -> str:
        return " | ".join(self.said()[1].splitlines()[-2:])[-300:]


# on stderr beside our errors: warnings, and the log lines of torch's C++ and Python libraries ("[W1120 …]", "W1120 …")
KNOWN = re.compile(r"(\[rank \d+\] )?(error|WARNING): |\[?[WEI]\d{4} |\s*$")


def clean(done: Done, *words: str, within: float = PATIENCE) -> str:
    """Demand a clean failure (see runs.py) whose line holds all the words; returns the line."""
    need(done.status != 0, f"exit status 0, as if nothing had happened; stdout ends: {done.out[-200:]!r}")
    need(done.seconds <= within, f"took {done.seconds:.0f} s to fail")
    _, _, traceback = (done.out + done.err).partition("Traceback")
    need(not traceback, f"a traceback: {traceback.strip()[-300:]}")
    need(len(done.errors()) == 1, f"{len(done.errors())} different error lines: {done.errors()} (status {done.status})")
    noise = [line for line in done.err.splitlines() if not KNOWN.match(line)]
    need(not noise, f"more than one line on stderr: {noise[:3]}")
    (line,) = done.errors()
    missing = [word for word in words if word not in line]
    need(not missing, f"the line does not name {missing}: {line!r}")
    need(not done.orphans, f"left over: {done.orphans}")
    return line
