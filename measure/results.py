"""Where a result lies, what it begins with, and how it is written."""

import datetime
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from base.errors import UserError
from base.files import write_atomically
from engine import machine


def results_dir(out: str, device: torch.device) -> Path:
    """out/<hardware>, e.g. results/nvidia-h200. UserError if it cannot be created: that should be known before anything is
    measured."""
    folder = Path(out) / re.sub(r"[^a-z0-9]+", "-", machine.hardware_name(device).lower()).strip("-")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; use --out=another/folder") from None
    return folder


def header(kind: str, settings: Any) -> dict:
    """What every result begins with. settings: the command's dataclass; it names the device."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = "python bench.py " + " ".join(sys.argv[1:])
    where = machine.describe(machine.pick_device(settings.device))
    return {"kind": kind, "date": when, "command": command, "machine": where, "sizes": asdict(settings)}


def write(path: Path, result: dict) -> None:
    """All of it or nothing."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
