"""Prove that a run that is killed and resumed is, bit for bit, the run that was never interrupted.

    python train.py config/shakespeare.py --prove_resume            a few steps, killed in the middle of a save
    python bench.py kills                                           a whole run, killed at twenty random moments, saves included
    python -m safety.prove --kill_at_byte=1000000 -- CONFIG …       train, and die (SIGKILL) at that byte of the checkpoints

The first form uses the third. Under torchrun, the main process dies, since it writes.
"""

import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import configurator
from base import scripts, settings
from base.errors import UserError, entry
from base.files import ROOT, open_regular, sha256_of
from configurator import Config
from engine import checkpoint, restore


def trajectory(out: Path) -> dict[int, str]:
    """{step: its loss, gradient norm and learning rate in hex} of a run; of a step that was run twice, the last."""
    steps = [record for record in scripts.read_log(out)[0] if "loss" in record]
    return {r["step"]: " ".join(float(r[k]).hex() for k in ("loss", "grad_norm", "lr")) for r in steps}


def last_step(out: Path) -> int:
    """The last step in a run's log; 0 without one. Only complete lines count: a kill leaves half of one."""
    log = out / "log.jsonl"
    found = re.findall(rb'^\{"step": (\d+), "loss".*\}\n', log.read_bytes() if log.is_file() else b"", re.MULTILINE)
    return int(found[-1]) if found else 0


def digest(folder: Path) -> str:
    """sha256 of all that a run resumes from: parameters, moments, random states, data cursor."""
    files = sorted([*folder.glob("*.safetensors"), folder / "training.json"])
    digests = ((p.name, shard_sha256(p) if p.name.startswith("shard-") else sha256_of(p)) for p in files)
    return hashlib.sha256(b"".join(name.encode() + bytes.fromhex(found) for name, found in digests)).hexdigest()


def shard_sha256(path: Path) -> str:
    """sha256 of a file that torch.distributed.checkpoint wrote, with its header's keys sorted: they come in a random order."""
    with open_regular(path) as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while piece := f.read(checkpoint.PIECE):
            found.update(piece)
    return found.hexdigest()


def difference(a: Path, b: Path) -> str | None:
    """The first thing in which two runs differ, or None."""
    left, right = trajectory(a), trajectory(b)
    for step in sorted(left.keys() | right.keys()):
        if left.get(step) != right.get(step):
            return f"step {step}: loss, gradient norm and learning rate are {left.get(step)} and {right.get(step)}"
    ends = [restore.newest(out) for out in (a, b)]
    if ends[0].name != ends[1].name:
        return f"one ends at {ends[0].name}, the other at {ends[1].name}"
    return None if digest(ends[0]) == digest(ends[1]) else f"{ends[0].name}: parameters, moments, random states or data cursor"


def train(cfg: Config) -> None:
    """Train in a process of its own, or several. UserError with its last words if it fails."""
    scripts.run("train.py", *settings.flags(cfg), processes=max(1, cfg.processes))


def train_until_byte(cfg: Config, kill_at: int) -> int:
    """Train, and die after so many bytes of checkpoints. Returns the exit status; UserError if it did not die in a save."""
    kill = f"--kill_at_byte={kill_at}"
    command = scripts.command("-m safety.prove", kill, "--", *settings.flags(cfg), processes=max(1, cfg.processes))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if not done.returncode or not any(Path(cfg.out_dir).glob(checkpoint.WRITING + "*")):
        last = scripts.last_words(done.stderr)
        raise UserError(f"the run was not killed in a save: it ended with status {done.returncode} ({last})")
    return done.returncode


