"""Whether processes run, and waiting for what they do."""

import time
from pathlib import Path


def state(pid: int) -> str:
    """A letter of proc(5): T, stopped; Z, ended and not reaped. "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    return state(pid) not in ("", "Z")


def wait_until(condition, what: str, seconds: float = 60.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, what
        time.sleep(0.02)
    return found
