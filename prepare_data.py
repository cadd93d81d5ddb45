"""Text -> checked token shards in data/<name>/, ready for train.py, on all cores. Killed work resumes where it stopped.

    python prepare_data.py shakespeare          tiny Shakespeare in GPT-2 tokens: 301,966 train, 36,059 val
    python prepare_data.py shakespeare_bpe      the same in a BPE of 2,048 ids, learned from its train split
    python prepare_data.py shakespeare_char     the same, one id per character
    python prepare_data.py my.txt notes/ 'more/*.md'    your own text, into data/my
    python prepare_data.py my.txt --tokenizer=bpe --vocab_size=8192     the same, with a BPE learnt from it
    python prepare_data.py stories.txt --separator='<|endoftext|>'      many documents in one file
    python prepare_data.py rows/ --column=text  .jsonl and .parquet files: a document a row
    python prepare_data.py enwik8               10**8 bytes of Wikipedia, cut as usual: 90M train, 5M val, 5M test
    python prepare_data.py tinystories          from the Hugging Face hub, like openwebtext and fineweb_edu (10B tokens, 20 GB)
    python prepare_data.py hf:owner/name --subset=… --split=train --column=text     any other data set of the hub
    python prepare_data.py hellaswag            the 10,042 questions of evaluate.py --hellaswag

Text files are one text: the first 90% of their characters train, the rest validates. Of rows and separated documents every
hundredth validates, from the first on, whatever the size of shards. Texts are UTF-8 in every locale, line ends stay.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import configurator
from base import errors, settings, system
from base.download import Source, cached
from base.errors import UserError
from base.files import read_text, write_atomically
from corpus import bpe, encoding, hellaswag, shards, sources, writing
from corpus.sources import ENWIK8, NAMED, Hub, Part, Reader, TextPart
from tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, from_json

BPE_SIZE = 2048  # ids of a BPE, unless told otherwise: those of config/shakespeare.py
LEARNT_FROM = 2**30  # characters of the train split, from its start, that a BPE is learnt from: 2 minutes on one core
CONFIGS = {  # data set -> what trains on it as it is
    "shakespeare": "config/shakespeare_124m.py",
    "shakespeare_bpe": "config/shakespeare.py",
    "shakespeare_char": "config/shakespeare_char_cpu.py",
    "enwik8": "config/enwik8.py",
    "openwebtext": "config/openwebtext_124m.py",
    "fineweb_edu": "config/gpt2_124m.py",
}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How to make a data set from text."""

    tokenizer: str = "gpt2"
    """gpt2: GPT-2's BPE, 50,257 ids; bpe: one learnt from the train split; char: one id per character; or a folder with a
    tokenizer.json, of a data set or a checkpoint, to use it again"""
    vocab_size: int = 0
    """how many ids --tokenizer=bpe has; 0: 2,048"""
    name: str = ""
    """name of the data set; empty: the name of the file or folder"""
    data_dir: str = "data"
    """folder of the data sets"""
    val_fraction: float = 0.0
    """share that validates: of a text the last characters, of documents every n-th; 0: 0.1 of a text, 0.01 of documents"""
    separator: str = ""
    """what stands between the documents of a text file, e.g. '<|endoftext|>'; empty: a file is one document"""
    column: str = "text"
    """where the text is in a row of .jsonl, .parquet or the hub"""
    subset: str = ""
    """hf: which configuration of the data set; empty: its only or default one"""
    split: str = "train"
    """hf: which of its splits to read; both of ours are made of it"""
    revision: str = ""
    """hf: a branch or commit; empty: the newest"""
    shard_tokens: int = 100_000_000
    """tokens in a shard; the last of a split may have fewer"""
    processes: int = 0
    """how many processes tokenize; 0: one for each core. The shards do not depend on it"""
    force: bool = False
    """make it again even if it already exists"""

    def __post_init__(self):
        settings.check_types(vars(self), PrepareConfig)
        settings.check_at_least(self, 1, "shard_tokens")
        settings.check_at_least(self, 0, "processes")
        if self.val_fraction and not 0.0 < self.val_fraction < 1.0:
            raise UserError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.vocab_size and self.tokenizer != "bpe":
            raise UserError(f"vocab_size={self.vocab_size} needs --tokenizer=bpe: {self.tokenizer} has its own")

    def only_with(self, what: str, *names: str) -> None:
        """UserError if one of the settings is given, which only mean something for `what`."""
        for name in names:
            if getattr(self, name) != getattr(PrepareConfig, name):
                raise UserError(f"--{name}={getattr(self, name)} is for {what}: leave it out")


