"""33 things that go wrong in training runs, each done for real to a small one on the CPU.

    python tests/faults.py                 all of them, and the matrix; writes results/faults.json
    python tests/faults.py F01 F11         only these, in detail
    python tests/faults.py --quick         the few that CI runs at every change, in one place each
    python tests/faults.py --matrix        kill and resume in {float32, bfloat16} x {eager, compiled} x {1, 2 processes}

Options: --out=FILE (where the JSON goes), --seed=N (other random places), --lanes=N (how many at a time; default: cores).

The processes are train.py and sample.py as anyone would type them, on 2 layers of width 32 and a text of 60,000 characters.
Only where a fault cannot be brought about from outside (a NaN, a flipped bit, a kill between two system calls) does the process
begin in this file, which arranges for it and then calls train.main(): see the last section. Two verdicts recur:

    clean   the process ends by itself, with a status that is not 0, within 60 s; what our processes print has no traceback
            and one "error: …" line, which names the file, step or process; checkpoints are as before; no process is left over
    G2      the resumed run is the uninterrupted one: loss, gradient norm and learning rate of every step are equal in hex,
            and the last parameters, moments, random states and data cursor in sha256 (prove.difference)

A process and all that it starts carry a mark in their environment: by it whatever is left over is found. Under torchrun each
process's output goes to files of its own, so that torchrun's report, a traceback, does not count as ours.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from base import system
from corpus import shards

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts are flat modules, not an installed package

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from base import errors
from base.errors import UserError  # noqa: E402
from base.files import sha256_of
from configurator import GPTConfig
from engine import checkpoint, machine, restore
from model import GPT
from safety import prove  # noqa: E402

PATIENCE = 60  # seconds in which a process that cannot go on must have ended
START = 10  # seconds that Python and torch may take to start, where several processes do so at once
STEPS = 24  # of a run, unless said otherwise


class Failed(Exception):
    """A fault was not survived as it should have been; the message says how."""


def need(condition: object, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


@dataclass
class Found:
    """What became of a fault, the worst of all tries."""

    detail: str
    passed: bool = True
    seconds_to_detect: float | None = None  # from the fault (a bad file: from the start) until who says so has ended
    steps_lost: int | None = None  # done before the fault, and done again
    seconds_to_recover: float | None = None  # from the start of the resumption until the run is where it was
    tries: int = 1
    seconds: float = 0.0  # that all of it took


@dataclass
class Fault:
    id: str
    title: str
    expected: str
    run: Callable[["Box"], Found]


FAULTS: dict[str, Fault] = {}
# what CI does at every change: one of saves, files, kills, signals, numbers, ranks, data, settings and machine each
QUICK = ("F01", "F05", "F06", "F11", "F13", "F18", "F22", "F26", "F29", "F31", "F33")


def fault(id: str, title: str, expected: str):
    """Registers a function as the fault `id`: it does what `title` says, and raises Failed unless `expected` holds."""

    def register(run: Callable[["Box"], Found]):
        FAULTS[id] = Fault(id, title, expected, run)
        return run

    return register


# ---- processes --------------------------------------------------------------------------------------------------------


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
        known = r"(\[rank \d+\] )?(error|WARNING): |\[[WEI]\d{4} |[WEI]\d{4} |passing over"
        return [line for line in lines if line.strip() and not re.match(known, line)]


class Process:
    """A command in a session of its own, with output in files; ranks > 1: under torchrun."""

    def __init__(self, box: "Box", command: list[str], ranks: int, env: dict[str, str | None], torchrun: list[str]):
        self.mark, self.ranks = f"{time.time_ns()}-{random.getrandbits(32)}", ranks
        self.logs = box.folder / f"logs-{self.mark}"
        self.logs.mkdir()
        if ranks > 1:
            apart = ["--redirects=3", f"--log-dir={self.logs}"]
            starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *apart, *torchrun]
            command = [*starter, *command]
        own = os.environ | {"OMP_NUM_THREADS": "1", "NANOLADDER_FAULT": self.mark} | env
        streams = {name: open(self.logs / name, "wb") for name in ("stdout.log", "stderr.log")}
        self.began = time.monotonic()
        self.popen = subprocess.Popen(
            [*box.prefix, sys.executable, *command],
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
            living = self.family()
            said = " | ".join(line for _, err in self.texts().values() for line in err.splitlines()[-3:])
            self.kill()
            raise Failed(f"still running {seconds:.0f} s later ({len(living)} processes); last words: {said[-300:]}") from None
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


# ---- runs -------------------------------------------------------------------------------------------------------------

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1, batch_size=4, tokens_per_step=256)
TINY |= dict(learning_rate=1e-2, min_lr=1e-3, warmup_steps=2, device="cpu", dtype="float32", compile=False)
TINY |= dict(reuse_memory=False, deterministic=True, dataset="tiny", max_steps=STEPS, eval_tokens=1000)
TINY |= dict(checkpoint_interval=4, eval_interval=8, log_interval=8)


def last_step(out: Path) -> int:
    """The last step in a run's log; 0 if there is none."""
    try:
        content = (out / "log.jsonl").read_bytes()
    except OSError:
        return 0
    found = re.findall(rb'^\{"step": (\d+), "loss".*\}\n', content, re.MULTILINE)
    return int(found[-1]) if found else 0


def steps_saved(out: Path) -> list[int]:
    """The steps of a run's checkpoints that verify, oldest first."""
    found = []
    for folder in reversed(checkpoint.candidates(out)):
        with contextlib.suppress(UserError):
            restore.verify(folder)
            found.append(int(folder.name.removeprefix("step_")))
    return found


