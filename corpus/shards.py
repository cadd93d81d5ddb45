"""Token shards on disk: the format of a prepared data set, and opening one with every check.

A data set is a folder:  manifest.json  tokenizer.json  train_000000.bin …  val_000000.bin …
A shard is a 256-byte header followed by its tokens, little-endian uint16 (or uint32 for vocabularies over 65,536):

    offset  0   8 bytes   magic "NLADDER\\n"
            8   uint32    format version
           12   uint32    bytes per token
           16   uint32    vocabulary size
           20   uint64    number of tokens
           28   32 bytes  tokenizer's name, ASCII, zero-padded
"""

import difflib
import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base.errors import UserError
from base.files import open_regular, read_bytes, read_text, sha256_of, write_atomically
from corpus.sources import NAMED
from tokenizer import Tokenizer, from_json

MAGIC, VERSION, HEADER_BYTES = b"NLADDER\n", 1, 256
AGAIN = "prepare the data again (run python prepare_data.py … --force)"
CHECKED_AT_START = 2**26  # bytes; a larger shard is not read through at every start
LOOKED_AT = 2**20  # tokens of the training text, for one that a text begins after
HEADER = struct.Struct("<8sIIIQ32s")
MANIFEST = "manifest.json"


def header(tokenizer: Tokenizer, count: int) -> bytes:
    """The 256 bytes in front of a shard's tokens."""
    head = HEADER.pack(MAGIC, VERSION, bytes_per_token(tokenizer), tokenizer.vocab_size, count, tokenizer.name.encode("ascii"))
    return head.ljust(HEADER_BYTES, b"\0")


def bytes_per_token(tokenizer: Tokenizer) -> int:
    return 2 if tokenizer.vocab_size <= 2**16 else 4


def write_manifest(folder: Path, splits: dict[str, list[dict]], tokenizer: Tokenizer, source: str, **more) -> None:
    """splits: the entries of each split's shards. Comes last: without a manifest there is no data set."""
    write_atomically(folder / "tokenizer.json", tokenizer.to_json().encode())
    manifest = {"version": VERSION, "source": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    write_atomically(folder / MANIFEST, json.dumps(manifest | more | {"splits": splits}, indent=1).encode())


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, first: int = 0) -> None:
    """UserError with its place if a token is outside the vocabulary: on a GPU it would end in a device assertion."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where} is damaged: token {first + at} is {int(tokens[at])}, the vocabulary has {vocab_size}: {AGAIN}"
        )


def read_shard(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a shard as a read-only memory map; UserError names what is wrong with the file."""
    try:
        with open_regular(path) as f:
            size, head = os.fstat(f.fileno()).st_size, f.read(HEADER_BYTES)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}: {AGAIN}") from None
    if head[:8] != MAGIC:
        raise UserError(f"{path} is not a token shard of this program (it begins with {head[:8]!r}): {AGAIN}")
    if size < HEADER_BYTES:
        raise UserError(f"{path} is cut off inside its header: {AGAIN}")
    _, version, width, vocab_size, count, name = HEADER.unpack_from(head)
    name = name.rstrip(b"\0").decode("ascii", errors="replace")
    if version != VERSION:
        raise UserError(f"{path} has format version {version}, this program reads {VERSION}: {AGAIN}")
    if width not in (2, 4):
        raise UserError(f"{path} has {width} bytes per token, allowed are 2 and 4: {AGAIN}")
    if size != HEADER_BYTES + width * count:
        expected = HEADER_BYTES + width * count
        raise UserError(f"{path} is damaged: {count} tokens should take {expected} bytes, not {size}: {AGAIN}")
    if (name, vocab_size) != (tokenizer.name, tokenizer.vocab_size):
        raise UserError(
            f"{path} was made with the tokenizer {name} (vocabulary {vocab_size}), but its data set uses {tokenizer.name} "
            f"(vocabulary {tokenizer.vocab_size}): {AGAIN}"
        )
    if count == 0:
        return np.empty(0, dtype=f"<u{width}")
    tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=HEADER_BYTES, shape=(count,))
    if size <= CHECKED_AT_START:  # TokenStream.read looks at every token again
        check_ids(tokens, vocab_size, str(path))
    return tokens


