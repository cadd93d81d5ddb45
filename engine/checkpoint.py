"""Checkpoints: folders that are complete or not there, and that run no code when they are read.

    out/<run>/step_00000300/
        model.safetensors     weights
        config.json           the resolved Config
        tokenizer.json
        training.safetensors  AdamW's moments and step by parameter name; every rank's random states
        training.json         step, data set's sha256, last losses
        manifest.json         format version; size and sha256 of each file above

This file writes them, restore.py reads them. A checkpoint is written under a temporary name, flushed to disk, then renamed.
Removing renames it first. So under its final name a checkpoint is always complete.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import optim
from base.errors import UserError
from base.files import sha256_of, sync
from configurator import Config
from engine import parallel
from model import GPT
from tokenizer import Tokenizer

FORMAT = 2
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter
PIECE = 2**24  # bytes written and hashed at a time
STEP_NAME = re.compile(r"step_(\d{8})")
WRITING, REPLACED, REMOVING = ".writing_", ".replaced_", ".removing_"  # prefixes of folders that no reader takes for one


def rng_states(device: torch.device) -> Tensor:
    """This process's random state (torch's CPU generator, then the device's) as bytes."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_states(states: Tensor, device: torch.device) -> None:
    """The reverse of rng_states. UserError if these bytes are no random state: they may come from an untrusted file."""
    size = torch.get_rng_state().numel()
    try:
        torch.set_rng_state(states[:size])
        if device.type == "cuda" and states.numel() > size:
            torch.cuda.set_rng_state(states[size:], device)
    except (RuntimeError, TypeError, IndexError) as e:
        raise UserError(f"not a random state ({e})") from None


def state_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights by name, AdamW's state by name: "exp_avg.transformer.wte.weight" and so on), as far as this process has them."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    kept = optim.inner_optimizer(optimizer).state
    return weights, {f"{kind}.{n}": t for n, p in model.named_parameters() for kind, t in kept.get(p, {}).items()}


