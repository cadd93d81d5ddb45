"""Write a data set of any size: shards that are whole or absent, and progress from which killed work resumes.

While a data set is being made its folder holds, beside full shards, <shard>.bin.partial and progress.json: the position in the
text, and how far each split's files are safe on the disk. Both belong to one batch, and resume from there together, so the
shards come out byte for byte as those of work that was never interrupted. The manifest comes last.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from base import files
from base.errors import UserError
from base.files import read_text, write_atomically
from corpus import encoding, shards
from corpus.shards import AGAIN, HEADER_BYTES, bytes_per_token, header
from corpus.sources import BadText, Part, Reader
from tokenizer import Tokenizer

PROGRESS = "progress.json"
SHORTEST = 65  # tokens in a split: a sequence of the smallest configs, and the token that follows it
SAVE_SECONDS = 10.0  # between two saves of the progress: what a kill costs at most
LOG_SECONDS = 60.0  # between two lines of it where there is no terminal for a bar
BATCH = 2**19  # characters or bytes; a worker takes 25 ms for them
OURS = re.compile(r"(train|val|test)_\d{6}\.bin(\.partial)?")
TEMPORARY = r"\.\w+\.json\.\d+"  # what a kill leaves of write_atomically()'s


class ShardWriter:
    """Writes a split's tokens into shards of shard_tokens each, the last shorter; resumes where a killed one stopped.

    A shard grows in <name>.partial and gets its name when it is full. Its header has the count of a full one from the start, so
    the sha256 can be computed along the way, and no byte of a full shard is read again.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int, saved: dict | None = None):
        """saved: what save() returned; UserError if the files are not as they were then."""
        self.folder, self.split, self.tokenizer, self.shard_tokens = folder, split, tokenizer, shard_tokens
        self.dtype = np.dtype(f"<u{bytes_per_token(tokenizer)}")
        self.entries: list[dict] = saved["shards"] if saved else []  # of the manifest
        self.file: IO | None = None
        self.tokens = 0  # in the shard that is open
        for entry in self.entries:
            path = folder / entry["file"]
            if not path.is_file() or path.stat().st_size != HEADER_BYTES + self.dtype.itemsize * entry["tokens"]:
                raise UserError(f"{path} has changed since: {AGAIN}")
        if saved and saved["tokens"]:
            self._reopen(saved["tokens"], saved["sha256"])

    def __len__(self) -> int:
        return sum(entry["tokens"] for entry in self.entries) + self.tokens

    @property
    def path(self) -> Path:
        """Of the shard that is being written."""
        return self.folder / f"{self.split}_{len(self.entries):06d}.bin"

    @property
    def partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def _open(self) -> None:
        self.file = open(self.partial, "w+b")
        head = header(self.tokenizer, self.shard_tokens)
        self.file.write(head)
        self.sha256 = hashlib.sha256(head)

    def _reopen(self, tokens: int, sha256: str) -> None:
        if not self.partial.is_file() and self.path.is_file():
            os.replace(self.path, self.partial)  # it was completed just before the kill
        try:
            self.file = open(self.partial, "r+b")
            self.file.write(header(self.tokenizer, self.shard_tokens))  # the last shard's has another count
            self.file.truncate(HEADER_BYTES + self.dtype.itemsize * tokens)
            self.file.seek(0)
            self.sha256 = hashlib.file_digest(self.file, "sha256")
        except OSError as e:
            raise UserError(f"cannot continue {self.partial}: {e.strerror}: {AGAIN}") from None
        if self.sha256.hexdigest() != sha256:
            raise UserError(f"{self.partial} has changed since: {AGAIN}")
        self.tokens = tokens

    def write(self, ids: np.ndarray) -> None:
        """Append some ids, of the shards' own dtype."""
        assert ids.dtype == self.dtype, "ids must fit the shard"
        while len(ids):
            if self.file is None:
                self._open()
            part, ids = np.split(ids, [self.shard_tokens - self.tokens])
            self.file.write(part.data)
            self.sha256.update(part.data)
            self.tokens += len(part)
            if self.tokens == self.shard_tokens:
                self._close()

    def _close(self) -> None:
        """The open shard is whole."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)
        self.entries.append({"file": self.path.name, "tokens": self.tokens, "sha256": self.sha256.hexdigest()})
        self.file, self.tokens = None, 0

    def save(self) -> dict:
        """Flush to the disk; what to pass as `saved` to continue from here, as JSON."""
        if self.file is None:
            return {"shards": list(self.entries), "tokens": 0}
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": list(self.entries), "tokens": self.tokens, "sha256": self.sha256.hexdigest()}

    def finish(self) -> list[dict]:
        """Close the last shard; the manifest's entries [{file, tokens, sha256}]."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(header(self.tokenizer, self.tokens))
            self.file.seek(0)
            self.sha256 = hashlib.file_digest(self.file, "sha256")
            self._close()
        return self.entries