@dataclass(frozen=True)
class Plan:
    """What the command line means, before anything is written."""

    name: str
    kind: str  # of tokenizer
    parts: list[Part]
    source: str  # in words, for the manifest
    identity: list  # of the text: as long as it is equal, interrupted work can resume
    tokens: int = 0  # about how many there will be; 0: by size
    more: dict = field(default_factory=dict)  # for the manifest


# ---- what to read -----------------------------------------------------------------------------------------------------


def local_copy(source: Source, data_dir: str) -> Path:
    """The file of a source, kept in data_dir/.sources so that it is downloaded once."""
    path = Path(data_dir) / ".sources" / source.sha256[:16]
    cached(source, path, remedy="use --data_dir=another/folder")
    return path


def plan(cfg: PrepareConfig, patterns: list[str]) -> Plan:
    """What the arguments mean. Reads every text once, so that what cannot be read does not replace anything."""
    first = patterns[0]
    kind, where = NAMED[first] if len(patterns) == 1 and first in NAMED else (cfg.tokenizer, None)
    if cfg.tokenizer != PrepareConfig.tokenizer:
        kind = cfg.tokenizer
    if any(p.startswith("hf:") for p in patterns):
        if len(patterns) > 1:
            raise UserError("only one data set of the hub at a time: run python prepare_data.py hf:owner/name")
        where = Hub(first.removeprefix("hf:"), cfg.subset, {"": cfg.split}, 0)
    else:
        cfg.only_with("a data set of the hub (hf:owner/name)", "subset", "split", "revision")
    stem = where.name.rpartition("/")[2] if isinstance(where, Hub) else Path(first).resolve().stem.strip("*?[]")
    named = first in NAMED and where is not None
    name = cfg.name or (first if named else stem) or "mine"
    if not cfg.name and (len(patterns) > 1 or not stem):
        print(f"the data set is named {name}: use --name=… for another name")
    if Path(name).name != name or len(os.fsencode(name)) > 200:
        raise UserError(f"name={name[:200]!r} must be a plain name of at most 200 bytes, not a path")
    if where is not None:
        cfg.only_with("your own text files", "separator")

    if isinstance(where, Hub):
        if "" not in where.splits:
            cfg.only_with("texts without splits of their own", "val_fraction")
        revision = sources.hub_revision(where.name, cfg.revision)
        parts = sources.hub_parts(where.name, where.subset, where.splits, cfg.column, revision)
        source = f"hf:{where.name} {where.subset}".strip()
        identity = [revision, *where.splits.values()]
        return Plan(name, kind, parts, source, identity, where.tokens, {"revision": revision})
    files = [local_copy(where, cfg.data_dir)] if where else sources.find(patterns, [*NAMED, "hellaswag"])
    rows = [p for p in files if p.suffix.lower() in sources.ROW_SUFFIXES]
    if not rows:
        cfg.only_with(".jsonl and .parquet files and the hub", "column")
    if where == ENWIK8:  # its usual splits, e.g. in Al-Rfou et al. 2018; no character is cut
        cuts = [0, 90_000_000, 95_000_000, 100_000_000]
        parts = [TextPart(files[0], *args) for args in zip(("train", "val", "test"), cuts, cuts[1:], strict=False)]
        cfg.only_with("texts without splits of their own", "val_fraction")
    elif rows or cfg.separator:
        if cfg.val_fraction > 0.5:
            raise UserError(f"val_fraction={cfg.val_fraction} must be at most 0.5 of documents, every second one")
        parts = [sources.file_part(path, cfg.column, cfg.separator) for path in files]
    else:
        parts = sources.text_parts(files, cfg.val_fraction or 0.1)
        if hinted := next((p for p in files if sources.mentions(p, END_OF_TEXT)), None):
            print(f"{hinted} contains <|endoftext|>, read as text: use --separator='<|endoftext|>' to make documents of it")
    if windows := next((p for p in files if p not in rows and sources.mentions(p, "\r\n")), None):
        print(f"{windows} has Windows line ends (CRLF), which are kept: to remove them, run tr -d '\\r' on it first")
    if not sum(part.size for part in parts):
        raise UserError(f"{', '.join(patterns)} has no text in it")
    identity = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files] if where is None else [where.sha256]
    return Plan(name, kind, parts, first if named else ", ".join(patterns), identity)