def digests(out: Path) -> dict[str, str]:
    """{checkpoint: digest of what it goes on from} of all checkpoints of a run, each of which must verify."""
    for folder in checkpoint.candidates(out):
        restore.verify(folder)
    return {folder.name: prove.digest(folder) for folder in checkpoint.candidates(out)}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def seal(folder: Path) -> None:
    """Make a checkpoint's manifest fit its files, as a forger would."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    files = [p for p in sorted(folder.iterdir()) if p != path]
    values["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    path.write_text(json.dumps(values))


def seal_data(folder: Path) -> None:
    """The same for a data set."""
    path = folder / shards.MANIFEST
    values = json.loads(path.read_text())
    for entry in itertools.chain(*values["splits"].values()):
        if (folder / entry["file"]).is_file():
            entry["sha256"] = sha256_of(folder / entry["file"])
    path.write_text(json.dumps(values))


class Stage:
    """What all faults share: a prepared data set, and runs that nothing interrupted, made when first asked for."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="faults_"))
        self.locks: dict[object, threading.Lock] = {}
        self.lock = threading.Lock()
        self.data = self.folder / "data"
        self.prepare(self.data)

    def text(self) -> str:
        """60,000 characters with something to learn in them."""
        words = ["the", "cat", "sat", "on", "a", "mat,", "ran", "after", "its", "tail", "and", "fell.\n"]
        return " ".join(random.Random(0).choices(words, k=18_000))[:60_000]

    def prepare(self, where: Path, change: Callable[[str], str] = lambda text: text) -> None:
        """A data set "tiny" in the folder `where`, made by prepare_data.py, one id per character."""
        where.mkdir()
        (where / "tiny.txt").write_text(change(self.text()))
        command = [sys.executable, "prepare_data.py", str(where / "tiny.txt"), "--tokenizer=char", f"--data_dir={where}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        need(done.returncode == 0, f"prepare_data.py: {done.stderr}")

    @property
    def vocab_size(self) -> int:
        return len(set(self.text()))

    def once(self, key: object, make: Callable[[Path], None]) -> Path:
        """A folder that `make` fills the first time it is asked for by its key."""
        folder = self.folder / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        with self.lock:
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if not folder.exists():
                make(folder)
        return folder

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Box:
    """Where one fault happens: its own folder and random places, and what was measured so far."""

    def __init__(self, stage: Stage, name: str, quick: bool = False, seed: int = 1337):
        self.stage, self.name, self.quick = stage, name, quick
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=stage.folder))
        self.random = random.Random(f"{seed} {name}")
        self.prefix: list[str] = []  # before the command, to take rights away
        self.detect: list[float] = []
        self.lost: list[int] = []
        self.recover: list[float] = []
        self.tries = 0
        self.processes: list[Process] = []

    def some(self, cases: Iterable, at_least: int = 1) -> Iterator:
        """The cases, counted as tries; in a quick test the first only."""
        for case in list(cases)[: at_least if self.quick else None]:
            self.tries += 1
            yield case

    def found(self, detail: str) -> Found:
        worst = [max(values, default=None) for values in (self.detect, self.lost, self.recover)]
        return Found(detail, True, *worst, tries=max(self.tries, 1))

    def flags(self, out: Path, **changes) -> list[str]:
        settings = TINY | dict(vocab_size=self.stage.vocab_size, data_dir=str(self.stage.data), out_dir=str(out)) | changes
        return [f"--{name}={value}" for name, value in settings.items()]

    def start(
        self,
        command: list[str],
        ranks: int = 1,
        env: dict[str, str | None] | None = None,
        torchrun: Iterable[str] = (),
    ) -> Process:
        process = Process(self, command, ranks, env or {}, list(torchrun))
        self.processes.append(process)
        return process

    def train(self, out: Path, ranks: int = 1, inject: Iterable[str] = (), env=None, torchrun=(), **changes) -> Process:
        """Start train.py, through this file if something has to be arranged in it."""
        arranged = [f"--inject={what}" for what in inject]
        script = ["tests/faults.py", *arranged, "--"] if arranged else ["train.py"]
        return self.start([*script, *self.flags(out, **changes)], ranks, env, torchrun)

    def trained(self, out: Path, ranks: int = 1, seconds: float = 2 * PATIENCE, **how) -> Done:
        """A run that must come to its end."""
        process = self.train(out, ranks, **how)
        done = process.wait(seconds)
        need(done.status == 0, f"a run that should have ended well ended with {done.status}: {process.last_words()}")
        need(not done.orphans, f"left over by a run that ended well: {done.orphans}")
        return done

    def whole(self, ranks: int = 1, **changes) -> Path:
        """The folder of a run that nothing interrupts, with all its checkpoints."""
        key = (ranks, *sorted(changes.items()))
        return self.stage.once(key, lambda out: self.trained(out, ranks, keep_checkpoints=1000, **changes))

    def copy_of(self, out: Path, name: str, upto: int) -> Path:
        """A run as it would look if it had ended at the checkpoint of step `upto`."""
        mine = self.folder / name
        shutil.copytree(out, mine)
        for folder in checkpoint.candidates(mine):
            if int(folder.name.removeprefix("step_")) > upto:
                shutil.rmtree(folder)
        lines = (mine / "log.jsonl").read_text().splitlines(keepends=True)
        (mine / "log.jsonl").write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= upto))
        return mine

    def resumed(self, out: Path, like: Path, ranks: int = 1, **changes) -> Done:
        """Resume a run, and demand G2. Notes the steps lost and the time until they were done again.

        With resume="auto" it may have been killed before its first save was done, and begins anew.
        """
        was = last_step(out)
        kept = max(steps_saved(out), default=0)
        size = (out / "log.jsonl").stat().st_size
        process = self.train(out, ranks, **{"resume": True} | changes)
        steps = changes.get("max_steps", STEPS)

        def caught_up() -> bool:
            path = out / "log.jsonl"
            return path.stat().st_size > size and last_step(out) >= min(was + 1, steps)

        if was < steps:
            process.until(caught_up, f"step {was + 1} of the resumption")
            self.recover.append(time.monotonic() - process.began)
        done = process.wait(2 * PATIENCE)
        need(done.status == 0, f"the resumption ended with {done.status}: {process.last_words()}")
        need(not done.orphans, f"left over by the resumption: {done.orphans}")
        self.lost.append(was - kept)
        self.same(like, out)
        left = sorted(p.name for p in out.iterdir() if p.name.startswith((".writing", ".replaced")))
        need(not left, f"not cleaned up: {left}")
        return done

    def same(self, like: Path, out: Path) -> None:
        """Demand G2 of a run that has ended."""
        difference = prove.difference(like, out)
        need(difference is None, f"NOT G2: {difference}")

    def fails(self, process: Process, *words: str, within: float = PATIENCE, since: float | None = None) -> str:
        """Demand a clean failure of a process, and note how long it took."""
        done = process.wait(within)
        line = clean(done, *words, within=within)
        self.detect.append(time.monotonic() - since if since else done.seconds)
        return line

    def refused(self, out: Path, *words: str, ranks: int = 1, **how) -> str:
        """Demand that train.py refuses to begin, and leaves the run's checkpoints as they are."""
        before = {p: prove.digest(p) for p in checkpoint.candidates(out)}
        process = self.train(out, ranks, **how)
        line = self.fails(process, *words)
        need("| loss" not in "".join(o for o, _ in process.texts().values()), "steps were done before it was found")
        need({p: prove.digest(p) for p in checkpoint.candidates(out)} == before, "checkpoints were changed")
        return line

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- saving -----------------------------------------------------------------------------------------------------------


@fault("F01", "SIGKILL in a save, at 10 byte offsets, and in the first save", "the newest complete checkpoint loads, G2")
def killed_while_saving(box: Box) -> Found:
    whole = box.whole()
    first = whole / "step_00000004"
    size = sum(p.stat().st_size for p in first.glob("*.safetensors"))
    parts = [0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.99, 1.0]
    offsets = [size + max(1, int(part * size)) for part in parts]
    box.random.shuffle(offsets)
    for offset in box.some([*offsets, size // 2]):
        out = box.folder / str(offset)
        done = box.start(["prove.py", f"--kill_at_byte={offset}", "--", *box.flags(out)]).wait()
        need(done.status == -signal.SIGKILL, f"was not killed at byte {offset}: status {done.status}")
        if offset > size:
            need(steps_saved(out) == [4], f"byte {offset}: {steps_saved(out)} are saved, not [4]")
            need(digests(out)[first.name] == prove.digest(first), f"byte {offset}: step 4 is not what was saved")
        box.resumed(out, whole, resume="auto")
    return box.found(f"{box.tries} of {box.tries}: the save before loads, the resumed run is bit for bit the same")


@fault("F02", "SIGKILL before each fsync, rename and removal of a save", "as F01, and leftovers are cleaned up")
def killed_between_system_calls(box: Box) -> Found:
    """The third save, which removes the first one; and the save of a step that is there already, but damaged."""
    whole = box.whole()

    def calls_of(out: Path, step: int, **how) -> list[str]:
        """The system calls of a save, by letting one happen."""
        box.train(out, inject=[f"die_before=0,{step},{out}.calls"], **how).wait()
        return Path(f"{out}.calls").read_text().split()

    def die(out: Path, n: int, step: int, **how) -> None:
        done = box.train(out, inject=[f"die_before={n},{step},{out}.calls"], **how).wait()
        need(done.status == -signal.SIGKILL, f"was not killed before call {n}: status {done.status}")

    few = dict(keep_checkpoints=1, keep_best=False)
    calls = calls_of(box.folder / "count", 12, max_steps=STEPS, **few)
    need("rename" in calls and "fsync" in calls and "rmdir" in calls, f"the save of step 12 does {calls}")
    removals = [n for n, name in enumerate(calls) if name in ("unlink", "rmdir")]
    chosen = [n + 1 for n in range(len(calls)) if n not in removals[1:-1]]
    box.random.shuffle(chosen)
    for n in box.some(chosen):
        out = box.folder / f"call_{n}"
        die(out, n, 12, **few)
        need(steps_saved(out) in ([8], [12], [8, 12]), f"before {calls[n - 1]} {n}: {steps_saved(out)} are saved")
        for step in steps_saved(out):
            name = checkpoint.step_name(step)
            need(prove.digest(out / name) == prove.digest(whole / name), f"before {calls[n - 1]} {n}: {name} has changed")
        box.resumed(out, whole, **few)

    again = dict(resume=True, max_steps=STEPS, keep_checkpoints=3, keep_best=False)

    def damaged(name: str) -> Path:
        out = box.copy_of(whole, name, upto=12)
        with open(out / "step_00000012" / "model.safetensors", "r+b") as f:
            f.truncate(1000)
        return out

    calls = calls_of(damaged("count_again"), 12, **again)
    renames = [n + 1 for n, name in enumerate(calls) if name == "rename"]
    need(len(renames) == 2, f"the save over a damaged step does {calls}")
    for n in box.some([renames[0], renames[1], renames[1] + 1, renames[1] + 3]):
        out = damaged(f"again_{n}")
        die(out, n, 12, **again)
        need(8 in steps_saved(out), f"over a damaged step, before call {n}: {steps_saved(out)} are saved")
        box.resumed(out, whole, keep_checkpoints=3, keep_best=False)
    return box.found(f"killed before {box.tries} calls ({', '.join(sorted(set(calls)))}); nothing lost, nothing left over")


@fault("F03", "disk full: for a save, the last save, the log", "a warning or a clean failure, old checkpoint intact; then G2")
def disk_full(box: Box) -> Found:
    """The kernel refuses to let a file grow: beyond 20 KB, so that no checkpoint fits; beyond the log, so that no step does."""
    whole = box.whole()
    for most, words in box.some([(20_000, "cannot save a checkpoint"), (None, "log.jsonl")]):
        out = box.copy_of(whole, f"at_{most}", upto=8)
        before = digests(out)
        limit = most or (out / "log.jsonl").stat().st_size + 2500
        process = box.train(out, resume=True)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, limit))
        done = process.wait()
        if most:
            warned = done.texts[0][1].count("WARNING: cannot save")
            need(warned >= 3, f"{warned} warnings while training went on: {done.texts[0][1][-300:]}")
        clean(done, words)
        need(digests(out) == before, "the earlier checkpoints have changed")
        box.detect.append(done.seconds)
        box.resumed(out, whole)
    return box.found("training goes on with a warning, a final save that fails is an error; the earlier checkpoints are intact")


