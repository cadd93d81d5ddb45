"""The whole life of a fresh process: one job, its result as JSON. `python -m measure.worker JOB RESULT`; fresh.py starts it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from base.errors import UserError, entry
from configurator import Config
from engine import machine
from measure import timing, verify, why

JOBS: dict[str, Callable[[Config, dict], dict]] = {
    "measure": lambda cfg, job: timing.measure_steps(cfg, job["steps"], job["min_timed"]),
    "ceilings": lambda cfg, job: timing.ceilings(cfg),
    "precision": lambda cfg, job: timing.precision(cfg),
    "why": lambda cfg, job: why.why(cfg, job["ceilings"], Path(job["trace"])),
    "steps": verify.keep_steps,
    "verify": lambda cfg, job: verify.verify(cfg.data_dir, machine.pick_device(cfg.device), job["small"], Path(job["keep"])),
}


def main(argv: list[str]) -> None:
    """Of several processes the first writes the result; an error is written by whoever meets it."""
    task, result_path = map(Path, argv)
    job = json.loads(task.read_text(encoding="utf-8"))
    os.chdir(job["cwd"])
    try:
        result = JOBS[job["what"]](Config(**job["config"]), job)
    except UserError as e:
        result = {"error": str(e)}
    if int(os.environ.get("RANK", 0)) == 0 or "error" in result:
        result_path.write_text(json.dumps(result), encoding="utf-8")
    if "error" in result:
        sys.exit(1)  # torchrun then ends the processes that would wait for this one


if __name__ == "__main__":
    entry(main)