def make_tokenizer(cfg: PrepareConfig, todo: Plan, every: int) -> Tokenizer:
    """The tokenizer of a data set: known, learnt from it, or read from a folder; UserError if there is none."""

    def texts(splits: set[str]) -> Iterator[str]:
        found = (text for group in Reader(todo.parts, every) for split, text, _ in group if split in splits)
        return (text.decode() if isinstance(text, bytes) else text for text in found)

    if todo.kind == "gpt2":
        return GPT2Tokenizer()
    if todo.kind == "char":
        characters: set[str] = set()
        for text in texts({"train", "val", "test"}):  # a character of the val split must have its id
            characters.update(text)
        return CharTokenizer(sorted(characters))
    if todo.kind == "bpe":
        read = 0

        def enough(text: str) -> bool:
            nonlocal read
            read += len(text)
            return read <= LEARNT_FROM

        learnt = bpe.train(takewhile(enough, texts({"train"})), cfg.vocab_size or BPE_SIZE, processes=cfg.processes)
        if learnt.vocab_size < (wanted := cfg.vocab_size or BPE_SIZE):
            why = "each word of the train split is already one token, so there is nothing left to merge"
            print(f"the BPE ends at {learnt.vocab_size:,} of {wanted:,} ids: {why}")
        return learnt
    try:
        return from_json(read_text(Path(todo.kind) / "tokenizer.json"))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"tokenizer={todo.kind!r} is not gpt2, bpe, char or a folder with a tokenizer.json") from None


# ---- the work ---------------------------------------------------------------------------------------------------------


