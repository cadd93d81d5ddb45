"""Runs of a small model for the faults to happen to, and what is demanded of them. Two verdicts recur:

clean   the process ends by itself, with a status that is not 0, within 60 s; what our processes print has no traceback
        and one "error: …" line, which names the file, step or process; checkpoints are as before; no process is left over
G2      the resumed run is the uninterrupted one: loss, gradient norm and learning rate of every step are equal in hex,
        and the last parameters, moments, random states and data cursor in sha256 (prove.difference)

A fault is a table of tries and a function that does one of them. Those of damage.py serve many.
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
from collections.abc import Callable, Iterable
from pathlib import Path

from base import scripts
from base.errors import UserError
from base.files import sha256_of
from base.scripts import read_log
from engine import checkpoint, restore
from rig.processes import PATIENCE, Done, Failed, Process, clean, need
from safety import prove
from safety.prove import last_step

STEPS = 24  # of a run, unless said otherwise
Tries = Iterable | Callable[["Box"], Iterable]
FAULTS: dict[str, list[tuple[Callable, Tries]]] = {}  # each fault's parts: functions with their tries


def fault(id: str, tries: Tries = ((),)):
    """Registers a function as (a part of) the fault `id`. It does what the fault's title says, and raises Failed unless what is
    expected holds. It is called as run(box, *arguments) for each of the tries, in a quick test for the first only.
    tries: tuples, or single arguments, or a function of the box that finds them.
    """

    def register(run: Callable) -> Callable:
        FAULTS.setdefault(id, []).append((run, tries if callable(tries) else list(tries)))
        return run

    return register


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


def loss_apart(a: Path, b: Path) -> float:
    """The largest relative difference of a loss of two runs, which must have the same steps."""
    left, right = ({r["step"]: r["loss"] for r in read_log(out)[0] if "loss" in r} for out in (a, b))
    need(left.keys() == right.keys(), f"the runs end at steps {max(left)} and {max(right)}")
    return max(abs(right[step] / left[step] - 1) for step in left)


def weights_of(out: Path, step: int) -> str:
    return sha256_of(out / checkpoint.step_name(step) / "model.safetensors")


def undamaged(out: Path, whole: Path) -> None:
    """Demand that each checkpoint of a run verifies and is the uninterrupted run's, if that has one of the same step."""
    for folder in checkpoint.candidates(out):
        restore.verify(folder)
        like = whole / folder.name
        need(not like.exists() or prove.digest(folder) == prove.digest(like), f"NOT G2: {folder.name} differs")


def same(whole: Path, out: Path) -> None:
    """Demand G2 of a run that has ended."""
    difference = prove.difference(whole, out)
    need(difference is None, f"NOT G2: {difference}")