@fault("F04", "newest checkpoint truncated to 25, 50, 99%", "refused, falls back to the one before aloud, G2")
def truncated(box: Box) -> Found:
    whole = box.whole()
    files = ["model.safetensors", "training.safetensors"]
    for name, percent in box.some(itertools.product(files, (25, 50, 99))):
        out = box.copy_of(whole, f"{name}_{percent}", upto=16)
        path = out / "step_00000016" / name
        os.truncate(path, path.stat().st_size * percent // 100)
        done = box.resumed(out, whole)
        said = [line for line in done.out.splitlines() if "passing over" in line]
        need(len(said) == 1 and str(path) in said[0], f"it did not say which checkpoint it passes over: {said}")
    return box.found(f"{box.tries} of {box.tries} refused by name, the one before was taken")


@fault("F05", "one bit of a checkpoint flipped, at 100 places", "100 of 100 refused")
def bit_flipped(box: Box) -> Found:
    """Places in all of its files alike; then three of them before train.py --resume and sample.py."""
    out = box.copy_of(box.whole(), "flipped", upto=4)
    folder = out / "step_00000004"
    files = sorted(folder.iterdir())
    accepted = []

    def flip(path: Path, at: int, bit: int) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1 << bit
        path.write_bytes(content)

    for k in range(100):
        box.tries += 1
        path = files[k % len(files)]
        place = path, box.random.randrange(path.stat().st_size), box.random.randrange(8)
        flip(*place)
        try:
            restore.verify(folder)
            accepted.append(f"{path.name}, byte {place[1]}, bit {place[2]}")
        except UserError:
            pass
        flip(*place)
    restore.verify(folder)
    need(not accepted, f"{len(accepted)} of 100 were accepted: {'; '.join(accepted[:5])}")
    for path in box.some(files[:3]):
        place = path, box.random.randrange(path.stat().st_size), box.random.randrange(8)
        flip(*place)
        box.fails(box.start(["sample.py", str(folder), "--max_new_tokens=3"]), path.name)
        box.fails(box.train(out, resume=True), "none of its 1 checkpoint(s) is usable")
        flip(*place)
    return box.found("100 of 100 refused, and by train.py --resume and sample.py")


@dataclass
class Bomb:
    """Whoever unpickles it makes a folder."""

    marker: str

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@fault(
    "F06", "a malicious pickle as weights, moments, tokenizer, config, shard, weights of Hugging Face", "refused, nothing run"
)
def malicious_pickle(box: Box) -> Found:
    bomb = Bomb(str(box.folder / "ran"))
    whole = box.whole()
    cases = [(name, how) for how in ("torch", "pickle") for name in ("model.safetensors", "training.safetensors")]
    cases += [("tokenizer.json", "pickle"), ("config.json", "pickle")]

    def plant(path: Path, how: str) -> None:
        if how == "torch":
            torch.save(bomb, path)
        else:
            path.write_bytes(pickle.dumps(bomb, 0))

    for name, how in box.some(cases):
        out = box.copy_of(whole, f"{how}_{name}", upto=4)
        folder = out / "step_00000004"
        plant(folder / name, how)
        seal(folder)
        if name != "training.safetensors":
            box.fails(box.start(["sample.py", str(folder), "--max_new_tokens=3"]), name)
        if name != "tokenizer.json":  # a run takes its tokenizer from its data
            box.fails(box.train(out, resume=True), name)
    for name in box.some(["tokenizer.json", "train_000000.bin"]):
        where = box.folder / f"data_{name}"
        shutil.copytree(box.stage.data, where)
        plant(where / "tiny" / name, "pickle")
        seal_data(where / "tiny")
        box.refused(box.folder / "none", "tokenizer.json" if name == "tokenizer.json" else name, data_dir=str(where))
    for _ in box.some(["hf"]):
        hf = box.folder / "hf"
        hf.mkdir()
        sizes = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=50257, n_positions=8)
        (hf / "config.json").write_text(json.dumps(dict(model_type="gpt2") | sizes))
        torch.save(bomb, hf / "pytorch_model.bin")
        box.fails(box.start(["sample.py", str(hf)]), "never opened")
    need(not Path(bomb.marker).exists(), "the pickle was run")
    return box.found(f"{box.tries} of {box.tries} refused by name, nothing was run")


@fault("F07", "a tensor of a checkpoint is missing, extra, of another shape or dtype", "clean failure that names file and key")
def wrong_tensors(box: Box) -> Found:
    """In a checkpoint that is consistent in itself: its manifest is made to fit."""
    files = {"model.safetensors": "transformer.h.0.mlp.c_fc.weight", "training.safetensors": "exp_avg.transformer.ln_f.weight"}
    changes = {
        "missing": lambda t, k: t.pop(k),
        "does not belong": lambda t, k: t.update({k + ".more": torch.zeros(2)}),
        "shape": lambda t, k: t.update({k: torch.zeros(3, 5)}),
        "int64": lambda t, k: t.update({k: t[k].long()}),
    }
    for (name, key), (word, change) in box.some(itertools.product(files.items(), changes.items())):
        out = box.copy_of(box.whole(), f"{name}_{word}", upto=4)
        path = out / "step_00000004" / name
        tensors = safetensors.torch.load_file(path)
        change(tensors, key)
        safetensors.torch.save_file(tensors, path)
        seal(path.parent)
        box.refused(out, name, key, word, resume=True)
    return box.found(f"{box.tries} of {box.tries} named")


@fault("F08", "unknown format version of checkpoint or data", "clean failure that names it")
def unknown_version(box: Box) -> Found:
    out = box.copy_of(box.whole(), "version", upto=4)
    path = out / "step_00000004" / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    for command in box.some([["sample.py", str(path.parent)]]):
        box.fails(box.start(command), "checkpoint format 99", f"reads {checkpoint.FORMAT}")
    for _ in box.some(["resume"]):
        process = box.train(out, resume=True)
        box.fails(process, "none of its 1 checkpoint(s) is usable")
        need("checkpoint format 99" in process.wait().out, "the resumption does not say why")
    for name in box.some([shards.MANIFEST, "val_000000.bin"]):
        where = box.folder / f"data_{name}"
        shutil.copytree(box.stage.data, where)
        content = (where / "tiny" / name).read_bytes()
        changed = content.replace(b'"version": 1', b'"version": 99', 1) if name == shards.MANIFEST else None
        (where / "tiny" / name).write_bytes(changed or content[:8] + struct.pack("<I", 99) + content[12:])
        box.refused(box.folder / "none", name, "version 99", data_dir=str(where))
    return box.found(f"{box.tries} of {box.tries} refused with both versions named")


@fault(
    "F09", "two writers, one out_dir: a second run, a resumption, three at once", "the second is refused, the first is whole"
)
def two_writers(box: Box) -> Found:
    steps = dict(max_steps=1500, checkpoint_interval=300, eval_interval=500)
    whole = box.whole(**steps)
    for resume in box.some([False, True, "auto"]):
        out = box.folder / f"resume_{resume}"
        writer = box.train(out, **steps)
        writer.until(lambda out=out: last_step(out) >= 310, "step 310")
        box.fails(box.train(out, resume=resume, **steps), "another process is training in", str(out))
        need(writer.popen.poll() is None, "the first run had ended before the second was refused: nothing was tested")
        need(writer.wait(2 * PATIENCE).status == 0, "the first run was disturbed")
        box.same(whole, out)
        need(not list(box.folder.glob(f"{out.name}.*")), "the first run's folder was moved")
    for _ in box.some(["at once"]):
        out = box.folder / "at_once"
        writers = [box.train(out, **steps) for _ in range(3)]
        ends = [w.wait(2 * PATIENCE) for w in writers]
        need(sorted(e.status for e in ends) == [0, 2, 2], f"three at once ended with {[e.status for e in ends]}")
        for end in ends:
            if end.status:
                clean(end, str(out), within=2 * PATIENCE)
        box.same(whole, out)
    return box.found("refused by name; of three that start at once, one runs")


