"""One function applied to many jobs in worker processes: results in order, memory bounded, no process left behind.

Processes rather than threads, although tiktoken releases Python's lock: two threads took 40% more CPU time for the same text
than two processes (2 cores of an AMD EPYC, tiktoken 0.14). Started by spawn: a fork of a process with threads can deadlock.

Not ProcessPoolExecutor, whose workers share one pipe: if one is killed in the middle of a result, the executor waits for the
rest for ever (1 of some 50 kills, Python 3.11.7). Here each worker has a pipe of its own, which ends with either side: a killed
worker is an error at once, and a worker ends with its parent, even if that is killed.
"""

import contextlib
import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

from base.errors import UserError

ENDED = (EOFError, OSError)  # of a pipe whose other side has ended: between two messages, or in the middle of one
Tag, Job, Result = TypeVar("Tag"), TypeVar("Job"), TypeVar("Result")


class WorkerKilled(Exception):
    pass


def _serve(pipe: Connection) -> None:
    """A worker: receives the function, then jobs, until the pipe ends. A ValueError, an error of the text, is an answer."""
    with contextlib.suppress(*ENDED):
        work = pipe.recv()
        while True:
            job = pipe.recv()
            try:
                answer = work(job)
            except ValueError as e:
                answer = e
            pipe.send(answer)


class _Worker:
    def __init__(self):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        resource_tracker.ensure_running()  # else starting it would undo the mask
        # Ctrl-C reaches every process of a terminal. A worker inherits this mask, and leaves the signal to its parent.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def send(self, message) -> None:
        try:
            self.pipe.send(message)
        except ENDED:
            raise WorkerKilled from None

    def ask(self, job):
        self.send(job)
        try:
            answer = self.pipe.recv()
        except ENDED:
            raise WorkerKilled from None
        if isinstance(answer, ValueError):
            raise answer
        return answer


def map_in_order(
    work: Callable[[Job], Result], jobs: Iterable[tuple[Tag, Job]], processes: int, alone: int
) -> Iterator[tuple[Tag, Result]]:
    """Each job's tag and result, in order; at most two jobs a process are in flight, so memory stays flat.

    work: travels to each worker once. alone: fewer jobs than this are done here, before a worker would have started.
    UserError if a worker is killed. Close the iterator to end the workers early.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, alone))
    jobs = chain(first, jobs)
    if processes == 1 or len(first) < alone:
        yield from ((tag, work(job)) for tag, job in jobs)
        return
    workers = [_Worker() for _ in range(processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(processes)  # each sends a job to a worker and waits for the answer

    def begin(worker: _Worker) -> None:
        worker.send(work)
        idle.put(worker)

    def run(job: Job) -> Result:
        worker = idle.get()
        try:
            return worker.ask(job)
        finally:
            idle.put(worker)  # also if it was killed, else the next thread would wait for ever

    started = [threads.submit(begin, worker) for worker in workers]
    pending: deque[tuple[Tag, Future]] = deque()
    try:
        for future in started:
            future.result()
        for tag, job in jobs:
            pending.append((tag, threads.submit(run, job)))
            if len(pending) >= 2 * processes:
                tag, future = pending.popleft()
                yield tag, future.result()
        yield from ((tag, future.result()) for tag, future in pending)
    except WorkerKilled:
        raise UserError(
            f"a worker process was killed, most likely because memory ran out: use --processes={processes // 2}, "
            f"which resumes where this stopped"
        ) from None
    finally:
        for worker in workers:
            worker.process.kill()  # it has nothing to clean up; the thread that waits for it ends as well
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.process.join()
            worker.pipe.close()
