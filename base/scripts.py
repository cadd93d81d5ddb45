"""Start this project's scripts in processes of their own, and read what they left."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import ROOT, read_bytes


@dataclass(frozen=True)
class Finished:
    """A script that ended as it should."""

    stdout: str
    stderr: str
    seconds: float


def command(script: str, *arguments: object, processes: int = 1) -> list[str]:
    """The command line of "train.py" or of a module ("-m safety.prove"), under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    target = script.split() if script.startswith("-m ") else [str(ROOT / script)]
    return [sys.executable, *launcher, *target, *map(str, arguments)]


def last_words(stderr: str) -> str:
    """The line that says why a script failed: its own error, rather than what torchrun prints about it afterwards."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if "error: " in line or ("Error: " in line and "ChildFailedError" not in line)]
    return (errors or lines)[-1]


def run(script: str, *arguments: object, processes: int = 1, env: dict[str, str] | None = None) -> Finished:
    """Run a script to its end, from the repository's root. UserError with its last words if it fails."""
    began = time.perf_counter()
    line = command(script, *arguments, processes=processes)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", env=env)
    if done.returncode:
        raise UserError(f"{script} ended with {done.returncode}: {last_words(done.stderr)}")
    return Finished(done.stdout, done.stderr, time.perf_counter() - began)


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