@dataclass
class Snapshot:
    """The state of a run after a step, as the loop hands it over to be written."""

    step: int
    weights: dict[str, Tensor]  # as far as this process has them, like the next
    moments: dict[str, Tensor]
    random_states: list[Tensor]  # rng_states() of every rank, in rank order
    cfg: Config
    tokenizer: Tokenizer
    extra: dict  # JSON values for training.json

    @property
    def random(self) -> dict[str, Tensor]:
        """The random states by their names in a file."""
        return {f"random.{rank}": state for rank, state in enumerate(self.random_states)}

    def copied(self, buffers: dict[str, Tensor]) -> "Snapshot":
        """The same with its tensors copied to the CPU, into buffers that are allocated the first time and kept."""
        for name, t in (self.weights | self.moments).items():  # no moment has the name of a weight
            if name not in buffers:
                buffers[name] = torch.empty_like(t, device="cpu", pin_memory=t.device.type == "cuda")
            buffers[name].copy_(t, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are queued
        weights, moments = ({n: buffers[n] for n in part} for part in (self.weights, self.moments))
        return replace(self, weights=weights, moments=moments)


def open_unbuffered(path: Path) -> io.FileIO:
    """A new file, opened for writing. (`python -m safety.prove` replaces this function, to die at a given byte.)"""
    return open(path, "wb", buffering=0)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    """Write tensors in the safetensors format and flush them to disk; returns {bytes, sha256} of what was written.

    The library's own writer gives the same bytes but holds the interpreter lock while it writes, so a thread that uses it would
    stop the training steps; writing and hashing in pieces does not. The format: a 64-bit length, a JSON header padded to
    8 bytes, the tensors one after another (https://github.com/huggingface/safetensors).
    """
    dtypes = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
    header, end = {}, 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": dtypes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 8 + len(text) + end
    with open_unbuffered(path) as f:

        def put(content: bytes | memoryview) -> None:
            for at in range(0, len(content), PIECE):
                piece = content[at : at + PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[f.write(piece) :]

        put(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            put(memoryview(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        os.fsync(f.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def new_folder(folder: Path) -> None:
    """Create an empty folder, in place of what a killed save has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def save_error(final: Path, reason: object) -> UserError:
    return UserError(f"cannot save a checkpoint in {final.parent}: {reason}; earlier ones are untouched")


def write(final: Path, snapshot: Snapshot, tensors: dict[str, dict[str, Tensor]], sharded: bool = False) -> None:
    """Make the checkpoint folder `final`, completely or not at all. UserError if the disk does not take it.

    tensors: {safetensors file: {name: tensor}}. sharded: the folder exists, with the shards of all processes in it.
    """
    folder = beside(final, WRITING)
    try:
        if not sharded:
            new_folder(folder)
        entries = {name: write_safetensors(folder / name, content) for name, content in tensors.items()}
        write_config(folder, snapshot.cfg)
        (folder / "tokenizer.json").write_text(snapshot.tokenizer.to_json(), encoding="utf-8")
        write_json(folder / "training.json", {"step": snapshot.step} | snapshot.extra)
        for path in sorted(folder.iterdir()):
            if path.name not in entries:
                sync(path)
                entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(folder / "manifest.json", {"format": FORMAT, "step": snapshot.step, "files": dict(sorted(entries.items()))})
        sync(folder / "manifest.json")
        sync(folder)
        put_in_place(folder, final)
    except OSError as e:
        raise save_error(final, e.strerror or e) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, final: Path) -> None:
    """Rename a complete folder to `final`. If an earlier attempt has left one there, it is moved aside until then."""
    replaced = beside(final, REPLACED)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(folder, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def beside(final: Path, prefix: str) -> Path:
    """The name of a folder next to `final` that no reader takes for a checkpoint."""
    return final.with_name(prefix + final.name)


def remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first: a kill in between leaves no half of it under its own name."""
    with contextlib.suppress(OSError):  # a folder that cannot be renamed stays, complete
        os.rename(folder, beside(folder, REMOVING))
        shutil.rmtree(beside(folder, REMOVING), ignore_errors=True)


def clean_up(run_dir: Path) -> None:
    """Remove what a run that was killed while saving has left. The caller holds the lock of the folder."""
    for leftover in (*run_dir.glob(WRITING + "*"), *run_dir.glob(REMOVING + "*")):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in run_dir.glob(REPLACED + "*"):
        final = run_dir / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # killed between the two renames: the earlier one is the only one
            os.rename(replaced, final)


def save(run_dir: Path, snapshot: Snapshot, keep: int, best_step: int | None = None, sharded: bool = False) -> Path:
    """Write the checkpoint of a snapshot, then remove all others but the newest, `keep` in all, and that of best_step.

    sharded: all processes have written their shards of weights and moments to the folder already.
    """
    final = run_dir / step_name(snapshot.step)
    whole = {"model.safetensors": snapshot.weights, "training.safetensors": snapshot.moments | snapshot.random}
    write(final, snapshot, {"random.safetensors": snapshot.random} if sharded else whole, sharded)
    for old in [c for c in candidates(run_dir) if c != final][keep - 1 :]:
        if old.name != step_name(best_step):
            remove(old)
    return final


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def step_name(step: int | None) -> str:
    """The name of a step's checkpoint; "" for what is not a step."""
    return f"step_{step:08d}" if type(step) is int else ""


def candidates(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, not yet verified."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if STEP_NAME.fullmatch(p.name) and p.is_dir()), reverse=True)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def write_config(folder: Path, cfg: Config) -> None:
    """The resolved configuration as config.json."""
    write_json(folder / "config.json", asdict(cfg))


class Saver:
    """Writes a run's checkpoints one after another: in a thread, or (background=False) while the caller waits.

    Every process has one, since sharded state is written by all; the main process writes the rest and renames the folder.
    """

    def __init__(self, run_dir: Path, world: parallel.World, sharded: bool, background: bool):
        self.run_dir, self.world, self.sharded, self.background = run_dir, world, sharded, background
        self.buffers: dict[str, Tensor] = {}
        self.thread = ThreadPoolExecutor(1, "saver")
        self.thread.submit(int)  # the thread starts now, while there is memory for its stack
        self.pending: Future | None = None
        # a group of its own: the thread's collectives must not mix with the steps'
        self.group = dist.new_group(backend="gloo") if sharded else None

    def save(self, snapshot: Snapshot, keep: int, best_step: int | None) -> None:
        """Begin to write a checkpoint, once the one before it is done. wait() returns the result."""
        if not self.sharded and not self.world.is_main:
            return
        final = self.run_dir / step_name(snapshot.step)
        if self.background:
            self.wait()
            snapshot = snapshot.copied({} if self.sharded else self.buffers)
        self.pending = self.thread.submit(self._write, final, snapshot, keep, best_step)
        if not self.background:
            wait([self.pending])

    def _write(self, final: Path, snapshot: Snapshot, keep: int, best_step: int | None) -> tuple[Path, float]:
        began = time.perf_counter()
        if self.sharded:
            self._write_shards(final, snapshot)
        if self.world.is_main:
            save(self.run_dir, snapshot, keep, best_step, self.sharded)
        return final, time.perf_counter() - began

    def _write_shards(self, final: Path, snapshot: Snapshot) -> None:
        """Write this process's shards of weights and moments. UserError in all processes if one of them fails."""
        import torch.distributed.checkpoint as dcp  # half a second, only where state is sharded

        folder, failed = beside(final, WRITING), None
        if self.world.is_main:
            try:
                new_folder(folder)
            except OSError as e:
                failed = e.strerror or str(e)
        if parallel.any_rank(failed is not None, torch.device("cpu"), self.group):
            raise save_error(final, failed or "process 0 cannot create the folder")
        try:
            writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(snapshot.weights | snapshot.moments, storage_writer=writer, process_group=self.group)
        except dcp.CheckpointException as e:  # raised in every process if it is in one
            shutil.rmtree(folder, ignore_errors=True)
            raise save_error(final, next(iter(e.failures.values()))[0]) from None

    def done(self) -> bool:
        """Whether a save has finished that wait() has not returned yet."""
        return self.pending is not None and self.pending.done()

    def wait(self) -> tuple[Path, float] | None:
        """(folder, seconds) of the save under way, once it is done; None without one. UserError if it failed."""
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        return pending.result()

    def close(self) -> None:
        self.thread.shutdown()