def prove_resume(argv: list[str]) -> None:
    """Train a few steps of a config twice, the second time with a SIGKILL in the middle of a save, then resumed. Prints a
    verdict; UserError if anything differs.
    """
    asked = configurator.load(argv, __doc__)
    steps = asked.max_steps if any(a.startswith("--max_steps") for a in argv) else 8
    if steps < 4:
        raise UserError(f"max_steps={steps} leaves no room to save, kill and resume: use --max_steps=4 or more")
    Path("out").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove_", dir="out")).resolve()
    few = dict(max_steps=steps, checkpoint_interval=max(1, steps // 4), eval_interval=steps, keep_checkpoints=2, resume=False)
    few |= dict(eval_tokens=asked.T, deterministic=True, wandb="off", data_dir=str(Path(asked.data_dir).resolve()))
    whole = replace(asked, **few, out_dir=str(folder / "whole"))
    broken = replace(whole, out_dir=str(folder / "broken"))
    try:
        print(f"1/3  {steps} steps, not interrupted (deterministic=True; a checkpoint every {whole.checkpoint_interval})")
        train(whole)
        end = restore.newest(Path(whole.out_dir))
        # shards of several processes are written by torch: only the rest can be cut at a byte
        size = sum(p.stat().st_size for p in end.glob("*.safetensors") if not p.name.startswith("shard-"))
        kill_at = int(1.5 * size)
        print(f"     ended at {end.name}, sha256 {digest(end)[:16]}…")
        print(f"2/3  the same again, killed (SIGKILL) in the middle of its second save, after {kill_at:,} bytes")
        status = train_until_byte(broken, kill_at)
        left = sorted(p.name for p in Path(broken.out_dir).iterdir() if p.is_dir())
        print(f"     exit status {status}; it left {', '.join(left)}")
        print(f"3/3  resumed from {restore.newest(Path(broken.out_dir)).name}")
        train(replace(broken, resume=True))
        if found := difference(Path(whole.out_dir), Path(broken.out_dir)):
            raise UserError(f"NOT proved; the first difference: {found}")
        print(f"proved: losses, gradient norms and learning rates of all {steps} steps are equal in hex;")
        print(f"parameters, moments, random states and data cursor are equal in sha256 ({digest(end)[:16]}…)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prove_kills(cfg: Config, kills: int, seed: int = 0) -> dict:
    """Run a config undisturbed, then once more with so many SIGKILLs, spread at random over its steps and at a random moment
    within a step, every other one while a checkpoint is being written; compare. Returns what happened; UserError if the two
    differ.
    """
    cfg = replace(cfg, deterministic=True, resume="auto")
    whole, broken = (replace(cfg, out_dir=os.path.join(cfg.out_dir, name)) for name in ("whole", "broken"))
    began = time.perf_counter()
    train(whole)
    seconds = {"whole": time.perf_counter() - began}
    random, out, events = Random(seed), Path(broken.out_dir), []
    began = time.perf_counter()
    # the last save but one must still come after the last kill
    targets = sorted(random.sample(range(2, cfg.max_steps - cfg.checkpoint_interval), kills))
    for kill, target in enumerate(targets):
        command = scripts.command("train.py", *settings.flags(broken), processes=max(1, broken.processes))
        going = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            while going.poll() is None and last_step(out) < target:
                time.sleep(0.05)
            while going.poll() is None and kill % 2 and not any(out.glob(checkpoint.WRITING + "*")):
                time.sleep(0.002)
            time.sleep(random.uniform(0.0, 0.7))
            if going.poll() is not None:
                raise UserError(f"the run ended by itself before kill {kill + 1} of {kills}: use a larger --max_steps")
        finally:  # also if this process is stopped meanwhile
            if going.poll() is None:
                os.killpg(going.pid, signal.SIGKILL)
            going.wait()
        saving = sorted(p.name for p in out.glob(checkpoint.WRITING + "*"))
        found = [c.name for c in checkpoint.candidates(out)]
        events.append({"last_step": last_step(out), "was_writing": saving, "newest": found[0] if found else None})
        print(f"kill {kill + 1:>2}: after step {events[-1]['last_step']}, newest {events[-1]['newest']}, writing {saving}")
    train(broken)
    seconds["broken"] = time.perf_counter() - began
    if found := difference(Path(whole.out_dir), out):
        raise UserError(f"NOT equal; the first difference: {found}")
    sha256 = digest(restore.newest(out))
    writing = sum(bool(e["was_writing"]) for e in events)
    print(f"equal after {kills} kills, {writing} of them in a save: {whole.max_steps} steps, sha256 {sha256[:16]}…")
    result = {"kills": kills, "in_a_save": writing, "sha256": sha256, "seconds": seconds}
    return result | {"events": events, "requested": asdict(whole)}


class DyingFile(io.FileIO):
    """A new file whose process dies once all files of this class together have taken so many bytes."""

    left = 0

    def __init__(self, path: Path):
        super().__init__(path, "wb")

    def write(self, content: bytes | memoryview) -> int:
        written = super().write(content[: DyingFile.left])
        DyingFile.left -= written
        if DyingFile.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def main(argv: list[str]) -> None:
    """Train with the arguments after "--", and die at a byte of a checkpoint. UserError if it does not come to that."""
    how = re.fullmatch(r"--kill_at_byte=(\d+)", argv[0]) if argv[1:2] == ["--"] else None
    if not how:
        raise UserError(f"cannot read {' '.join(argv)[:80]!r}: use python -m safety.prove --kill_at_byte=N -- CONFIG …")
    DyingFile.left = int(how[1])
    checkpoint.open_unbuffered = DyingFile
    sys.argv = ["train.py", *argv[2:]]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    raise UserError(f"the run has ended, and {DyingFile.left:,} of the {int(how[1]):,} bytes were not written")


if __name__ == "__main__":
    entry(main)