class Stage:
    """What all faults share: a prepared data set, and runs that nothing interrupted, made when first asked for."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="faults_"))
        self.wholes: dict[tuple, tuple[Path, threading.Lock]] = {}
        self.numbers = itertools.count()
        words = ["the", "cat", "sat", "on", "a", "mat,", "ran", "after", "its", "tail", "and", "fell.\n"]
        self.text = " ".join(random.Random(0).choices(words, k=18_000))[:60_000]
        self.data = self.folder / "data"
        (self.folder / "tiny.txt").write_text(self.text)
        scripts.run("prepare_data.py", self.folder / "tiny.txt", "--tokenizer=char", f"--data_dir={self.data}")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Box:
    """Where one fault happens: its own folder and random places, and what was measured so far."""

    def __init__(self, stage: Stage, name: str, quick: bool = False, seed: int = 1337):
        self.stage, self.quick = stage, quick
        self.folder = Path(tempfile.mkdtemp(prefix=re.sub(r"\W+", "_", name), dir=stage.folder))
        self.random = random.Random(f"{seed} {name}")
        self.numbers = itertools.count()
        self.detect, self.lost, self.recover = [], [], []  # what the scorecard is made of
        self.processes: list[Process] = []

    def path(self) -> Path:
        """A new path in the fault's folder."""
        return self.folder / f"place_{next(self.numbers)}"

    def data(self, change: Callable[[Path], object]) -> Path:
        """A data_dir like the stage's, after change(folder of the data set)."""
        where = self.path()
        shutil.copytree(self.stage.data, where)
        change(where / "tiny")
        return where

    def flags(self, out: Path, **changes) -> list[str]:
        settings = TINY | dict(vocab_size=len(set(self.stage.text)), data_dir=self.stage.data, out_dir=out) | changes
        return [f"--{name}={value}" for name, value in settings.items()]

    def start(self, command: list[str], ranks: int = 1, env: dict | None = None) -> Process:
        process = Process(self.folder, command, ranks, env or {})
        self.processes.append(process)
        return process

    def train(self, out: Path, ranks: int = 1, inject: str = "", env: dict | None = None, **changes) -> Process:
        """Start train.py, through inject.py if something has to be arranged in it."""
        script = ["tests/rig/inject.py", inject] if inject else ["train.py"]
        return self.start([*script, *self.flags(out, **changes)], ranks, env)

    def trained(self, out: Path, ranks: int = 1, **how) -> Done:
        """A run that must come to its end."""
        return self.ends_well(self.train(out, ranks, **how))

    def ends_well(self, process: Process) -> Done:
        done = process.wait(4 * PATIENCE)
        need(done.status == 0, f"should have ended well, not with {done.status}: {process.last_words()}")
        need(not done.orphans, f"left over: {done.orphans}")
        return done

    def whole(self, ranks: int = 1, **changes) -> Path:
        """The folder of a run that nothing interrupts, with all its checkpoints; of all faults the first to ask trains it."""
        new = (self.stage.folder / f"whole_{next(self.stage.numbers)}", threading.Lock())
        folder, lock = self.stage.wholes.setdefault((ranks, *sorted(changes.items())), new)
        with lock:
            if not folder.exists():
                self.trained(folder, ranks, keep_checkpoints=1000, **changes)
        return folder

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

    def reach(self, process: Process, out: Path, step: int) -> None:
        """Wait until a step of a run is in its log."""
        process.until(lambda: last_step(out) >= step, f"step {step}")

    def killed(self, process: Process, out: Path, step: int, rank: int | None = None, number: int = signal.SIGKILL) -> float:
        """Send a signal at a random moment after a step, to a rank, to what was started (-1) or to all (None); returns when."""
        self.reach(process, out, step)
        victim = None if rank is None else process.pid_of(rank) if rank >= 0 else process.popen.pid
        time.sleep(self.random.uniform(0, 0.02))
        now = time.monotonic()
        process.kill() if victim is None else os.kill(victim, number)
        return now

    def sample(self, place: Path, *flags: str) -> Process:
        return self.start(["sample.py", str(place), "--max_new_tokens=3", *flags])

    def resumed(self, out: Path, whole: Path, ranks: int = 1, **changes) -> Done:
        """Resume a run, and demand G2. Notes the steps lost and the time until they were done again.

        With resume="auto" it may have been killed before its first save was done, and begins anew.
        """
        was, kept = last_step(out), max(steps_saved(out), default=0)
        process = self.train(out, ranks, **{"resume": True} | changes)
        if was < changes.get("max_steps", STEPS):
            self.reach(process, out, was + 1)
            self.recover.append(time.monotonic() - process.began)
        done = self.ends_well(process)
        self.lost.append(was - kept)
        same(whole, out)
        left = sorted(p.name for p in out.iterdir() if p.name.startswith((".writing", ".replaced", ".removing")))
        need(not left, f"not cleaned up: {left}")
        return done

    def fails(self, process: Process, *words: str, within: float = PATIENCE, since: float | None = None) -> str:
        """Demand a clean failure of a process, and note how long it took."""
        done = process.wait(within)
        line = clean(done, *words, within=within)
        self.detect.append(time.monotonic() - since if since else done.seconds)
        return line

    def refused(self, out: Path, *words: str, ranks: int = 1, **how) -> None:
        """Demand that train.py refuses to begin, and leaves the run's checkpoints as they are."""
        before = {p: prove.digest(p) for p in checkpoint.candidates(out)}
        process = self.train(out, ranks, **how)
        self.fails(process, *words)
        need("| loss" not in process.wait().out, "steps were done before it was found")
        need({p: prove.digest(p) for p in checkpoint.candidates(out)} == before, "checkpoints were changed")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def judged(stage: Stage, name: str, parts: list[tuple[Callable, Tries]], quick: bool = False, seed: int = 1337) -> dict:
    """What became of a fault, the worst of all tries; or how it failed."""
    box, began, passed, count, now = Box(stage, name, quick, seed), time.monotonic(), False, 0, ()
    try:
        for run, tries in parts:
            for case in list(tries(box) if callable(tries) else tries)[: 1 if quick else None]:
                now, count = case if isinstance(case, tuple) else (case,), count + 1
                run(box, *now)
        detail, passed = f"{count} of {count}", True
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        mistake = f" ({type(e).__name__}, {Path(where.filename).name}:{where.lineno})"  # most likely the rig's own
        said = f"{e}{'' if isinstance(e, Failed) else mistake}"
        detail = f"try {count} ({', '.join(str(v) for v in now if not callable(v))}): {said}"
    finally:
        box.close()
    detect, lost, recover = (round(max(values), 1) if values else None for values in (box.detect, box.lost, box.recover))
    return {
        "detail": detail,
        "passed": passed,
        "seconds_to_detect": detect,  # from the fault (a bad file: from the start) until who reports it has ended
        "steps_lost": lost,  # done before the fault, and done again
        "seconds_to_recover": recover,  # from the start of the resumed run until it is where it was
        "tries": count,
        "seconds": round(time.monotonic() - began, 1),  # that all of it took
    }