@fault("F10", "out_dir is read-only, on a read-only file system, or below a file", "found before step 1")
def read_only(box: Box) -> Found:
    out = box.copy_of(box.whole(), "kept", upto=8)
    (box.folder / "file").write_text("")
    box.refused(box.folder / "file" / "run", "cannot write to out_dir")
    box.refused(Path("/proc/nanoladder"), "cannot write to out_dir")
    box.refused(Path("/proc/nanoladder"), "cannot write to out_dir", ranks=2)
    box.tries += 5
    locked = box.folder / "locked"
    locked.mkdir()
    folders = [locked, *(p for p in [out, *out.rglob("*")] if p.is_dir())]
    if os.geteuid() == 0:  # root may write anywhere: give up that right (capability 1, CAP_DAC_OVERRIDE)
        give_up = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) and sys.exit(99)"
        box.prefix = [sys.executable, "-c", f"{give_up}; os.execv(sys.argv[1], sys.argv[1:])"]
    try:
        for folder in folders:
            folder.chmod(0o555)
        box.refused(locked / "run", "cannot write to out_dir")
        box.refused(out, "cannot write to out_dir", resume=True)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    return box.found(f"{box.tries} of {box.tries} refused before step 1, also on resuming")


# ---- killing ----------------------------------------------------------------------------------------------------------


@fault("F11", "SIGKILL at 20 random moments of one run", "G2 after each of them")
def killed_anywhere(box: Box) -> Found:
    """Each time resumed from what the kill before has left: 20 kills, one run. What is saved is looked at after each kill."""
    steps = dict(max_steps=60 if box.quick else 340, checkpoint_interval=3, eval_interval=10)
    whole, out = box.whole(**steps), box.folder / "run"
    expected, at, kills = prove.trajectory(whole), 0, []
    for _ in box.some(range(20), at_least=2):
        process = box.train(out, resume="auto", **steps)
        goal = at + box.random.randint(4, 17)
        if kills:
            process.until(lambda before=at: last_step(out) > before, f"step {at + 1}")
            box.recover.append(time.monotonic() - process.began)
        process.until(lambda goal=goal: last_step(out) >= goal, f"step {goal}")
        time.sleep(box.random.uniform(0, 0.03))
        process.kill()
        (out / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes().rpartition(b"\n")[0] + b"\n")
        at = last_step(out)
        kills.append(at)
        found = prove.trajectory(out)
        wrong = [step for step in found if found[step] != expected[step]]
        need(not wrong, f"NOT G2: killed at {kills}; then step {wrong[:1]} differs")
        kept = steps_saved(out)  # none, if it was killed before the first save was done
        for step in kept:
            name = checkpoint.step_name(step)
            need(prove.digest(out / name) == prove.digest(whole / name), f"NOT G2: killed at {kills}; then {name} differs")
        box.lost.append(at - max(kept, default=0))
    box.resumed(out, whole, resume="auto", **steps)
    return box.found(f"{box.tries} of {box.tries}, killed after steps {', '.join(map(str, kills))}")


@fault("F12", "SIGKILL of process 1 of 2", "the other is out within 60 s; --resume and --max-restarts give G2")
def one_of_two_killed(box: Box) -> Found:
    steps = dict(max_steps=300, checkpoint_interval=20, eval_interval=100)
    whole = box.whole(ranks=2, **steps)
    goals = box.random.sample(range(25, 200), 3)

    def killed(out: Path, goal: int, **how) -> tuple[Process, float]:
        process = box.train(out, ranks=2, **steps, **how)
        process.until(lambda: last_step(out) >= 1, "step 1")
        victim = process.pid_of(1)
        process.until(lambda: last_step(out) >= goal, f"step {goal}")
        time.sleep(box.random.uniform(0, 0.02))
        os.kill(victim, signal.SIGKILL)
        return process, time.monotonic()

    for goal in box.some(goals):
        out = box.folder / f"at_{goal}"
        process, since = killed(out, goal)
        box.fails(process, "after step ", "another process has gone", since=since)
        digests(out)
        box.resumed(out, whole, ranks=2, resume="auto", **steps)
    for goal in box.some(goals[:1]):
        out = box.folder / "restarted"
        process, since = killed(out, goal, torchrun=["--max-restarts=1"])
        done = process.wait(2 * PATIENCE)
        need(done.status == 0, f"torchrun --max-restarts=1 ended with {done.status}: {process.last_words()}")
        need(not done.orphans, f"left over: {done.orphans}")
        box.same(whole, out)
    return box.found("the other ends by itself; resumed by hand, and by torchrun --max-restarts=1, it is the same run")


@fault("F13", "SIGTERM, SIGINT; 1 and 2 processes (to torchrun, to one process)", "saved, out within 30 s, 0 steps lost, G2")
def signalled(box: Box) -> Found:
    """One run each, stopped three times at random moments."""
    steps = dict(max_steps=200, checkpoint_interval=1000, eval_interval=50)
    places = [("SIGTERM", 1, None), ("SIGINT", 1, None), ("SIGTERM", 2, None), ("SIGINT", 2, None), ("SIGTERM", 2, 1)]
    for name, ranks, to in places[: 1 if box.quick else None]:
        whole, out = box.whole(ranks, **steps), box.folder / f"{name}_{ranks}_{to}"
        at = 0
        for _ in box.some(range(3) if to is None else range(1)):
            process = box.train(out, ranks, resume="auto", **steps)
            goal = at + box.random.randint(2, 40)
            process.until(lambda goal=at + 1, out=out: last_step(out) >= goal, f"step {at + 1}")
            victim = process.popen.pid if to is None else process.pid_of(to)
            process.until(lambda goal=goal, out=out: last_step(out) >= goal, f"step {goal}")
            time.sleep(box.random.uniform(0, 0.02))
            since = time.monotonic()
            os.kill(victim, getattr(signal, name))
            done = process.wait(30)
            box.detect.append(time.monotonic() - since)
            if ranks == 1:
                need(done.status == 128 + getattr(signal, name), f"exit status {done.status}")
            need(not done.orphans, f"left over: {done.orphans}")
            words = "".join(err for _, err in done.texts.values())
            need("Traceback" not in words and not done.errors(), f"it said {words[-300:]!r}")
            at = last_step(out)
            need(steps_saved(out)[-1:] == [at], f"{name} after step {at}: {steps_saved(out)} are saved")
            box.lost.append(at - steps_saved(out)[-1])
        box.resumed(out, whole, ranks, **steps)
    return box.found(f"{box.tries} of {box.tries} saved the very step and resumed to the same run")