def batches(reader: Reader) -> Iterator[tuple[tuple[dict, float], encoding.Batch]]:
    """Batches of about BATCH characters or bytes, each with the reader's position behind it and the text's share so far."""
    batch: encoding.Batch = {}
    size = 0
    for group in reader:
        for split, text, separated in group:
            batch.setdefault(split, []).append((text, separated))
            size += len(text)
        if size >= BATCH:
            yield (reader.position, reader.share()), batch
            batch, size = {}, 0
    if batch:
        yield (reader.position, 1.0), batch


def digest(progress: dict) -> str:
    """sha256 of the saved progress: a changed position would go unnoticed otherwise."""
    return hashlib.sha256(json.dumps(progress).encode()).hexdigest()


def fill(
    folder: Path,
    parts: list[Part],
    every: int,
    tokenizer: Tokenizer,
    progress: dict,
    processes: int,
    shard_tokens: int,
    tokens: int,
) -> dict:
    """Encode all parts into shards, from where `progress` is; it is updated and saved as the work goes on.

    every: as for sources.Reader; tokens: about how many there will be, 0: not known. Returns the manifest's splits, and how
    many documents each has.
    """
    saved = progress.get("splits", {})
    opened = {s: ShardWriter(folder, s, tokenizer, shard_tokens, state) for s, state in saved.items()}
    reader = Reader(parts, every, progress.get("position"))
    position = reader.position

    def save() -> None:
        progress.update(position=position, splits={split: writer.save() for split, writer in opened.items()})
        write_atomically(folder / PROGRESS, json.dumps({"sha256": digest(progress), "progress": progress}).encode())

    save()  # from here on the folder is known to be ours
    began = last = logged = time.monotonic()
    full = sum(len(writer.entries) for writer in opened.values())
    done = before = sum(map(len, opened.values()))
    with (
        tqdm(initial=done, unit="tok", unit_scale=True, desc=folder.name, disable=None, leave=False) as bar,
        contextlib.closing(encoding.encode(tokenizer, batches(reader), processes)) as encoded,
    ):
        for (behind, share), ids_of in encoded:
            for split, ids in ids_of.items():
                if split not in opened:
                    opened[split] = ShardWriter(folder, split, tokenizer, shard_tokens)
                opened[split].write(ids)
            position, done = behind, sum(map(len, opened.values()))
            bar.total = round(done / share) if share else tokens or None
            bar.update(done - bar.n)
            complete = sum(len(writer.entries) for writer in opened.values())
            now = time.monotonic()
            if complete > full or now - last > SAVE_SECONDS:
                save()
                last, full = now, complete
            if bar.disable and now - logged > LOG_SECONDS:
                rate, logged = (done - before) / (now - began), now
                left = f", {(bar.total - done) / rate / 60:,.0f} min left" if bar.total else ""
                print(f"{folder}: {done:,} tokens, {rate:,.0f} tok/s{left}")
    splits = {split: opened[split].finish() for split in ("train", "val", "test") if split in opened}
    return {"splits": splits, "documents": position["documents"]}


def check_length(splits: dict[str, list[dict]]) -> None:
    """BadText unless the splits, given by their shards, are long enough to train and to validate on."""
    for split in ("train", "val"):
        if (tokens := sum(entry["tokens"] for entry in splits.get(split, []))) < SHORTEST:
            raise BadText(f"there is too little text to train on: the {split} split has {tokens} tokens of at least {SHORTEST}")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Claim a data set's folder; UserError if another process makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = files.lock(folder, f"another process is preparing {folder}: wait for it, or use --name=another")
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def nothing_half_made(folder: Path) -> Iterator[None]:
    """Remove the folder after an error, unless it holds work that the same command can resume."""
    try:
        yield
    except Exception as e:
        if isinstance(e, BadText | encoding.CannotEncode) or not any(folder.glob("*.bin*")):
            clean(folder, finished=False)
            for name in ("tokenizer.json", ".lock"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds files of somebody else
                folder.rmdir()
        raise


def read_progress(folder: Path, request: dict) -> dict:
    """What an interrupted run of the same request has saved; UserError if it was another request."""
    try:
        content = json.loads(read_text(folder / PROGRESS))
        progress = content["progress"]
        if digest(progress) != content["sha256"]:
            raise ValueError("sha256")
        before = dict(progress["request"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
        raise UserError(f"{folder / PROGRESS} is damaged ({type(e).__name__}): use --force to start again") from None
    if differs := [name for name, value in request.items() if before.get(name) != value]:
        was = ", ".join(f"{name} was {str(before.get(name))[:80]}" for name in differs)
        raise UserError(f"{folder} is incomplete, from another request ({was}): use --force to start again, or --name=another")
    return progress


def clean(folder: Path, finished: bool) -> None:
    """Remove what a killed run has left half written; unless finished, also what it has written."""
    half = rf"{re.escape(PROGRESS)}|{TEMPORARY}"
    written = rf"{re.escape(shards.MANIFEST)}|{OURS.pattern}"
    for path in folder.iterdir():
        if re.fullmatch(half if finished else f"{half}|{written}", path.name):
            path.unlink()
