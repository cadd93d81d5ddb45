"""How fast prepare_data.py is, against tiktoken by itself on the same cores: both in one run, round by round. And how fast your
own BPE is learnt, and how well it compresses.

tiktoken by itself: the text is in memory, cut into blocks; the ids are thrown away; nothing is counted but encoding. Three ways
are timed, and the fastest is the yardstick: a process for each core, either of tiktoken's calls, or its own batch call, which
uses threads. prepare_data.py is counted whole, from the arguments to the manifest: reading (twice: once to check it), starting
its processes, tokenizing, writing, hashing and flushing to the disk. Left out in both: Python's start, imports, and reading
GPT-2's vocabulary, a quarter of a second.
"""

import contextlib
import hashlib
import json
import multiprocessing
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken

import prepare_data
from base import scripts, system
from base.files import ROOT
from corpus import bpe, sources
from measure.rounds import UntilCtrlC
from tokenizer import GPT2Tokenizer, blocks

# What a BPE is learnt from, in bytes from the text's start, and how many merges: a large one and a small one.
LEARNT = ((20_000_000, 32_000), (130_000, 500))
UNSEEN = 5_000_000  # bytes at the text's end, on which both tokenizers are compared

CALLS: dict[str, Callable[[tiktoken.Encoding, list[str], int], int]] = {  # (encoding, blocks, cores) -> number of ids
    "processes, encode_ordinary": lambda e, texts, _: sum(len(e.encode_ordinary(text)) for text in texts),
    "processes, encode_to_numpy": lambda e, texts, _: sum(len(e.encode_to_numpy(t, disallowed_special=())) for t in texts),
    "threads, encode_ordinary_batch": lambda e, texts, n: sum(map(len, e.encode_ordinary_batch(texts, num_threads=n))),
}


def raw(path: str, call: str, share: int, of: int, cores: int) -> None:
    """Encode every of-th block of a text, once told to: ready, then seconds of CPU and number of ids, as lines of JSON."""
    texts = list(blocks("".join(sources.decoded(Path(path)))))[share::of]
    encoding = GPT2Tokenizer()._encoding
    encoding.encode_ordinary("warm")
    print("ready", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    ids = CALLS[call](encoding, texts, cores)
    print(json.dumps({"cpu_s": time.process_time() - before, "tokens": ids}), flush=True)


def watch_workers(peaks: dict[int, int], done: threading.Event) -> None:
    """Keep each worker process's peak memory up to date: {process id: bytes}; none where there is no /proc."""
    while not done.wait(0.02):
        for worker in multiprocessing.active_children():
            with contextlib.suppress(OSError, TypeError):  # it has ended
                status = Path(f"/proc/{worker.pid}/status").read_text()
                peaks[worker.pid] = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def whole(path: str, data_dir: str, processes: int) -> None:
    """prepare_data.py on a text: what it took, as a line of JSON."""
    GPT2Tokenizer().encode("warm")
    peaks, done = {}, threading.Event()
    watch = threading.Thread(target=watch_workers, args=(peaks, done))
    watch.start()
    began, cpu = time.perf_counter(), cpu_seconds()
    cfg = prepare_data.PrepareConfig(data_dir=data_dir, name="speed", processes=processes)
    _, made = prepare_data.make(cfg, [path])
    found = {"s": time.perf_counter() - began, "cpu_s": cpu_seconds() - cpu}
    done.set()
    watch.join()
    found["tokens"] = sum(entry["tokens"] for entries in made["splits"].values() for entry in entries)
    print(json.dumps(found | {"peak_bytes": system.peak_memory(), "worker_peak_bytes": list(peaks.values())}))


def start(*job: object) -> subprocess.Popen:
    command = scripts.command("-m measure.preparing", json.dumps(job))
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def time_raw(path: Path, call: str, cores: int) -> dict:
    """Seconds from "go" to the last answer, CPU seconds and ids of all processes."""
    count = cores if call.startswith("processes") else 1
    processes = [start("raw", str(path), call, share, count, cores) for share in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", "a process died before it began"
    began = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for process in processes]
    seconds = time.perf_counter() - began
    for process in processes:
        process.communicate()
    return {"s": seconds, "cpu_s": sum(a["cpu_s"] for a in answers), "tokens": sum(a["tokens"] for a in answers)}


def time_whole(path: Path, processes: int, scratch: Path) -> dict:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return json.loads(start("whole", str(path), folder, processes).communicate()[0].splitlines()[-1])


def learn(path: str, of: int, merges: int) -> None:
    """Learn a BPE from a text's first bytes, and encode its last with it and with GPT-2's: a line of JSON."""
    content = Path(path).read_bytes()
    text, unseen = (part.decode("utf-8", errors="ignore") for part in (content[:of], content[-UNSEEN:]))
    began = time.perf_counter()
    own = bpe.train([text], 256 + merges + 1)
    found = {"s": time.perf_counter() - began, "text_bytes": of, "merges": len(own.merges)}
    size = len(unseen.encode())
    found["bytes_per_token"] = {
        name: size / len(tokenizer.encode(unseen)) for name, tokenizer in (("own", own), ("gpt2", GPT2Tokenizer()))
    }
    print(json.dumps(found))


def measure(path: Path, scratch: Path, rounds: int, processes: int = 0, learnt: tuple = LEARNT) -> dict:
    """What a result of kind "data" holds, for a UTF-8 text, GPT-2's tokenizer and so many processes (0: one for each core).
    scratch: a folder on a disk, as data sets are."""
    cores, path = processes or system.cores(), path.resolve()  # a bare name could be a named data set's
    GPT2Tokenizer().encode("warm")  # fetches its files if need be
    text = path.read_bytes()
    result = {
        "text": {"name": path.name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
        "processes": cores,
        "tiktoken": tiktoken.__version__,
        "rounds": [],
        "learnt": [],
    }
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        quarter = Path(folder) / "quarter.txt"
        quarter.write_text(text[: len(text) // 4].decode("utf-8", errors="ignore"), encoding="utf-8", newline="")
        result["quarter"] = time_whole(quarter, cores, scratch)  # its memory should be that of the whole
    with UntilCtrlC() as until:
        for number in range(rounds):
            jobs = {call: lambda call=call: time_raw(path, call, cores) for call in CALLS}
            jobs["whole"] = lambda: time_whole(path, cores, scratch)
            names = list(jobs) if number % 2 == 0 else list(reversed(jobs))  # who comes first must not matter
            timed = {name: jobs[name]() for name in names}
            for name, found in timed.items():
                print(f"{name:<32} {found['tokens'] / found['s']:>12,.0f} tok/s")
            result["rounds"].append(timed)
        for job in learnt:
            found = [json.loads(start("learn", str(path), *job).communicate()[0]) for _ in range(min(rounds, 3))]
            print(f"{found[0]['merges']:,} merges from {job[0]:,} bytes: {found[0]['s']:,.1f} s")
            result["learnt"].append(found)
    return result | until.note(result["rounds"])


if __name__ == "__main__":
    what, *arguments = json.loads(sys.argv[1])
    {"raw": raw, "whole": whole, "learn": learn}[what](*arguments)
