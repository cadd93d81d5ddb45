"""Runs of a small model for the faults to happen to, and what is demanded of them. Two verdicts recur:

clean   the process ends by itself, with a status that is not 0, within 60 s; what our processes print has no traceback
        and one "error: …" line, which names the file, step or process; checkpoints are as before; no process is left over
G2      the resumed run is the uninterrupted one: loss, gradient norm and learning rate of every step are equal in hex,
        and the last parameters, moments, random states and data cursor in sha256 (prove.difference)
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from base import scripts
from base.errors import UserError
from base.files import sha256_of
from corpus import shards
from engine import checkpoint, restore
from rig.processes import PATIENCE, Done, Failed, Process, clean, need
from safety import prove
from safety.prove import last_step

STEPS = 24  # of a run, unless said otherwise
INJECT = "tests/rig/inject.py"


@dataclass
class Found:
    """What became of a fault, the worst of all tries."""

    detail: str
    passed: bool
    seconds_to_detect: float | None  # from the fault (a bad file: from the start) until who reports it has ended
    steps_lost: int | None  # done before the fault, and done again
    seconds_to_recover: float | None  # from the start of the resumed run until it is where it was
    tries: int
    seconds: float  # that all of it took


class Fault(NamedTuple):
    """A function that does what `title` says, raises Failed unless `expected` holds, and returns what happened; "N/N" in that
    becomes the number of tries.
    """

    title: str
    expected: str
    run: Callable[["Box"], str]


FAULTS: dict[str, Fault] = {}


def fault(id: str, title: str, expected: str):
    """Registers a function as the fault `id`."""
    return lambda run: FAULTS.setdefault(id, Fault(title, expected, run))


TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1, batch_size=4, tokens_per_step=256)
TINY |= dict(learning_rate=1e-2, min_lr=1e-3, warmup_steps=2, device="cpu", dtype="float32", compile=False)
TINY |= dict(reuse_memory=False, deterministic=True, dataset="tiny", max_steps=STEPS, eval_tokens=1000)
TINY |= dict(checkpoint_interval=4, eval_interval=8, log_interval=8)


def steps_saved(out: Path) -> list[int]:
    """The steps of a run's checkpoints that verify, oldest first."""
    found = []
    for folder in reversed(checkpoint.candidates(out)):
        with contextlib.suppress(UserError):
            restore.verify(folder)
            found.append(checkpoint.step_of(folder))
    return found


def digests(out: Path) -> dict[str, str]:
    """{checkpoint: digest of what it goes on from} of all checkpoints of a run, each of which must verify."""
    for folder in checkpoint.candidates(out):
        restore.verify(folder)
    return {folder.name: prove.digest(folder) for folder in checkpoint.candidates(out)}


def log(out: Path) -> list[dict]:
    return scripts.read_log(out)[0]


def loss_apart(a: Path, b: Path) -> float:
    """The largest relative difference of a loss of two runs, which must have the same steps."""
    left, right = ({r["step"]: r["loss"] for r in log(out) if "loss" in r} for out in (a, b))
    need(left.keys() == right.keys(), f"the runs end at steps {max(left)} and {max(right)}")
    return max(abs(right[step] / left[step] - 1) for step in left)


