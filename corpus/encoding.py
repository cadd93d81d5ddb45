"""Text -> token ids on all cores: processes that know a vocabulary and nothing else of this program.

A worker is this file, run as a script: it reads batches of text from its stdin and writes their ids to its stdout. So it works
alike on every platform (nothing is forked), never imports the script that started it (which would bring torch along, a second
and 220 MB for each core), and ends when its pipe does, that is with the process that started it, however that ends.

Why not threads, since tiktoken lets go of Python's lock: two of them took 40% more CPU time for the same text than two
processes (2 cores of an AMD EPYC, tiktoken 0.14). Imports no torch.
"""

import contextlib
import fcntl
import os
import pickle
import queue
import re
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
ALONE = 4  # batches; less is done before a worker has started
Batch = dict[str, list[tuple[str | bytes, bool]]]  # split -> texts, each with whether <|endoftext|> goes before it
Tag = TypeVar("Tag")


class WorkerDied(Exception):
    """A worker's pipe has ended: it was killed, or could not start."""


class CannotEncode(ValueError):
    """A text has a character that the tokenizer does not know, or is no text."""


class Encoder:
    """A tokenizer's encode(), as arrays, in a form that travels to another process."""

    def __init__(self, tokenizer):
        """tokenizer: one of tokenizer.Tokenizer's; two bytes per id if its vocabulary fits them, else four."""
        self.end_of_text = tokenizer.end_of_text
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.characters = getattr(tokenizer, "characters", None)
        if self.characters:
            points = np.array([ord(c) for c in self.characters])
            self.id_of = np.full(points.max() + 2, -1, dtype=np.int64)  # the last place: any character above
            self.id_of[points] = np.arange(len(points))
        else:
            # Made anew, because one that tiktoken knows by name would travel by name, and be looked for in files. It needs a
            # special token: with none, tiktoken's search for special ones stops at each character.
            known = tokenizer._encoding
            self.bpe = tiktoken.Encoding(
                tokenizer.name,
                pat_str=known._pat_str,
                mergeable_ranks=known._mergeable_ranks,
                special_tokens={END_OF_TEXT: self.end_of_text},
            )

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids that the tokenizer's encode() gives; bytes are UTF-8. CannotEncode names a character that has none."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as e:
                raise CannotEncode(f"{text[e.start : e.end]!r} is not UTF-8") from None
        if self.characters:
            points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
            ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
            if len(ids) and ids.min() < 0:
                unknown, known = text[int(np.argmin(ids))], len(self.characters)
                raise CannotEncode(f"the character {unknown!r} is not among the {known} that the tokenizer knows")
            return ids
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())  # '<|endoftext|>' inside a text is text
        except UnicodeEncodeError:  # half of a surrogate pair: as tiktoken's other methods do it
            whole = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
            return self.bpe.encode_to_numpy(whole, disallowed_special=())

    def encode_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """split -> ids of its texts, one behind the other."""
        found = {}
        for split, texts in batch.items():
            parts: list = []
            for text, separated in texts:
                parts += [[self.end_of_text]] * (separated and self.end_of_text is not None)
                parts.append(self.encode(text))
            found[split] = np.concatenate(parts, dtype=self.dtype, casting="unsafe")
        return found


class Pool:
    """with Pool(processes) as pool: for tag, ids in pool.encode(encoder, batches): …"""

    def __init__(self, processes: int):
        self.processes = processes
        self.workers: list[subprocess.Popen] = []
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self.threads = ThreadPoolExecutor(processes)  # each sends a batch to a worker and waits for its ids
        self.usage: list[dict] = []  # of each worker that has ended as it should: {"cpu_s", "peak_bytes"}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, failed, *_) -> None:
        for worker in self.workers if failed else []:
            worker.kill()  # ends the threads that wait for it
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            with contextlib.suppress(WorkerDied):  # one that failed was killed above; and its work is done
                self.usage.append(self._ask(worker, None))
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.stdout.close()
            worker.wait()

    def start(self) -> None:
        """Start the processes, if there are to be any: encode() would, but before it there may be something else to do."""
        command = [sys.executable, str(Path(__file__).resolve())]
        while len(self.workers) < self.processes > 1:
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.encoding.append(worker)
            for pipe in (worker.stdin, worker.stdout):
                # Room for a whole batch: no waiting half-way. Linux gives a user 64 MiB in all (pipe(7)); others may have none.
                with contextlib.suppress(OSError, AttributeError):
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, min(2**20, 2**24 // self.processes))

    def _ask(self, worker: subprocess.Popen, batch: Batch | None):
        try:
            pickle.dump(batch, worker.stdin)
            worker.stdin.flush()
            answer = pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise WorkerDied(f"exit status {worker.wait()}") from None
        if isinstance(answer, CannotEncode):
            raise answer
        return answer

    def _encode(self, batch: Batch) -> dict[str, np.ndarray]:
        worker = self.idle.get()
        try:
            return self._ask(worker, batch)
        finally:
            self.idle.put(worker)  # also if it died: or the next thread would wait for ever

    def encode(self, encoder: Encoder, batches: Iterable[tuple[Tag, Batch]]) -> Iterator[tuple[Tag, dict[str, np.ndarray]]]:
        """Each batch's tag and ids, in order; at most two batches a process are held, so memory stays flat."""
        batches = iter(batches)
        first = list(islice(batches, ALONE))
        if self.processes == 1 or len(first) < ALONE:
            yield from ((tag, encoder.encode_batch(batch)) for tag, batch in chain(first, batches))
            return
        self.start()
        content = pickle.dumps(encoder)
        for worker in self.workers:
            try:
                worker.stdin.write(content)
                worker.stdin.flush()
            except BrokenPipeError:
                raise WorkerDied(f"exit status {worker.wait()}") from None
            self.idle.put(worker)
        pending: deque = deque()
        for tag, batch in chain(first, batches):
            pending.append((tag, self.threads.submit(self._encode, batch)))
            if len(pending) >= 2 * self.processes:
                tag, ids = pending.popleft()
                yield tag, ids.result()
        yield from ((tag, ids.result()) for tag, ids in pending)


def serve() -> None:
    """A worker's life: an encoder, then batches, until the pipe ends. None asks what it has used so far, at any time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: who sends the batches decides
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that is printed may get between the ids
    try:
        while True:
            job = pickle.load(source)
            if isinstance(job, Encoder):
                encoder = job
                continue
            try:
                answer = encoder.encode_batch(job) if job is not None else used()
            except CannotEncode as e:
                answer = e
            pickle.dump(answer, sink, protocol=5)
            sink.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # at once: what is left in the pipe's buffer has no reader


def used() -> dict:
    """CPU seconds and peak memory of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    try:  # not ru_maxrss: on Linux it begins with what the process that started this one held
        peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # getrusage(2): bytes there, KiB elsewhere
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": peak}


if __name__ == "__main__":
    from corpus import encoding  # under the name by which the encoder was pickled

    encoding.serve()