def start_of(tokenizer: Tokenizer, train: list[np.ndarray]) -> int:
    """What an empty prompt begins with: a token after which the training text begins anew, <|endoftext|> or a line break;
    its first token if it has neither. An id that was never trained would be followed by noise."""
    seen = train[0][:LOOKED_AT] if train else []
    for token in (tokenizer.end_of_text, tokenizer.newline):
        if token is not None and token in seen:
            return token
    return int(seen[0]) if len(seen) else tokenizer.start


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: its tokenizer, and the shards of each split as memory maps."""

    folder: Path
    tokenizer: Tokenizer
    splits: dict[str, list[np.ndarray]]
    sha256: str  # of the manifest, which holds every shard's: two data sets with equal sha256 are equal

    def split(self, name: str) -> "TokenStream":
        return TokenStream(self.splits[name], self.tokenizer.vocab_size)


def open_dataset(folder: Path) -> Dataset:
    """Open a folder made by prepare_data.py and check every header, and the sha256 of shards up to 64 MiB.

    UserError with the command to run if something is wrong.
    """
    if not os.path.isfile(folder / MANIFEST):  # unlike Path.is_file, False for a name that is too long
        what = folder.name if folder.name in NAMED else f"path/to/your.txt --name={folder.name}"
        others = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
        have = f" ({folder.parent} has {', '.join(others)})" if others else ""
        near = difflib.get_close_matches(folder.name, [] if folder.name in NAMED else [*others, *NAMED], n=1, cutoff=0.7)
        meant = f"did you mean {near[0]}? Else " if near else ""
        raise UserError(f"{folder} has no prepared data{have}: {meant}run python prepare_data.py {what}")
    try:
        raw = read_bytes(folder / MANIFEST)
        manifest = json.loads(raw)
        tokenizer = from_json(read_text(folder / "tokenizer.json"))
        version = manifest["version"]
        files = {split: {str(e["file"]): e["sha256"] for e in entries} for split, entries in manifest["splits"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise UserError(f"{folder} is damaged ({type(e).__name__}: {e}): {AGAIN}") from None
    for split in ("train", "val"):
        if split not in files:
            raise UserError(f"{folder} has no {split} split: {AGAIN}")
    if bad := [f for names in files.values() for f in names if not re.fullmatch(r"[\w.-]{1,100}\.bin", f, re.ASCII)]:
        raise UserError(f"{folder}/{MANIFEST} names {bad[0][:100]!r}, which is not a shard of its folder: {AGAIN}")
    if version != VERSION:
        raise UserError(f"{folder}/{MANIFEST} has version {version!r}, this program reads {VERSION}: {AGAIN}")
    splits = {split: [read_shard(folder / f, tokenizer) for f in names] for split, names in files.items()}
    for path, digest in ((folder / f, digest) for names in files.values() for f, digest in names.items()):
        if path.stat().st_size <= CHECKED_AT_START and sha256_of(path) != digest:
            raise UserError(f"{path} is damaged: its sha256 is not the manifest's: {AGAIN}")
    tokenizer.start = start_of(tokenizer, splits["train"])
    return Dataset(folder, tokenizer, splits, hashlib.sha256(raw).hexdigest())


class TokenStream:
    """The shards of a split as one long sequence of tokens."""

    def __init__(self, shards: list[np.ndarray], vocab_size: int = 2**32):
        self.shards, self.vocab_size = shards, vocab_size
        self.ends = np.cumsum([len(s) for s in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as int64, across shard borders."""
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            offset = start - (int(self.ends[shard]) - len(self.shards[shard]))
            part = self.shards[shard][offset : offset + count]
            check_ids(part, self.vocab_size, str(getattr(self.shards[shard], "filename", "the data")), offset)
            parts.append(part.astype(np.int64))
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)