@fault("F14", "resumed on 1 process after 2, on 2 after 1", "the same tokens in each step, losses within 1e-5 (relative)")
def other_number_of_processes(box: Box) -> Found:
    same = dict(dropout=0.0, batch_size=2, learning_rate=1e-3, min_lr=1e-4)
    worst = 0.0
    for before, after in box.some([(2, 1), (1, 2)]):
        whole = box.whole(before, **same)
        out = box.copy_of(whole, f"{before}_to_{after}", upto=12)
        box.trained(out, after, resume=True, **same)
        expected, found = ({r["step"]: r["loss"] for r in log(o) if "loss" in r} for o in (whole, out))
        need(max(found) == STEPS, f"the run ended at step {max(found)}")
        worst = max([worst] + [abs(found[s] / expected[s] - 1) for s in expected])
        need(worst <= 1e-5, f"{before} to {after}: a loss is {worst:.1e} off")
        saved = [json.loads((o / "step_00000024" / "training.json").read_text())["sequences_seen"] for o in (whole, out)]
        need(saved[0] == saved[1], f"data cursors {saved}")
    stream = shards.open_dataset(box.stage.data / "tiny").split("train")
    batches = data.TrainBatches(stream, 32, 1337, "shuffled")

    def tokens(step: int, ranks: int) -> list:
        cuts = [batches.batch(step, micro, 2, 4 // ranks, rank, ranks) for micro in range(4 // ranks) for rank in range(ranks)]
        return torch.cat([x for x, _ in cuts]).tolist()

    need(all(tokens(s, 1) == tokens(s, 2) == tokens(s, 4) for s in range(300)), "1, 2 and 4 processes see different tokens")
    return box.found(f"largest relative difference of a loss {worst:.0e}; 300 steps have the same tokens on 1, 2 and 4")


@fault("F15", "SIGKILL between two micro-batches of a step", "G2")
def killed_inside_accumulation(box: Box) -> Found:
    """8 micro-batches a step on one process, 4 each on two."""
    many = dict(batch_size=1)
    for ranks, per_step in ((1, 8), (2, 4)):
        whole = box.whole(ranks, **many)
        places = zip(box.random.sample(range(6, STEPS), 3), box.random.choices(range(1, per_step), k=3), strict=True)
        for step, micro in box.some(places):
            out = box.folder / f"{ranks}_{step}_{micro}"
            done = box.train(out, ranks, inject=[f"die_inside={step},{micro}"], **many).wait()
            need(done.status != 0 and last_step(out) == step, f"was not killed in step {step + 1}: at {last_step(out)}")
            need(not done.orphans, f"left over: {done.orphans}")
            box.resumed(out, whole, ranks, resume="auto", **many)
    return box.found(f"{box.tries} of {box.tries}, of steps of 8 and of 2 x 4 micro-batches")


@fault("F16", "other intervals of validation, samples, log lines, checkpoints", "every step equal in hex, and the last weights")
def other_intervals(box: Box) -> Found:
    whole = box.whole()
    cases = [dict(eval_interval=3), dict(log_interval=1), dict(checkpoint_interval=5, background_save=False)]
    cases += [dict(sample_interval=4), dict(eval_interval=1, sample_interval=1, log_interval=3, checkpoint_interval=1)]
    for n, changes in enumerate(box.some(cases)):
        out = box.folder / str(n)
        box.trained(out, **changes)
        need(prove.trajectory(out) == prove.trajectory(whole), f"{changes} changes the trajectory")
        for name in ("model.safetensors", "training.safetensors"):
            both = [sha256_of(o / "step_00000024" / name) for o in (out, whole)]
            need(both[0] == both[1], f"{changes} changes {name}")
    return box.found(f"{box.tries} of {box.tries} the same: moments and random states as well")


@fault("F17", "resumed with another configuration", "differences are shown, what does not fit is refused")
def other_configuration(box: Box) -> Found:
    whole = box.whole()
    refused = [dict(n_layer=1), dict(n_embd=64), dict(tie_weights=False), dict(block_size=16), dict(bias=False)]
    for changes in box.some(refused):
        (name, value), *_ = changes.items()
        out = box.copy_of(whole, f"refused_{name}", upto=8)
        box.refused(out, name, str(value), "type --" + name, resume=True, **changes)
    shown = [dict(learning_rate=5e-3), dict(batch_size=8), dict(seed=7), dict(tokens_per_step=512), dict(max_steps=12)]
    for changes in box.some(shown):
        (name, value), *_ = changes.items()
        out = box.copy_of(whole, f"shown_{name}", upto=8)
        done = box.trained(out, resume=True, **changes)
        need(f"resuming with {name} = {value!r} (was {TINY.get(name, 1337)!r})" in done.out, f"{changes} was not shown")
    return box.found(f"{len(refused)} refused with what to type, {len(shown)} shown")


# ---- numbers ----------------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> str:
    return sha256_of(folder / "model.safetensors")


@fault("F18", "NaN in the loss, in a gradient", "stops before the update, weights unchanged, names step and module")
def not_a_number(box: Box) -> Found:
    """At a random step each time. The crash capsule's weights are those of the uninterrupted run before that step."""
    each = dict(checkpoint_interval=1)
    whole = box.whole(**each)
    cases = [(what, step) for what in ("loss", "gradient") for step in box.random.sample(range(2, STEPS), 3)]
    replayed = set()
    for what, step in box.some(cases):
        out = box.folder / f"{what}_{step}"
        process = box.train(out, inject=[f"nan={what},{step},0"], **each)
        line = box.fails(process, f"step {step + 1}: the {what}", "the parameters are those before the step", "h.1.mlp")
        capsule = out / f"crash_{step + 1:08d}"
        need(str(capsule) in line, f"the line does not name the capsule: {line}")
        before = checkpoint.step_name(step)
        need(weights_of(capsule) == weights_of(whole / before), "the weights are not those before the step")
        need(steps_saved(out)[-1] == step and prove.digest(out / before) == prove.digest(whole / before), "checkpoints differ")
        if what not in replayed:
            replayed.add(what)
            again = box.start(["train.py", "--replay", str(capsule)]).wait()
            said = again.texts[0][1][-200:]
            need(again.status == 0 and "the step is fine" in again.out, f"the capsule does not replay: {said}")
        box.resumed(out, whole, **each)
    return box.found(f"{box.tries} of {box.tries}: stopped before the update, the module is named, the capsule runs again")


@fault("F19", "NaN on one process of 2", "both stop, no hang, the process is named")
def not_a_number_on_one(box: Box) -> Found:
    each = dict(checkpoint_interval=1)
    whole = box.whole(2, **each)
    for what, rank in box.some([("loss", 1), ("gradient", 1), ("loss", 0)]):
        step = box.random.randrange(2, STEPS)
        out = box.folder / f"{what}_{rank}"
        process = box.train(out, 2, inject=[f"nan={what},{step},{rank}"], **each)
        box.fails(process, f"step {step + 1}: the ", "h.1.mlp", f"in process {rank}")
        weights = [weights_of(folder) for folder in (out / f"crash_{step + 1:08d}", whole / checkpoint.step_name(step))]
        need(weights[0] == weights[1], "the weights are not those before the step")
        box.resumed(out, whole, 2, **each)
    return box.found(f"{box.tries} of {box.tries}: both stop before the update; the line says in which process it began")


@fault("F20", "a loss or gradient norm far out", "flagged and counted; continue, skip and stop do what they say")
def outlier(box: Box) -> Found:
    watch = dict(outlier_window=8, outlier_z=8.0, checkpoint_interval=1, keep_checkpoints=100)
    for policy in box.some(["continue", "skip", "stop"]):
        step, out = box.random.randrange(10, STEPS - 1), box.folder / policy
        process = box.train(out, inject=[f"spike={step}"], on_outlier=policy, **watch)
        if policy == "stop":
            box.fails(process, f"step {step + 1}: ", "standard deviations above", "on_outlier=stop", "crash_")
            need(max(steps_saved(out)) == step, f"{steps_saved(out)} are saved, the outlier came in step {step + 1}")
            continue
        need(process.wait().status == 0, f"on_outlier={policy} ended the run: {process.last_words()}")
        found = [r for r in log(out) if r.get("event") == "outlier"]
        need(found and found[0]["step_done"] == step + 1, f"flagged: {found}, spiked in step {step + 1}")
        last = json.loads((out / checkpoint.step_name(STEPS) / "training.json").read_text())
        need(last["outliers"]["count"] == len(found), f"counted {last['outliers']['count']}, flagged {len(found)}")
        unchanged = weights_of(out / checkpoint.step_name(step)) == weights_of(out / checkpoint.step_name(step + 1))
        need(unchanged == (policy == "skip"), f"on_outlier={policy}: weights {'un' * unchanged}changed by the step")
    return box.found("continue updates, skip leaves the update out, stop writes a capsule")


@fault("F21", "one bit of one process's weights changes", "found at the next comparison, which names step, weight and process")
def replica_changed(box: Box) -> Found:
    names = ["transformer.wte.weight", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight"]
    for name in box.some(names):
        step, bit = box.random.randrange(5, STEPS - 4), box.random.randrange(0, 20)  # a bit of the mantissa: no loss shows it
        out = box.folder / name
        inject = [f"flip={step},1,{name},{box.random.randrange(18)},{bit}"]
        process = box.train(out, 2, inject=inject, replica_interval=4, max_steps=1000, checkpoint_interval=500)
        at = (step // 4 + 1) * 4
        box.fails(process, f"step {at}: ", f"{name} in process 1")
        need(last_step(out) == at, f"flipped in step {step + 1}, found after step {last_step(out)}")
    return box.found(f"{box.tries} of {box.tries} found at the next comparison (every 4 steps)")


# ---- data -------------------------------------------------------------------------------------------------------------


@fault("F22", "a shard is cut off, of odd length, or has a wrong header", "clean failure that names the shard")
def damaged_shard(box: Box) -> Found:
    def header(at: int, content: bytes) -> Callable[[bytes], bytes]:
        return lambda b: b[:at] + content + b[at + len(content) :]

    cases: dict[str, Callable[[bytes], bytes]] = {
        "cut off in the middle": lambda b: b[: len(b) // 2 * 2 // 2],
        "one byte more": lambda b: b + b"\0",
        "one byte less": lambda b: b[:-1],
        "cut off in the header": lambda b: b[:100],
        "another magic": header(0, b"PARQUET1"),
        "3 bytes a token": header(12, struct.pack("<I", 3)),
        "another vocabulary": header(16, struct.pack("<I", 50257)),
        "2**60 tokens": header(20, struct.pack("<Q", 2**60)),
        "another tokenizer": header(28, b"gpt2".ljust(32, b"\0")),
        "one token changed": header(1000, b"\1"),
    }
    for n, (what, change) in enumerate(box.some(cases.items())):
        where, name = box.folder / str(n), ("train_000000.bin", "val_000000.bin")[n % 2]
        shutil.copytree(box.stage.data, where)
        path = where / "tiny" / name
        path.write_bytes(change(path.read_bytes()))
        line = box.refused(box.folder / "none", str(path), data_dir=str(where))
        need("prepare" in line, f"{what}: the line does not say what to do: {line}")
    return box.found(f"{box.tries} of {box.tries} named")


@fault("F23", "a token id beyond the vocabulary", "found on the CPU, with shard and place")
def token_beyond_vocabulary(box: Box) -> Found:
    """In a small shard, which is read through at the start; in one of 70 MB, which is looked at as it is read."""
    for size in box.some([0, 35_000_000]):
        where = box.folder / str(size)
        shutil.copytree(box.stage.data, where)
        path = where / "tiny" / "train_000000.bin"
        content = path.read_bytes()
        head, tokens = (
            bytearray(content[: shards.HEADER_BYTES]),
            np.frombuffer(content[shards.HEADER_BYTES :], "<u2").copy(),
        )
        if size:  # the second half is bad: the first step of 8 sequences meets it, or the second
            tokens = np.resize(tokens, size)
            tokens[size // 2 :] = 999
            struct.pack_into("<Q", head, 20, size)
        else:
            place = box.random.randrange(len(tokens))
            tokens[place] = 60_000
        path.write_bytes(bytes(head) + tokens.tobytes())
        seal_data(where / "tiny")
        line = box.fails(box.train(box.folder / f"run_{size}", data_dir=str(where)), str(path))
        said = re.search(r"token (\d+) is (\d+), the vocabulary has (\d+)", line)
        need(said, f"the line does not name the token: {line}")
        need(int(said[2]) == tokens[int(said[1])] >= int(said[3]), f"token {said[1]} is {tokens[int(said[1])]}: {line}")
        need(size or int(said[1]) == place, f"changed at {place}: {line}")
    return box.found("in a small shard before step 1, in a large one when it is read; never a device assertion")


@fault("F24", "a shard is missing, empty or too short", "clean failure that names it")
def no_data(box: Box) -> Found:
    def missing(folder: Path) -> None:
        (folder / "val_000000.bin").unlink()

    def no_bytes(folder: Path) -> None:
        (folder / "val_000000.bin").write_bytes(b"")

    def shorter(count: int) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            path = folder / "val_000000.bin"
            content = bytearray(path.read_bytes()[: shards.HEADER_BYTES + 2 * count])
            struct.pack_into("<Q", content, 20, count)
            path.write_bytes(content)
            seal_data(folder)

        return change

    def gone(folder: Path) -> None:
        shutil.rmtree(folder)

    cases = {"val_000000.bin": [missing, no_bytes], "the validation split": [shorter(0), shorter(20)], "tiny": [gone]}
    for word, change in box.some((word, change) for word, changes in cases.items() for change in changes):
        where = box.folder / f"data_{box.tries}"
        shutil.copytree(box.stage.data, where)
        change(where / "tiny")
        box.refused(box.folder / "none", word, data_dir=str(where))
    return box.found(f"{box.tries} of {box.tries} named")


@fault("F25", "the data changed between save and resumption", "refused")
def data_changed(box: Box) -> Found:
    """Another text of the same alphabet; one token more or less likely; in a shard whose digest fits, and in one where not."""
    whole = box.whole()

    def reversed_text(where: Path) -> None:
        box.stage.prepare(where, lambda text: text[::-1])

    def one_token(where: Path) -> None:
        shutil.copytree(box.stage.data, where)
        path = where / "tiny" / "train_000000.bin"
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)

    def sealed_token(where: Path) -> None:
        one_token(where)
        seal_data(where / "tiny")

    cases = [(reversed_text, "has changed since"), (one_token, "is damaged"), (sealed_token, "has changed since")]
    for change, word in box.some(cases):
        out, where = box.copy_of(whole, f"run_{box.tries}", upto=8), box.folder / f"data_{box.tries}"
        change(where)
        box.refused(out, word, resume=True, data_dir=str(where))
    return box.found(f"{box.tries} of {box.tries} refused")


@fault("F26", "the run goes over the end of the data, twice, on 2 processes", "each token once per epoch, processes disjoint")
def epoch_wraps(box: Box) -> Found:
    """What each process really reads is written down, with a kill and a resumption in the second epoch."""
    T, per_step = TINY["block_size"], 64
    stream = shards.open_dataset(box.stage.data / "tiny").split("train")
    n = (len(stream) - 1) // T
    steps = dict(tokens_per_step=per_step * T, batch_size=8, max_steps=-(-3 * n // per_step), checkpoint_interval=10)
    out, record = box.folder / "run", box.folder / "record"
    record.mkdir()
    process = box.train(out, 2, inject=[f"record={record}"], **steps)
    if not box.quick:
        process.until(lambda: last_step(out) >= steps["max_steps"] // 2, "the second epoch")
        process.kill()
        process = box.train(out, 2, inject=[f"record={record}"], resume=True, **steps)
    done = process.wait(2 * PATIENCE)
    need(done.status == 0, f"ended with {done.status}: {process.last_words()}")
    seen: dict[int, dict[tuple[int, int], list[int]]] = {}  # step -> (micro, rank) -> where its sequences begin
    for path in record.iterdir():
        for line in path.read_text().splitlines():
            step, micro, rank, world, starts = json.loads(line)
            if step < steps["max_steps"] and world == 2:  # not what is read ahead of the end, nor for a look at what is on
                known = seen.setdefault(step, {}).setdefault((micro, rank), starts)
                need(known == starts, f"step {step + 1}, process {rank}: the resumed run reads other tokens")
    order = [start for step in sorted(seen) for _, starts in sorted(seen[step].items()) for start in starts]
    need(len(order) == steps["max_steps"] * per_step, f"{len(order)} sequences were read")
    for epoch in range(3):
        starts = sorted(order[epoch * n : (epoch + 1) * n])
        need(len(set(starts)) == n, f"epoch {epoch + 1}: {n - len(set(starts))} sequences were read twice")
        need(all(b - a == T for a, b in itertools.pairwise(starts)), f"epoch {epoch + 1}: targets overlap or are left out")
        need(starts[0] >= 0 and starts[-1] + T < len(stream), f"epoch {epoch + 1} reaches over the end")
    first = [order[e * n : (e + 1) * n] for e in range(3)]
    need(first[0] != first[1] != first[2], "every epoch has the same order")
    return box.found(f"3 epochs of {n} sequences: each token once in each, in another order, no two processes the same")


# ---- processes that do not meet, or stand still --------------------------------------------------------------------------


@fault("F27", "SIGSTOP of one process of 2", "time-out (here 9 s) that names it, no orphans")
def stopped(box: Box) -> Found:
    """What remains to be waited for then is torchrun, which gives a process 30 s to obey before it kills it."""
    endless = dict(max_steps=10**6, checkpoint_interval=20, timeout_minutes=0.15)
    for rank in box.some([1, 0]):
        out = box.folder / f"rank_{rank}"
        process = box.train(out, 2, **endless)
        process.until(lambda out=out: last_step(out) >= 50, "step 50")
        victim = process.pid_of(rank)
        os.kill(victim, signal.SIGSTOP)
        since = time.monotonic()
        said = f"rank {rank} does not answer"
        with contextlib.suppress(Failed):  # what it says is judged below
            process.until(lambda p=process: any("error: " in err for _, err in p.texts().values()), "a word", 30)
        box.detect.append(time.monotonic() - since)
        done = process.wait(PATIENCE)
        clean(dataclasses.replace(done, seconds=0), said, "timeout_minutes")
        need(len(digests(out)) > 0, "nothing is saved")
    return box.found("named after 9 s and the 3 s in which the others tell where they stand; all gone when torchrun gives up")


@fault("F28", "port in use, no such host, no address, nobody there, somebody else there", "clean failure within 30 s")
def no_meeting(box: Box) -> Found:
    """Processes started by hand, as a cluster's scheduler would."""
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free.bind(("127.0.0.1", 0))
        port, other = taken.getsockname()[1], free.getsockname()[1]
        cases = [
            ("port in use", dict(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)), str(port)),
            ("no such host", dict(RANK="1", MASTER_ADDR="nobody.invalid", MASTER_PORT="29500"), "nobody.invalid"),
            ("no address", dict(RANK="1", MASTER_ADDR=None, MASTER_PORT=None), "MASTER_ADDR"),
            ("nobody there", dict(RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(other)), str(other)),
            ("somebody else there", dict(RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)), str(port)),
        ]

        def judge(case: tuple[str, dict, str]) -> str | None:
            what, env, word = case
            env = env | dict(WORLD_SIZE="2", LOCAL_RANK=env["RANK"], LOCAL_WORLD_SIZE="2")
            try:
                process = box.train(box.folder / "none", env=env)
                box.fails(process, f"process {env['RANK']} of 2", word, "--rdzv-endpoint", within=30 + START)
            except Failed as e:
                return f"{what}: {e}"

        with ThreadPoolExecutor(len(cases)) as pool:  # at once: they wait, mostly
            wrong = [said for said in pool.map(judge, box.some(cases)) if said]
        need(not wrong, "; ".join(wrong))
    return box.found(f"{box.tries} of {box.tries} give up by themselves and say at which address")


@fault("F29", "two processes started with different settings, data or code", "found before step 1, the difference is named")
def different_settings(box: Box) -> Found:
    other = box.folder / "data"
    shutil.copytree(box.stage.data, other)
    text = (other / "tiny" / shards.MANIFEST).read_text()
    (other / "tiny" / shards.MANIFEST).write_text(text + " ")
    cases = [("seed", dict(seed=1)), ("n_layer", dict(n_layer=1)), ("data", dict(data_dir=str(other)))]
    for word, changes in box.some(cases):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            where = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), LOCAL_WORLD_SIZE="2")
        out = box.folder / f"run_{word}"
        both = [
            box.train(out, env=where | dict(RANK=str(rank), LOCAL_RANK=str(rank)), **(changes if rank else {}))
            for rank in range(2)
        ]
        for process in both:
            box.fails(process, "ranks disagree", f"{word} is", "in process 1")
        need(not out.exists(), "a run was begun")
    return box.found(f"{box.tries} of {box.tries} refused by both processes")


# ---- settings, sampling, machine -----------------------------------------------------------------------------------------


@fault("F30", "prompts that are long, empty, not in the alphabet, no UTF-8; top_k above the vocabulary; T=0", "defined")
def odd_sampling(box: Box) -> Found:
    """And of GPT-2's vocabulary padded to 50,304 rows, never one of the last 47: of that, the model itself is asked here."""
    out = box.whole()
    (box.folder / "bad.txt").write_bytes(b"the cat \xff\xfe")

    def sampled(*flags: str) -> str:
        process = box.start(["sample.py", str(out), "--max_new_tokens=40", *flags])
        done = process.wait()
        need(done.status == 0, f"{flags[0][:30]}: ended with {done.status}: {process.last_words()}")
        need("Traceback" not in done.texts[0][1], f"{flags[0][:30]}: a traceback")
        return done.out

    alphabet = set(box.stage.text())
    for flags in box.some([["--prompt=" + "the cat sat on a mat, " * 50], ["--prompt="], ["--prompt=the", "--top_k=1000000"]]):
        said = sampled(*flags)
        need(set(said) <= alphabet and len(said) >= 40, f"{flags[0][:30]}: {said[:50]!r}")
    for _ in box.some(["T=0"]):
        greedy = [sampled("--prompt=the ", "--temperature=0", f"--seed={seed}") for seed in (1, 2)]
        need(greedy[0] == greedy[1], "T=0 depends on the seed")
    for flags, word in box.some([(["--prompt=Ωmega"], "'Ω'"), ([f"--prompt_file={box.folder}/bad.txt"], "UTF-8")]):
        box.fails(box.start(["sample.py", str(out), *flags]), word)
    import sample

    torch.manual_seed(0)
    cfg = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=50257, vocab_multiple=128)
    model = GPT(cfg).eval()
    need(model.lm_head.weight.size(0) == 50304, "the vocabulary is not padded: nothing would be tested")
    drawn = list(sample.generate(model, [0], 64, num_samples=200, temperature=10.0))
    need(int(torch.stack(drawn).max()) < 50257, "an id beyond the vocabulary was drawn")
    box.tries += 1
    return box.found("prompts are cut, begun or refused by name; 12,800 draws at T=10 stay below 50,257")


@fault("F31", "unknown setting in a file, a flag, a checkpoint", "refused with the near name")
def unknown_setting(box: Box) -> Found:
    path = box.folder / "mine.py"
    path.write_text("from configurator import Config\n\nconfig = Config(batchsize=4)\n")
    box.tries += 4
    box.fails(box.start(["train.py", "--learning_rat=1e-3"]), "learning_rat is not a setting", "learning_rate")
    box.fails(box.start(["train.py", str(path)]), "batchsize is not a setting", "batch_size", "line 3")
    if not box.quick:
        box.fails(box.start(["sample.py", str(box.whole()), "--temprature=1"]), "temprature", "temperature")
        out = box.copy_of(box.whole(), "forged", upto=4)
        folder = out / "step_00000004"
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"n_layers": 2}))
        seal(folder)
        box.refused(out, "config.json", "n_layers", "n_layer", resume=True)
    return box.found("each refused in one line with what was meant")


