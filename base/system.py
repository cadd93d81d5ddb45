"""What the operating system tells about this machine and this process."""

import contextlib
import os
import re
import resource
import sys
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    with contextlib.suppress(OSError):  # not ru_maxrss: on Linux it begins with what the parent process held
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int | None:
    """Bytes that this machine, or the container it is, can still hand out; None where Linux does not tell."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
        limit, now = (Path("/sys/fs/cgroup", n) for n in ("memory.max", "memory.current"))
        if limit.is_file() and limit.read_text().strip() != "max":  # of a container
            free = min(free, int(limit.read_text()) - int(now.read_text()))
        return free
    except (OSError, TypeError, ValueError):
        return None  # another system


def user_cache() -> Path:
    """The user's own cache folder, created if necessary, for this user alone: what lies in it is executed. (So it does not lie
    beside a run, whose folder may be untrusted.) OSError if it cannot be created.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanoladder"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
