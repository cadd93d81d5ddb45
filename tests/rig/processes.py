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
    texts: dict[int, tuple[str, str]]  # rank -> (stdout, stderr)
    orphans: list[str]

    @property
    def out(self) -> str:
        return "".join(out for out, _ in self.texts.values())

    def errors(self) -> list[str]:
        """The "error: …" lines, each once, without the rank in front."""
        lines = [line for _, err in self.texts.values() for line in err.splitlines()]
        found = [line.partition("error: ")[2] for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
        return list(dict.fromkeys(found))

    def noise(self) -> list[str]:
        """All else on stderr, but for the log lines of torch's C++ and Python libraries ("[W1120 …]", "W1120 …")."""
        lines = [line for _, err in self.texts.values() for line in err.splitlines()]
        known = r"(\[rank \d+\] )?(error|WARNING): |\[[WEI]\d{4} |[WEI]\d{4} "
        return [line for line in lines if line.strip() and not re.match(known, line)]


class Process:
    """A command in a session of its own, with output in files; ranks > 1: under torchrun. prefix: before the command, to take
    rights away from it."""

    def __init__(
        self, folder: Path, command: list[str], ranks: int, env: dict[str, str | None], torchrun: list[str], prefix: list[str]
    ):
        self.mark, self.ranks = f"{time.time_ns()}-{random.getrandbits(32)}", ranks
        self.logs = folder / f"logs-{self.mark}"
        self.logs.mkdir()
        if ranks > 1:
            apart = ["--redirects=3", f"--log-dir={self.logs}"]
            starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *apart, *torchrun]
            command = [*starter, *command]
        own = os.environ | {"OMP_NUM_THREADS": "1", "NANOLADDER_FAULT": self.mark} | env
        streams = {name: open(self.logs / name, "wb") for name in ("stdout.log", "stderr.log")}
        self.began = time.monotonic()
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env={k: v for k, v in own.items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=streams["stdout.log"],
            stderr=streams["stderr.log"],
            start_new_session=True,
        )
        for stream in streams.values():
            stream.close()

    def family(self) -> dict[int, str]:
        """{process id: its rank, or ""} of all living processes with this one's mark."""
        found, mark = {}, f"NANOLADDER_FAULT={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to somebody else
                environment = (path / "environ").read_bytes().split(b"\0")  # empty of one that has ended and waits to be reaped
                if mark in environment:
                    ranks = [e[5:].decode() for e in environment if e.startswith(b"RANK=")]
                    found[int(path.name)] = "".join(ranks)
        return found

    def pid_of(self, rank: int) -> int:
        if self.ranks == 1:
            return self.popen.pid
        family = self.family()
        found = [pid for pid, r in sorted(family.items()) if r == str(rank)]
        need(found, f"there is no process {rank}, only {sorted(family.values())}: {self.last_words()}")
        return found[0]

    def texts(self) -> dict[int, tuple[str, str]]:
        """What each rank has printed so far; after a restart by torchrun, of all attempts."""

        def read(folder: Path) -> tuple[str, str]:
            files = (folder / name for name in ("stdout.log", "stderr.log"))
            return tuple(f.read_text(encoding="utf-8", errors="replace") if f.is_file() else "" for f in files)

        if self.ranks == 1:
            return {0: read(self.logs)}
        folders = sorted(self.logs.glob("*/attempt_*/*"))
        return {
            rank: tuple("".join(parts) for parts in zip(*(read(f) for f in folders if f.name == str(rank)), strict=True))
            for rank in sorted({int(f.name) for f in folders})
        }

    def wait(self, seconds: float = PATIENCE) -> Done:
        """Its end; Failed if it does not come. Then gives what it started 5 s to end as well."""
        try:
            status = self.popen.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            living, said = self.family(), self.last_words()
            self.kill()
            raise Failed(f"still running {seconds:.0f} s later ({len(living)} processes); last words: {said}") from None
        ended, deadline = time.monotonic(), time.monotonic() + 5
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        orphans = [f"process {pid} (rank {rank or '?'})" for pid, rank in left.items()]
        if orphans:
            self.kill()
        return Done(status, ended - self.began, self.texts(), orphans)

    def kill(self) -> None:
        """Kill it and all that it started."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until something is so; Failed if it does not become so, or if the process has ended before."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.popen.poll() is not None and not ready():
                raise Failed(f"ended with {self.popen.returncode} before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                self.kill()
                raise Failed(f"{seconds:.0f} s without {what}")
            time.sleep(0.002)

    def last_words(self) -> str:
        return " | ".join(line for _, err in self.texts().values() for line in err.splitlines()[-2:])[-300:]


def clean(done: Done, *words: str, within: float = PATIENCE) -> str:
    """Demand a clean failure (see the top) whose line holds all the words; returns the line."""
    need(done.status != 0, f"exit status 0, as if nothing had happened; stdout ends: {done.out[-200:]!r}")
    need(done.seconds <= within, f"took {done.seconds:.0f} s to fail")
    everything = "".join(out + err for out, err in done.texts.values())
    if "Traceback" in everything:
        last = [line for line in everything[everything.index("Traceback") :].splitlines() if line and not line.startswith(" ")]
        raise Failed(f"a traceback: {' '.join(last[1:2])[:300]}")
    need(len(done.errors()) == 1, f"{len(done.errors())} different error lines: {done.errors()} (status {done.status})")
    need(not done.noise(), f"more than one line on stderr: {done.noise()[:3]}")
    missing = [w for w in words if w not in done.errors()[0]]
    need(not missing, f"the line does not name {missing[0]!r}: {done.errors()[0]!r}" if missing else "")
    need(not done.orphans, f"left over: {done.orphans}")
    return done.errors()[0]