@fault("F32", "out of memory: micro-batch, or one sequence, too large; 1 and 2 processes", "halved aloud; or clean")
def out_of_memory(box: Box) -> Found:
    """The kernel refuses more than some MB on top of what the process has when its first step begins."""
    steps = dict(dropout=0.0, tokens_per_step=2048 * 32, max_steps=6, checkpoint_interval=3, eval_interval=6)
    for ranks, room in box.some([(1, 150), (2, 90)]):
        whole = box.whole(ranks, batch_size=64, **steps)
        out = box.folder / f"on_{ranks}"
        process = box.train(out, ranks, inject=[f"memory={room}"], batch_size=2048, **steps)
        done = process.wait(2 * PATIENCE)
        need(done.status == 0, f"{ranks} process(es): ended with {done.status}: {process.last_words()}")
        said = re.findall(r"out of memory with micro-batches of (\d+) .* as \d+ x (\d+)", done.out)
        need(said, f"{ranks} process(es): nothing was said (were {room} MB enough?)")
        losses = [{r["step"]: r["loss"] for r in log(o) if "loss" in r} for o in (whole, out)]
        off = max(abs(losses[1][s] / losses[0][s] - 1) for s in losses[0])
        need(off < 1e-4, f"{ranks} process(es): a loss is {off:.0e} off after halving")
    long = dict(block_size=4096, tokens_per_step=4096, batch_size=1, max_steps=4, checkpoint_interval=1, eval_interval=100)
    for ranks in box.some([1, 2]):
        tokens = dict(tokens_per_step=4096 * ranks)
        out = box.folder / f"too_long_{ranks}"
        box.trained(out, ranks, **long | tokens | dict(max_steps=1))
        before = digests(out)
        since = time.monotonic()
        process = box.train(out, ranks, inject=["memory=60"], resume=True, **long | tokens)
        box.fails(process, "out of memory", since=since)
        need(digests(out) == before, "the checkpoint has changed")
    return box.found("halved until it fits, with the same losses; where one sequence does not fit, one line, checkpoint intact")


