"""Train the models of a study, each in a worker process of its own core."""

import datetime
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import train
from base import scripts
from base.errors import UserError
from base.files import write_atomically
from configurator import Config
from engine.effective import effective, mismatches
from engine.run import build
from measure.scaling.family import EVAL_TOKENS
from measure.timing import time_steps

EVAL_BATCH = 64  # sequences at a time in the evaluation; changes nothing but its speed


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def train_one(cfg: Config) -> dict:
    """Train a model with build and train.train_step to the end of its schedule, and evaluate it."""
    started, began = now(), time.perf_counter()
    run = build(cfg)
    for step in range(cfg.max_steps):
        train.train_step(run, step)
    if wrong := mismatches(run, effective(run)):
        raise UserError("; ".join(wrong))
    how = dict(tokens=EVAL_TOKENS, T=cfg.T, batch_size=EVAL_BATCH, device=run.device, autocast=run.autocast)
    loss = evaluate.validation(run.model, run.dataset.split("val"), run.dataset.tokenizer, **how)["loss"]
    N, D = run.model.n_params(), cfg.max_steps * cfg.tokens_per_step
    result = {"N": N, "D": D, "C": 6 * N * D, "flops": cfg.flops_per_token(cfg.T) * D, "n_embd": cfg.n_embd}
    result |= {"n_layer": cfg.n_layer, "steps": cfg.max_steps, "learning_rate": cfg.learning_rate, "seed": cfg.seed}
    run.close()
    return result | {"loss": loss, "seconds": time.perf_counter() - began, "started": started}


def train_and_keep(cfg: Config, path: Path) -> dict:
    """train_one(), written to a file as soon as it is done: a study that is killed loses only the runs under way."""
    try:
        result = train_one(cfg)
    except UserError as e:
        raise UserError(f"n_embd={cfg.n_embd}, {cfg.max_steps} steps: {e}") from None
    write_atomically(path, json.dumps({"config": asdict(cfg), "result": result}, indent=1).encode())
    return result


def time_step(cfg: Config) -> float:
    """Seconds that one step takes: the median of twenty."""
    run = build(cfg)
    seconds, warmup = time_steps(lambda step: train.train_step(run, step), 20, 15)
    run.close()
    return float(np.median(seconds[warmup:]))


def set_up_worker(parent: int, threads: int) -> None:
    """A worker ends with the process that started it, and leaves Ctrl-C, which reaches all processes of a terminal, to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    scripts.end_with_parent(parent)
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore of the system, which a killed worker leaves behind


@contextmanager
def workers(count: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of worker processes. UserError if one is killed. The block may end at any time: no worker outlives it."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=set_up_worker, initargs=(os.getpid(), threads))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?): run the same command again to resume") from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown(cancel_futures=True)