def different(out: Path, whole: Path) -> list[str]:
    """Those of a run's checkpoints, each of which must verify, that are not the uninterrupted run's."""
    return [name for name, found in digests(out).items() if found != prove.digest(whole / name)]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A function that changes the content of a file in a folder."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def seal_data(folder: Path) -> None:
    """Make a data set's manifest fit its files, as a forger would."""
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
        self.made: dict[object, tuple[Path, threading.Lock]] = {}
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
        scripts.run("prepare_data.py", where / "tiny.txt", "--tokenizer=char", f"--data_dir={where}")

    def once(self, key: object, make: Callable[[Path], None]) -> Path:
        """A folder that `make` fills the first time it is asked for by its key."""
        with self.lock:
            folder, lock = self.made.setdefault(key, (self.folder / f"made_{len(self.made)}", threading.Lock()))
        with lock:
            if not folder.exists():
                make(folder)
        return folder

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Box:
    """Where one fault happens: its own folder and random places, and what was measured so far."""

    def __init__(self, stage: Stage, name: str, quick: bool = False, seed: int = 1337):
        self.stage, self.quick = stage, quick
        self.folder = Path(tempfile.mkdtemp(prefix=re.sub(r"\W+", "_", name), dir=stage.folder))
        self.random = random.Random(f"{seed} {name}")
        self.prefix: list[str] = []  # before the command, to take rights away
        self.numbers = itertools.count()
        self.detect, self.lost, self.recover, self.tries = [], [], [], 0  # what Found is made of
        self.processes: list[Process] = []

    def some(self, cases: Iterable, at_least: int = 1) -> Iterator:
        """The cases, counted as tries; in a quick test the first only."""
        for case in list(cases)[: at_least if self.quick else None]:
            self.tries += 1
            yield case

    def path(self, name: str = "run") -> Path:
        """A new path in the fault's folder."""
        return self.folder / f"{name}_{next(self.numbers)}"

    def data(self, change: Callable[[Path], object], sealed: bool = False) -> Path:
        """A data_dir like the stage's, after change(folder of the data set); sealed: its manifest made to fit."""
        where = self.path("data")
        shutil.copytree(self.stage.data, where)
        change(where / "tiny")
        if sealed:
            seal_data(where / "tiny")
        return where

    def flags(self, out: Path, **changes) -> list[str]:
        settings = (
            TINY | dict(vocab_size=len(set(self.stage.text())), data_dir=str(self.stage.data), out_dir=str(out)) | changes
        )
        return [f"--{name}={value}" for name, value in settings.items()]

    def start(self, command: list[str], ranks: int = 1, env: dict | None = None, torchrun: Iterable[str] = ()) -> Process:
        process = Process(self.folder, command, ranks, env or {}, list(torchrun), self.prefix)
        self.processes.append(process)
        return process

    def train(self, out: Path, ranks: int = 1, inject: Iterable[str] = (), env=None, torchrun=(), **changes) -> Process:
        """Start train.py, through inject.py if something has to be arranged in it."""
        arranged = [f"--inject={what}" for what in inject]
        script = [INJECT, *arranged, "--"] if arranged else ["train.py"]
        return self.start([*script, *self.flags(out, **changes)], ranks, env, torchrun)

    def trained(self, out: Path, ranks: int = 1, **how) -> Done:
        """A run that must come to its end."""
        return self.ends_well(self.train(out, ranks, **how))

    def ends_well(self, process: Process, seconds: float = 4 * PATIENCE) -> Done:
        done = process.wait(seconds)
        need(done.status == 0, f"a run that should have ended well ended with {done.status}: {process.last_words()}")
        need(not done.orphans, f"left over by a run that ended well: {done.orphans}")
        return done

    def whole(self, ranks: int = 1, **changes) -> Path:
        """The folder of a run that nothing interrupts, with all its checkpoints."""
        key = (ranks, *sorted(changes.items()))
        return self.stage.once(key, lambda out: self.trained(out, ranks, keep_checkpoints=1000, **changes))

    def reach(self, process: Process, out: Path, step: int, seconds: float = 60) -> None:
        """Wait until a step of a run is in its log."""
        process.until(lambda: last_step(out) >= step, f"step {step}", seconds)

    def killed(self, process: Process, out: Path, step: int, rank: int | None = None, number: int = signal.SIGKILL) -> float:
        """Send a signal at a random moment after a step, to a rank, to what was started (-1) or to all (None); returns when."""
        self.reach(process, out, 1)
        victim = None if rank is None else process.pid_of(rank) if rank >= 0 else process.popen.pid
        self.reach(process, out, step)
        time.sleep(self.random.uniform(0, 0.02))
        now = time.monotonic()
        process.kill() if victim is None else os.kill(victim, number)
        return now

    def sample(self, place: Path, *flags: str) -> Process:
        return self.start(["sample.py", str(place), "--max_new_tokens=3", *flags])

    def copy_of(self, out: Path, upto: int) -> Path:
        """A run as it would look if it had ended at the checkpoint of step `upto`."""
        mine = self.path()
        shutil.copytree(out, mine)
        for folder in checkpoint.candidates(mine):
            if checkpoint.step_of(folder) > upto:
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
        done = self.ends_well(process)
        self.lost.append(was - kept)
        self.same(like, out)
        left = sorted(p.name for p in out.iterdir() if p.name.startswith((".writing", ".replaced", ".removing")))
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
        need("| loss" not in "".join(out for out, _ in process.texts().values()), "steps were done before it was found")
        need({p: prove.digest(p) for p in checkpoint.candidates(out)} == before, "checkpoints were changed")
        return line

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def judged(stage: Stage, name: str, run: Callable[[Box], str], quick: bool = False, seed: int = 1337) -> Found:
    """What became of a fault, or how it failed."""
    box, began, passed = Box(stage, name, quick, seed), time.monotonic(), False
    try:
        detail, passed = run(box), True
    except Failed as e:
        detail = str(e)
    except Exception as e:  # most likely a mistake of the rig: report where
        where = traceback.extract_tb(e.__traceback__)[-1]
        detail = f"{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
    finally:
        box.close()
    worst = [max(values, default=None) for values in (box.detect, box.lost, box.recover)]
    detail = detail.replace("N/N", f"{box.tries} of {box.tries}")
    return Found(detail, passed, *worst, max(box.tries, 1), time.monotonic() - began)
