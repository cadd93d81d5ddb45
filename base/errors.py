"""Errors that end in one line, and how a process ends."""

import difflib
import os
import re
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given, what is allowed, what to use instead."""


def near_name(name: str, known: list[str]) -> str:
    """'did you mean x?', or a pointer to --help."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists all of them"


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch.OutOfMemoryError on a GPU; the CPU's allocator raises a plain RuntimeError, as does a thread without a stack."""
    return bool(re.search("out of memory|can't allocate memory|not enough memory|can't start new thread", str(error)))


def printable(text: str) -> str:
    """A message in one line, without control characters that a terminal would obey: it may quote an untrusted file."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def leave(status: int) -> None:
    """End this process. One of a process group ends at once, without Python's own clean-up: gloo's threads, which may still
    wait for the other processes, would make it hang or abort with a line of their own."""
    distributed = sys.modules.get("torch.distributed")  # not imported here: reading a config must not wait for torch
    if distributed and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def entry(main: Callable[[list[str]], None]) -> None:
    """Run a script's main(argv). What the user can fix ends as one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # not the locale's
    who = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main(sys.argv[1:])
    except UserError as e:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # rank 0 reports the same error, and torchrun then ends this process; if not, it reports it itself
        print(f"{who}error: {printable(str(e))}", file=sys.stderr)
        leave(2)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        first = str(e).partition("\n")[0]
        print(f"{who}error: out of memory ({first}): use a smaller --batch_size or a smaller model", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print(f"\n{who}stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python sample.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(0)
