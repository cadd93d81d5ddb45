"""Processes of one training run with the environment that torchrun would give them, without the seconds in which each imports
torch: they are forked from a server process that has imported everything and run nothing.
"""

import contextlib
import multiprocessing
import os
import pickle
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


@dataclass
class Rank:
    """One process, and after its end what it has left."""

    process: multiprocessing.Process
    folder: Path
    number: int

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Exit status; minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def _read(self, kind: str) -> str:
        path = self.folder / f"{self.number}.{kind}"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def stdout(self) -> str:
        return self._read("out")

    @property
    def stderr(self) -> str:
        return self._read("err")

    @property
    def value(self) -> Any:
        """What the job returned."""
        path = self.folder / f"{self.number}.value"
        assert path.exists(), f"process {self.number} returned nothing; status {self.status}\n{self.stdout}\n{self.stderr}"
        return pickle.loads(path.read_bytes())


def _enter(job: Callable, args: tuple, number: int, folder: Path, env: dict[str, str]) -> None:
    for stream, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(env)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))  # not what machine.limit_memory() set in the tests' own process
    torch.set_num_threads(1)
    try:
        value = pickle.dumps(job(*args))
    except Exception:
        traceback.print_exc()
        os._exit(1)
    (folder / f"{number}.value").write_bytes(value)
    sys.stdout.flush()
    os._exit(0)  # no clean-up of what a job may have left


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    if forkserver._forkserver._forkserver_pid is None:
        path = os.environ.get("PYTHONPATH")  # the server of Python 3.11 and 3.12 does not get sys.path
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), *([path] if path else [])])
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(["train", "safety.prove", "torch._dynamo", "pytest", "hypothesis"])
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            if path:
                os.environ["PYTHONPATH"] = path
    return context


@contextlib.contextmanager
def started(count: int, folder: Path, job: Callable, *args: Any, agent: bool = True, **env: str) -> Iterator[list[Rank]]:
    """`count` processes that run job(*args), a function of a module, until they end or the block does.

    agent: whether the store in which they meet is kept here, as by torchrun's agent, or by their first process. env: more
    environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if agent:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        port = store.port
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    place = dict(WORLD_SIZE=count, LOCAL_WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    context, found = _server(), []
    for n in range(count):
        mine = {k: str(v) for k, v in place.items()} | dict(RANK=str(n), LOCAL_RANK=str(n))
        mine |= dict(TORCHELASTIC_USE_AGENT_STORE=str(agent)) | env
        found.append(Rank(context.Process(target=_enter, args=(job, args, n, folder, mine), daemon=True), folder, n))
        found[-1].process.start()
    try:
        yield found
    finally:
        for r in found:
            r.process.kill()
            r.process.join()


def wait(ranks: list[Rank], timeout: float = 60.0) -> None:
    """Until all have ended."""
    deadline = time.monotonic() + timeout
    for r in ranks:
        r.process.join(max(0.0, deadline - time.monotonic()))
        output = "\n".join(f"--- {x.number}: {x.status}\n{x.stdout}{x.stderr}" for x in ranks)
        assert r.status is not None, f"process {r.number} has not ended after {timeout} s:\n{output}"


def run(count: int, folder: Path, job: Callable, *args: Any, timeout: float = 60.0, **how: Any) -> list[Any]:
    """What the job returns in each process."""
    with started(count, folder, job, *args, **how) as found:
        wait(found, timeout)
        return [r.value for r in found]
