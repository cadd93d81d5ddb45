"""Files that are whole or absent, reads that end, and one lock. ROOT is where this repository lies."""

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from base.errors import UserError

ROOT = Path(__file__).resolve().parent.parent  # the only place that knows it: every path of the repository is ROOT / ...
LARGEST_JSON = 2**26  # bytes; the largest of ours, a BPE of 2**20 tokens, takes 20 MB


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it: readers see all of it or none of it. OSError if
    the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; OSError unless it is a regular one: opening a FIFO would wait for a writer, and reading a device
    might never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(fd, "rb")


def read_bytes(path: Path, most: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most so many bytes; OSError otherwise."""
    with open_regular(path) as f:
        content = f.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return content


def read_text(path: Path, most: int = LARGEST_JSON) -> str:
    """The same as UTF-8; UnicodeDecodeError, which is a ValueError, if it is not."""
    return read_bytes(path, most).decode("utf-8")


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk, so that it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """Hex digest of a regular file; OSError if it cannot be read."""
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def lock(folder: Path, taken: str):
    """Claim a folder for this process; release() or the end of the process gives it back. UserError(taken) if another process
    has it; OSError if the folder cannot be written."""
    from filelock import FileLock, Timeout

    held = FileLock(folder / ".lock", timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(taken) from None
    return held