@fault("F33", "no C++ compiler", "eager and said aloud; asked for by name: clean failure")
def no_compiler(box: Box) -> Found:
    bare = dict(PATH=str(box.folder), CXX=None, CC=None)
    out = box.folder / "auto"
    box.tries += 2
    done = box.trained(out, env=bare, compile="auto")
    need("compile = False (there is no C++ compiler" in done.out, "it was not said aloud")
    on = next(r["effective"] for r in log(out) if "effective" in r)
    need(on["compile"] is False, "effective() says it was compiled")
    box.same(box.whole(), out)
    box.refused(box.folder / "by_name", "compile=True is not available", "--compile=False", env=bare, compile=True)
    return box.found("auto trains eagerly, says so, and is bit for bit the eager run; compile=True says what to install")


# ---- the matrix -------------------------------------------------------------------------------------------------------

MATRIX = [(d, c, r) for d in ("float32", "bfloat16") for c in (False, True) for r in (1, 2)]


def kill_and_resume(box: Box, dtype: str, compile: bool, ranks: int) -> Found:
    """SIGKILL of every process at a random moment, resumption, G2."""
    how = dict(dtype=dtype, compile=compile, max_steps=60, checkpoint_interval=5, eval_interval=20)
    whole, out = box.whole(ranks, **how), box.folder / "run"
    process = box.train(out, ranks, **how)
    goal = box.random.randint(6, 55)
    process.until(lambda: last_step(out) >= goal, f"step {goal}", 4 * PATIENCE)
    process.kill()
    at = last_step(out)
    on = next(r["effective"] for r in log(out) if "effective" in r)
    need((on["compile"], on["processes"], on["deterministic"]) == (compile, ranks, True), f"what ran is {on}")
    box.resumed(out, whole, ranks, resume="auto", **how)
    return box.found(f"killed after step {at} of 60")