def check_space(folder: Path, todo: Plan, tokenizer: Tokenizer) -> None:
    """UserError if the shards will not fit, as far as one can tell beforehand."""
    per_token = 1 if isinstance(tokenizer, CharTokenizer) else 3  # bytes of text; English has 4 and more
    tokens = todo.tokens or sum(part.size for part in todo.parts) // per_token
    there = sum(p.stat().st_size for p in folder.glob("*.bin*"))  # of an interrupted run, or to be replaced
    needed = shards.bytes_per_token(tokenizer) * tokens + 2**20 - there
    existing = next(p for p in [folder.resolve(), *folder.resolve().parents] if p.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(
            f"{existing} has {free >> 20:,} MiB free; this data set needs {needed >> 20:,} MiB: use --data_dir=another/folder"
        )


def prepare(cfg: PrepareConfig, todo: Plan) -> dict:
    """Make a data set, or what is left of it to make. Returns what writing.fill() does, and the tokenizer."""
    folder, processes = Path(cfg.data_dir) / todo.name, cfg.processes or system.cores()
    every = round(1 / (cfg.val_fraction or 0.01))
    request = dict(source=todo.source, text=todo.identity, tokenizer=todo.kind, vocab_size=cfg.vocab_size)
    request |= dict(val_fraction=cfg.val_fraction, shard_tokens=cfg.shard_tokens, separator=cfg.separator, column=cfg.column)
    progress = {} if cfg.force else writing.read_progress(folder, request)
    if progress:
        print(f"{folder} is incomplete: resuming where it stopped")
    fixed = {part.split for part in todo.parts}
    if "" not in fixed and (empty := {"train", "val"} - fixed):
        raise UserError(f"the text is too short: its {min(empty)} split is empty")
    kind = str(folder) if progress else todo.kind
    tokenizer = make_tokenizer(cfg, replace(todo, kind=kind), every)
    check_space(folder, todo, tokenizer)
    try:
        with writing.lock(folder), writing.nothing_half_made(folder):
            if not progress:
                writing.clean(folder, finished=False)
                write_atomically(folder / "tokenizer.json", tokenizer.to_json().encode())
                progress = {"request": request}
            made = writing.fill(folder, todo.parts, every, tokenizer, progress, processes, cfg.shard_tokens, todo.tokens)
            writing.check_length(made["splits"])
            cut = all(isinstance(part, TextPart) and part.split for part in todo.parts)  # then there is nothing to count
            more = {} if cut else {"documents": made["documents"]}
            shards.write_manifest(folder, made["splits"], tokenizer, todo.source, **more, **todo.more)
            writing.clean(folder, finished=True)
    except KeyboardInterrupt:
        print(f"\n{folder} is incomplete: run the same command again to resume", file=sys.stderr)
        raise
    except BrokenPipeError:
        raise  # from the reader of our output: errors.entry handles it
    except OSError as e:
        remedy = "use --data_dir=another/folder, or make room and run the same command again to resume where it stopped"
        raise UserError(f"cannot write {folder}: {e.strerror}; {remedy}") from None
    except encoding.CannotEncode as e:
        raise UserError(f"{todo.source}: {e}") from None
    return made | {"tokenizer": tokenizer}


def main(argv: list[str]) -> None:
    patterns, flags = settings.split_positional(PrepareConfig(), argv)
    cfg = settings.parse(PrepareConfig(), flags, __doc__)
    if not patterns:
        names = ", ".join([*NAMED, "hellaswag"])
        raise UserError(f"which text? run python prepare_data.py {names}, hf:owner/name, or path/to/your.txt")
    if patterns == ["hellaswag"]:
        count = len(hellaswag.load_rows(cfg.data_dir))
        other = [f"--data_dir={cfg.data_dir}"] if cfg.data_dir != PrepareConfig.data_dir else []
        print(f"{count:,} questions; next:", shlex.join(["python", "evaluate.py", "gpt2", "--hellaswag", *other]))
        return
    named = patterns[0] if len(patterns) == 1 and patterns[0] in NAMED else None
    folder = Path(cfg.data_dir) / (cfg.name or named or "")
    if named and not cfg.force and os.path.isfile(folder / shards.MANIFEST):
        existing = shards.open_dataset(folder)
        counts = ", ".join(f"{len(existing.split(s)):,} {s} tokens" for s in existing.splits)
        print(f"{folder} already exists ({counts}); --force makes it again")
        return print_next(cfg, folder.name, existing.tokenizer)
    report(cfg, *make(cfg, patterns))


def make(cfg: PrepareConfig, patterns: list[str]) -> tuple[Plan, dict]:
    """Plan, check that the folder is free, and prepare."""
    todo = plan(cfg, patterns)
    folder = Path(cfg.data_dir) / todo.name
    if not cfg.force and os.path.isfile(folder / shards.MANIFEST):
        raise UserError(f"{folder} already exists: use --force to replace it, or --name=another")
    if os.path.isdir(folder) and not any((folder / name).is_file() for name in (shards.MANIFEST, writing.PROGRESS)):
        first = re.compile(rf"\.lock|tokenizer\.json|{writing.TEMPORARY}")  # all there is of work killed at its very start
        names = {p.name for p in folder.iterdir()}
        if not any(writing.OURS.fullmatch(n) for n in names) and not all(first.fullmatch(n) for n in names):
            raise UserError(f"{folder} has other files in it: use --name=another")
    return todo, prepare(cfg, todo)


def report(cfg: PrepareConfig, todo: Plan, made: dict) -> None:
    """Print what has been made, and what to do with it."""
    folder, tokenizer = Path(cfg.data_dir) / todo.name, made["tokenizer"]
    for entries in made["splits"].values():
        files = f"{entries[0]['file']} … {entries[-1]['file']}" if len(entries) > 1 else entries[0]["file"]
        print(f"{folder}/{files}: {sum(e['tokens'] for e in entries):,} tokens of {tokenizer.vocab_size:,}")
    print_next(cfg, todo.name, tokenizer)


def print_next(cfg: PrepareConfig, name: str, tokenizer: Tokenizer) -> None:
    """Print the commands that train on a data set, and sample from the run."""
    wanted = {"dataset": name, "vocab_size": tokenizer.vocab_size}
    usual = CONFIGS[{CharTokenizer: "shakespeare_char", BPETokenizer: "shakespeare_bpe"}.get(type(tokenizer), "shakespeare")]
    base = CONFIGS.get(name, usual)
    if any(getattr(configurator.load_file(base), setting) != value for setting, value in wanted.items()):
        base = usual
    wanted["data_dir"] = cfg.data_dir
    file = configurator.load_file(base)
    changed = [f"--{setting}={value}" for setting, value in wanted.items() if getattr(file, setting) != value]
    print("next:", shlex.join(["python", "train.py", base, *changed]))
    print("then:", shlex.join(["python", "sample.py", configurator.load([base, *changed], "").out_dir]))


if __name__ == "__main__":
    errors.entry(main)
