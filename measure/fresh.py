"""Do a measurement in a process of its own."""

import json
import os
import re
import signal
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from base import scripts
from configurator import Config

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # of this process, if torchrun has started it


def in_fresh_process(cfg: Config, what: str = "measure", **job: Any) -> dict:
    """Let measure/worker.py do a job (in cfg.processes processes, under torchrun) and return its result. A crash comes back as
    {"error": one line, "out_of_memory": bool}.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "job.json"), Path(folder, "result.json")
        # relative paths are this process's; a script starts in the repository's root
        order = {"what": what, "config": asdict(cfg), "cwd": os.getcwd()} | job
        task.write_text(json.dumps(order), encoding="utf-8")
        processes = 1 if what == "ceilings" else cfg.processes
        alone = {name: value for name, value in os.environ.items() if name not in PLACE}
        how = dict(processes=processes, env=alone, check=False, show=what == "verify")  # which prints its rows
        done = scripts.run("-m measure.worker", task, result, **how)
        if result.is_file():
            return json.loads(result.read_text(encoding="utf-8"))
    # under torchrun the status is its own: how a process ended stands in its report
    inner = re.findall(r"exitcode *: (-?\d+)", done.stderr)
    code = int(inner[0]) if inner else done.returncode
    # the kernel ends a process that outgrows the machine's memory with SIGKILL
    return {"error": f"{ending(code)}: {scripts.last_words(done.stderr)}", "out_of_memory": code in (-9, 137)}


def ending(code: int) -> str:
    """How a process ended, by its exit status: minus a signal, or from a shell 128 + the signal."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number not in set(signal.Signals):
        return f"the process ended with exit status {code}"
    name = signal.Signals(number).name
    return f"the process was ended by {name}" + (", probably out of memory" if name == "SIGKILL" else "")