# ---- running them -----------------------------------------------------------------------------------------------------


def judged(box: Box, run: Callable[[], Found]) -> Found:
    """What a fault found, or how it failed."""
    began = time.monotonic()
    try:
        found = run()
    except Failed as e:
        found = dataclasses.replace(box.found(str(e)), passed=False)
    except Exception as e:  # of this file's own making, most likely: say where
        where = traceback.extract_tb(e.__traceback__)[-1]
        said = f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
        found = dataclasses.replace(box.found(said), passed=False)
    finally:
        box.close()
    found.seconds = time.monotonic() - began
    return found


def run_fault(stage: Stage, id: str, quick: bool = False, seed: int = 1337) -> Found:
    box = Box(stage, id, quick, seed)
    return judged(box, lambda: FAULTS[id].run(box))


def cell_name(dtype: str, compile: bool, ranks: int) -> str:
    return f"{dtype}, {'compiled' if compile else 'eager'}, {ranks} process(es)"


def run_cell(stage: Stage, dtype: str, compile: bool, ranks: int, seed: int = 1337) -> Found:
    box = Box(stage, f"{dtype}_{'compiled' if compile else 'eager'}_{ranks}", False, seed)
    return judged(box, lambda: kill_and_resume(box, dtype, compile, ranks))


def line(name: str, title: str, found: Found) -> str:
    def shown(value: float | None, unit: str) -> str:
        return "–" if value is None else f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    numbers = [f"detect {shown(found.seconds_to_detect, ' s'):>7}", f"lost {shown(found.steps_lost, ''):>3}"]
    numbers.append(f"recover {shown(found.seconds_to_recover, ' s'):>7}")
    verdict = "passed" if found.passed else "FAILED"
    return f"{name:<4} {verdict} {found.seconds:>6.1f} s  {'  '.join(numbers)}  {title}: {found.detail}"


def main(argv: list[str]) -> None:
    options = dict(a.removeprefix("--").split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    switches, ids = {a for a in argv if a in ("--quick", "--matrix")}, [a for a in argv if not a.startswith("--")]
    wrong = [a for a in ids if a not in FAULTS] + [f"--{o}" for o in options if o not in ("out", "seed", "lanes")]
    wrong += [a for a in argv if a.startswith("--") and "=" not in a and a not in switches]
    wrong += [f"--{o}={v}" for o, v in options.items() if o in ("seed", "lanes") and not re.fullmatch(r"[1-9]\d{0,8}", v)]
    if wrong or ("--matrix" in switches and ids):
        raise UserError(f"{(wrong or argv)[0]} is not understood here: type F01 … F33, --quick, --matrix, or nothing")
    seed, lanes = int(options.get("seed", 1337)), int(options.get("lanes", system.cores()))
    everything = not switches and not ids
    quick = "--quick" in switches
    chosen = ids or ([] if "--matrix" in switches else list(QUICK) if quick else list(FAULTS))
    chosen.sort(key=lambda id: (id not in ("F27", "F02"), id))  # the longest first: nobody shall wait for them at the end
    cells = MATRIX if everything or "--matrix" in switches else []
    began, stage = time.monotonic(), Stage()
    results: dict[str, Found] = {}
    try:
        with ThreadPoolExecutor(lanes) as pool:

            def do(name: str, title: str, work: Callable[[], Found]) -> None:
                results[name] = work()
                print(line(name, title, results[name]), flush=True)

            for cell in cells:
                pool.submit(do, cell_name(*cell), "SIGKILL and resumption", lambda cell=cell: run_cell(stage, *cell, seed))
            for id in chosen:
                pool.submit(do, id, FAULTS[id].title, lambda id=id: run_fault(stage, id, quick, seed))
    finally:
        stage.close()
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    passed = sum(results[id].passed for id in chosen)
    said = [f"{passed}/{len(chosen)} faults"] * bool(chosen)
    cell_results = {cell: results[cell_name(*cell)] for cell in cells}
    said += [f"{sum(f.passed for f in cell_results.values())}/{len(cells)} of the matrix"] * bool(cells)
    print(f"{', '.join(said)} in {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of CPU time)")
    if everything or "out" in options:
        path = Path(options.get("out", ROOT / "results" / "faults.json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "kind": "faults",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python tests/faults.py" + "".join(f" {a}" for a in argv if not a.startswith("--out=")),
            "machine": machine.describe(torch.device("cpu")) | {"threads": 1},
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),  # of all processes: what it takes where nothing else runs
            "faults": [
                dict(id=id, title=FAULTS[id].title, expected=FAULTS[id].expected) | rounded(results[id])
                for id in sorted(chosen)
            ],
            "matrix": [dict(dtype=d, compile=c, processes=r) | rounded(f) for (d, c, r), f in cell_results.items()],
        }
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if not all(f.passed for f in results.values()):
        sys.exit(1)


def rounded(found: Found) -> dict:
    values = dataclasses.asdict(found)
    return {k: round(v, 1) if isinstance(v, float) else v for k, v in values.items()}


# ---- inside the process: what cannot be brought about from outside -------------------------------------------------------


def at_step(action: Callable) -> None:
    """Call action(run, step) at the beginning of each step of this process."""
    import train

    plain = train.train_step

    def train_step(run, step: int):
        action(run, step)
        return plain(run, step)

    train.train_step = train_step


def inject_die_before(n: str, step: str, calls: str) -> None:
    """Die before the n-th system call of the save of a step that changes the disk's contents; 0: write them down."""
    plain, seen, active = checkpoint.save, [], []

    def counted(name: str):
        real = getattr(os, name)

        def call(*args, **how):
            if active:
                seen.append(name)
                if len(seen) == int(n):
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **how)

        setattr(os, name, call)

    def save(run_dir, snapshot, *args, **how):
        if snapshot.step == int(step):
            active.append(True)
        try:
            return plain(run_dir, snapshot, *args, **how)
        finally:
            active.clear()
            if snapshot.step == int(step):
                Path(calls).write_text(" ".join(seen))

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        counted(name)
    checkpoint.save = save


def inject_die_inside(step: str, micro: str) -> None:
    """Die in the last process, in a step, when so many of its micro-batches are done."""

    def action(run, now: int) -> None:
        if now == int(step) and run.world.rank == run.world.size - 1:
            done = []

            def hook(*_):
                if len(done) == int(micro):
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(True)

            run.train_model.register_forward_pre_hook(hook)

    at_step(action)


def inject_nan(what: str, step: str, rank: str) -> None:
    """From a step on, the last block's MLP gives NaN in one process, or the gradient of its last bias is."""

    def action(run, now: int) -> None:
        if now == int(step) and run.world.rank == int(rank):
            mlp = run.model.transformer.h[-1].mlp
            if what == "loss":
                mlp.register_forward_hook(lambda module, args, output: output * float("nan"))
            else:
                mlp.c_proj.bias.register_hook(lambda g: g * float("nan"))

    at_step(action)


def inject_spike(step: str) -> None:
    """In one step, logits are 100 times too large."""
    handles = []

    def action(run, now: int) -> None:
        if now == int(step):
            handles.append(run.model.transformer.ln_f.register_forward_hook(lambda module, args, output: output * 100))
        elif handles:
            handles.pop().remove()

    at_step(action)


def inject_flip(step: str, rank: str, name: str, index: str, bit: str) -> None:
    """Before a step, one bit of one weight of one process changes."""

    def action(run, now: int) -> None:
        if now == int(step) and run.world.rank == int(rank):
            weight = dict(run.model.named_parameters())[name]
            with torch.no_grad():
                weight.view(torch.int32).flatten()[int(index)] ^= 1 << int(bit)

    at_step(action)


def inject_memory(megabytes: str) -> None:
    """From the first step on (with several processes: from before it), this process may have so much more memory."""
    import train

    plain = train.loop

    def loop(*args):
        used = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(megabytes) * 2**20, resource.RLIM_INFINITY))
        return plain(*args)

    train.loop = loop


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


def child(argv: list[str]) -> None:
    """Arrange what --inject=name=arguments says, then be train.py."""
    import train

    arranged, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    for what in arranged:
        name, _, arguments = what.removeprefix("--inject=").partition("=")
        globals()[f"inject_{name}"](*arguments.split(","))
    train.main(flags)


if __name__ == "__main__":
    errors.entry(child if sys.argv[1:2] and sys.argv[1].startswith("--inject=") else main)
