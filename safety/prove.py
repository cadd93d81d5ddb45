"""Show that a run which is killed and resumed is, bit for bit, the run that was never interrupted.

    python train.py config/shakespeare.py --prove_resume      before your eyes, in a few steps
    python bench.py kills                                     a whole run, killed at twenty random moments, saves included
    python prove.py --kill_at_byte=1000000 -- CONFIG …        train, and die (SIGKILL) at that byte of its checkpoints

The third form is what the first uses to die in the middle of a save; under torchrun, rank 0 dies.
"""

import hashlib
import json
import os
import re
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
from base import errors
from base.errors import UserError
from base.files import sha256_of
from configurator import Config
from engine import checkpoint, restore


def trajectory(out: Path) -> dict[int, str]:
    """{step: its loss, gradient norm and learning rate in hex} of a run; of a step that was run twice, the last."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: " ".join(float(r[k]).hex() for k in ("loss", "grad_norm", "lr")) for r in lines if "loss" in r}


def last_step(out: Path) -> int:
    """The last step in a run's log; 0 without one. The last line may be half written."""
    log = out / "log.jsonl"
    found = re.findall(rb'^\{"step": (\d+), "loss"', log.read_bytes() if log.is_file() else b"", re.MULTILINE)
    return int(found[-1]) if found else 0


def digest(folder: Path) -> str:
    """sha256 of all that a checkpoint would go on from: parameters, moments, random states, data cursor."""
    files = sorted([*folder.glob("*.safetensors"), folder / "training.json"])
    return hashlib.sha256(b"".join(p.name.encode() + bytes.fromhex(sha256_of(p)) for p in files)).hexdigest()


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


def command(script: list[str], cfg: Config) -> list[str]:
    """What to type to train with all settings of cfg."""
    flags = [f"--{name}={value}" for name, value in asdict(cfg).items()]
    if cfg.processes > 1:
        starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.processes}"]
        return [*starter, *script, *flags]
    return [sys.executable, *script, *flags]


def run(script: list[str], cfg: Config) -> int:
    """Train in a process of its own; its exit status. UserError with its last words if it was not killed and failed."""
    done = subprocess.run(command(script, cfg), cwd=Path(__file__).parent, capture_output=True, encoding="utf-8")
    killed = "prove.py" in script[0] and not (Path(cfg.out_dir) / checkpoint.step_name(cfg.max_steps)).exists()
    if done.returncode and not killed:
        raise UserError(f"the run ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.returncode


def prove_resume(argv: list[str]) -> None:
    """Train a few steps of a config twice, the second time with a SIGKILL in the middle of a save and a resumption. Prints a
    verdict; UserError if anything differs.
    """
    asked = configurator.load(argv, __doc__)
    steps = asked.max_steps if any(a.startswith(("--max_steps", "--max-steps")) for a in argv) else 8
    if steps < 4:
        raise UserError(f"max_steps={steps} leaves no room for a save, a kill and a resumption: type --max_steps=4 or more")
    Path("out").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="prove_", dir="out")).resolve()
    few = dict(max_steps=steps, checkpoint_interval=max(1, steps // 4), eval_interval=steps, keep_checkpoints=2, resume=False)
    few |= dict(eval_tokens=asked.T, deterministic=True, wandb="off", data_dir=str(Path(asked.data_dir).resolve()))
    whole = replace(asked, **few, out_dir=str(folder / "whole"))
    broken = replace(whole, out_dir=str(folder / "broken"))
    try:
        print(f"1/3  {steps} steps, not interrupted (deterministic=True; a checkpoint every {whole.checkpoint_interval})")
        run(["train.py"], whole)
        end = restore.newest(Path(whole.out_dir))
        size = sum(p.stat().st_size for p in end.glob("*.safetensors"))
        kill_at = int(1.5 * size)
        print(f"     ended at {end.name}, sha256 {digest(end)[:16]}…")
        print(f"2/3  the same again, killed (SIGKILL) in the middle of its second save, after {kill_at:,} bytes")
        status = run(["prove.py", f"--kill_at_byte={kill_at}", "--"], broken)
        left = sorted(p.name for p in Path(broken.out_dir).iterdir() if p.is_dir())
        print(f"     exit status {status}; it left {', '.join(left)}")
        print(f"3/3  resumed from {restore.newest(Path(broken.out_dir)).name}")
        run(["train.py"], replace(broken, resume=True))
        if found := difference(Path(whole.out_dir), Path(broken.out_dir)):
            raise UserError(f"NOT proved; the first difference: {found}")
        print(
            f"proved: losses, gradient norms and learning rates of all {steps} steps are equal in hex; parameters, moments, "
            f"random states and data cursor are equal in sha256 ({digest(end)[:16]}…)"
        )
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
    run(["train.py"], whole)
    seconds = {"whole": time.perf_counter() - began}
    random, out, events = Random(seed), Path(broken.out_dir), []
    began = time.perf_counter()
    # the last save but one must still come after the last kill
    targets = sorted(random.sample(range(2, cfg.max_steps - cfg.checkpoint_interval), kills))
    for kill, target in enumerate(targets):
        going = subprocess.Popen(command(["train.py"], broken), start_new_session=True, stdout=subprocess.DEVNULL)
        while going.poll() is None and last_step(out) < target:
            time.sleep(0.05)
        while going.poll() is None and kill % 2 and not any(out.glob(".writing_*")):
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, 0.7))
        if going.poll() is not None:
            raise UserError(f"the run ended by itself before kill {kill + 1} of {kills}: type a larger --max_steps")
        os.killpg(going.pid, signal.SIGKILL)
        going.wait()
        saving = sorted(p.name for p in out.glob(".writing_*"))
        found = [c.name for c in checkpoint.candidates(out)]
        events.append({"last_step": last_step(out), "was_writing": saving, "newest": found[0] if found else None})
        print(f"kill {kill + 1:>2}: after step {events[-1]['last_step']}, newest {events[-1]['newest']}, writing {saving}")
    run(["train.py"], broken)
    seconds["broken"] = time.perf_counter() - began
    if found := difference(Path(whole.out_dir), out):
        raise UserError(f"NOT equal; the first difference: {found}")
    sha256 = digest(restore.newest(out))
    writing = sum(bool(e["was_writing"]) for e in events)
    print(
        f"equal after {kills} kills, {writing} of them in the middle of a save: {whole.max_steps} steps, sha256 {sha256[:16]}…"
    )
    return {
        "kills": kills,
        "in_a_save": writing,
        "sha256": sha256,
        "seconds": seconds,
        "events": events,
        "requested": asdict(whole),
    }


class DyingFile:
    """A file that lets the process die once the files of its kind have taken so many bytes."""

    left = 0

    def __init__(self, path: Path):
        self.file = open(path, "wb", buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, content: bytes) -> int:
        cls = type(self)
        written = self.file.write(content[: cls.left])
        cls.left -= written
        if cls.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def main(argv: list[str]) -> None:
    """Train with the arguments after "--", and die at a byte of a checkpoint."""
    import train

    how = re.fullmatch(r"--kill_at_byte=(\d+)", argv[0]) if argv[1:2] == ["--"] else None
    if not how:
        raise UserError(f"{' '.join(argv)[:80]!r} is not understood: type python prove.py --kill_at_byte=N -- CONFIG …")
    DyingFile.left = int(how[1])
    checkpoint.open = lambda path, mode="r", **how: DyingFile(path) if mode == "wb" else open(path, mode, **how)
    train.main(argv[2:])


if __name__ == "__main__":
    errors.entry(main)
