"""A byte-level BPE of one's own: training, encoding, streams of any length. tokenizer.py reads it back from files.

A tokenizer is a list of merges. Training finds them by repeating one step: count the neighbours in the text, and make the pair
that occurs most often one new token. Take `aaabdaaabac`, 11 bytes and so 10 pairs: aa 4, ab 2, and bd, da, ba, ac once each.

    256 = a+a      ->  [aa] a b d [aa] a b a c      11 tokens become 9; now [aa]a and ab twice, four others once
    257 = [aa]+a   ->  [aaa] b d [aaa] b a c         9 tokens become 7; the tie went to [aa]a because "aa" > "a"
    258 = [aaa]+b  ->  [aaab] d [aaab] a c           7 tokens become 5; now every pair occurs once

Three rules make this exact. Overlaps count: `aaa` holds the pair aa twice, though merging, from left to right, takes it once.
Equal counts: the greater pair wins, compared as (bytes of the left token, bytes of the right one). And no pair reaches over the
pieces that GPT-2's pattern cuts a text into, so a text is for training no more than its distinct pieces with their counts.

The fast way to the same merges (learn_merges): a merge changes few pieces and, within them, only the pairs beside it. So an
index says which pieces hold a pair, and a heap which pair is the most frequent; both may lag behind and are checked on use.

Encoding applies the merges to each piece in the order of their making. tiktoken does it (libraries first): it joins whichever
neighbours spell the earliest token, and for trained merges that is the same: how a stretch of bytes is merged, as long as no
token reaches over its ends, depends on nothing outside it, so there is only one pair of tokens that ever becomes these bytes.

Vocabulary: 256 bytes, the merges in order, the special tokens, <|endoftext|> last as in GPT-2.
"""

import functools
import hashlib
import heapq
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, pairwise
from pathlib import Path

import regex
import tiktoken

from model import UserError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's pattern: contractions; letters, digits, other signs, each with a space before; white space, but for the last before a
# word. The possessive ++ changes no match and saves backtracking. regex and tiktoken may know different versions of Unicode: a
# character newer than one of them is cut differently in training and in encoding, which costs compression and nothing else.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PIECES = regex.compile(PATTERN)
MAX_VOCAB = 2**20  # learn_merges writes a token as one character, of which there are 1,114,112
MAX_BYTES = 2**26  # of all tokens together: a stranger's 60 merges could spell 2**60 bytes
ENCODED_AT_ONCE = 2**18  # characters; from 1,000,000 white spaces on, followed by a word, tiktoken's engine gives up
COUNTED_AT_ONCE = 2**22  # characters; a third of a second, against which starting a task is nothing
COUNTED_ALONE = 8  # blocks; a shorter text is counted before other processes have started


def read_chunks(path: Path, size: int = 2**20) -> Iterator[str]:
    """The text of a UTF-8 file, `size` characters at a time, line ends as they are; UserError if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            while chunk := f.read(size):
                yield chunk
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: convert it first, e.g. with iconv -t utf-8") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def blocks(text: str | Iterable[str], special_tokens=(END_OF_TEXT,), size: int = ENCODED_AT_ONCE) -> Iterator[str]:
    """The same text, cut only where encoding the parts gives the ids of the whole: at the first such place from `size` on.

    text: a string, or chunks of one cut anywhere. Memory: two blocks and a chunk, while there are words with spaces between.
    A cut is safe before a white space that is followed by none. No piece reaches over it: within a piece, white space follows
    white space only, and a run of it leaves its last to what follows. And the text before the cut is cut into the same pieces
    without the rest, because `\\s++$` takes a run at the end as `\\s+(?!\\S)` would have taken it.
    A special token ends the run before it, last space included: hence no cut where one could begin.
    """
    assert size > 0, "a block needs a length"
    # regex, not re: its white space is tiktoken's, re's has the separators 0x1c to 0x1f as well
    border = regex.compile(rf"\s(?=[^\s{regex.escape(''.join(sorted({t[0] for t in special_tokens})))}])")
    chunks = [text] if isinstance(text, str) else text
    held, seen = "", size  # there is no border in held[size:seen]
    for part in (chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size)):
        held += part
        while found := border.search(held, seen):
            yield held[: found.start()]
            held, seen = held[found.start() :], size
        seen = max(seen, len(held) - 1)  # the last character may be a border still
    if held:
        yield held


def splitter(special_tokens: Sequence[str]) -> re.Pattern:
    """Splits a text at its special tokens, and keeps them at the odd places; the longest first where several begin."""
    return re.compile("(" + "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True)) + ")")


def count_block(block: str, special_tokens: Sequence[str]) -> Counter[str]:
    """How often each piece occurs between the special tokens of a block."""
    return Counter(chain.from_iterable(map(PIECES.findall, splitter(special_tokens).split(block)[::2])))


def count_pieces(texts: Iterable[str], special_tokens: Sequence[str], processes: int | None = None) -> Counter[str]:
    """How often each piece occurs in all texts; one core takes 2 minutes per GB. The counts do not depend on `processes`."""
    processes = processes or os.cpu_count() or 1
    todo = chain.from_iterable(blocks(text, special_tokens, COUNTED_AT_ONCE) for text in texts)
    count = functools.partial(count_block, special_tokens=special_tokens)
    counts: Counter[str] = Counter()
    first = list(islice(todo, COUNTED_ALONE))
    todo = chain(first, todo)
    with ProcessPoolExecutor(processes) as pool:  # starts them when they are first used
        each = pool.map if processes > 1 and len(first) == COUNTED_ALONE else map
        while batch := list(islice(todo, 4 * processes)):  # pool.map alone would read all of a text before the first result
            for part in each(count, batch):
                counts.update(part)
    return counts


def learn_merges(pieces: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The textbook's merges for these pieces and their counts; fewer than n_merges if no pair of tokens is left.

    A token is one character here and a piece a string of them, so that merging is replacing, from left to right, at C's speed.
    """
    words = [piece.encode(errors="replace").decode("latin-1") for piece in pieces]  # chr(0)…chr(255) are the bytes
    weights = list(pieces.values())
    counts: defaultdict[str, int] = defaultdict(int)  # pair -> occurrences, exact until it is merged
    holders: defaultdict[str, set[int]] = defaultdict(set)  # pair -> words that hold it, and some that no longer do
    for w, word in enumerate(words):
        for pair in map("".join, pairwise(word)):
            counts[pair] += weights[w]
            holders[pair].add(w)

    # The heap gives its least entry first. So counts are negated, and the bytes of tokens mirrored, with an end mark above them
    # all: the greater string of bytes has the lesser key, also where one begins with the other.
    keys = [chr(255 - byte) + "\u0100" for byte in range(256)]

    def entry(pair: str) -> tuple[int, str, str, str]:
        return -counts[pair], keys[ord(pair[0])], keys[ord(pair[1])], pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < n_merges:
        negated, *_, pair = heapq.heappop(heap)
        if -negated != counts[pair]:  # it has become rarer since; more frequent it cannot have become, only new pairs arise
            if counts[pair]:
                heapq.heappush(heap, entry(pair))
            continue
        left, right = pair
        new = chr(256 + len(merges))
        merges.append((ord(left), ord(right)))
        keys.append(keys[ord(left)][:-1] + keys[ord(right)])
        born = set()
        for w in holders.pop(pair):
            between = words[w].split(pair)
            words[w] = new.join(between)
            # What changes is the ends of the parts between the places. (Subtle: with a pair like aa, what is lost can be the
            # overlap, aa itself. Nobody reads its count again: no aa is left, and none will come.)
            changes = []
            for i, part in enumerate(between):
                before, after = i > 0, i < len(between) - 1  # whether a place lies on this side
                if part:
                    changes += [(right + part[0], new + part[0])] * before + [(part[-1] + left, part[-1] + new)] * after
                elif before and after:
                    changes.append((right + left, new + new))
            for lost, found in changes:
                counts[lost] -= weights[w]
                counts[found] += weights[w]
                holders[found].add(w)
                born.add(found)
        for found in born:
            heapq.heappush(heap, entry(found))
    return merges


class BPETokenizer:
    """Byte-level BPE with merges of one's own: any text has ids, and every id is some bytes."""

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
        # the name identifies the vocabulary: shards made with another one must not pass for these
        self.name = f"bpe-{hashlib.sha256(self.to_json().encode()).hexdigest()[:8]}"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens=(END_OF_TEXT,), processes=None) -> "BPETokenizer":
        """The tokenizer of some texts; smaller than vocab_size if every piece has become one token before.

        A file that does not fit in memory: texts=blocks(read_chunks(path), special_tokens). processes: all cores by default.
        """
        least = cls([], special_tokens).vocab_size  # refuses bad special tokens before the work, not after it
        if not least <= vocab_size <= MAX_VOCAB:
            raise UserError(f"vocab_size={vocab_size} must lie between {least} (bytes, special tokens) and {MAX_VOCAB:,}")
        return cls(learn_merges(count_pieces(texts, special_tokens, processes), vocab_size - least), special_tokens)

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(self.name, pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. With special=True special tokens are told apart; otherwise '<|endoftext|>' inside a text is text."""
        if not special:
            return [i for block in blocks(text, ()) for i in self._encoding.encode_ordinary(block)]
        parts, ids = splitter(self.special_tokens).split(text), self.special_ids
        return [i for part in parts for i in ([ids[part]] if part in ids else self.encode(part))]

    def encode_stream(self, chunks: Iterable[str], special: bool = False) -> Iterator[list[int]]:
        """Block after block, the ids that encode() gives for all chunks as one text, e.g. those of read_chunks(path)."""
        for block in blocks(chunks, self.special_tokens):
            yield self.encode(block, special)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes of some ids; one character may be spread over several, so half of one is possible."""
        assert all(0 <= i < self.vocab_size for i in ids), "an id outside the vocabulary"
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return json.dumps({"type": "bpe", "merges": self.merges, "special_tokens": self.special_tokens})

    @classmethod
    def from_spec(cls, spec: dict) -> "BPETokenizer":
        """What to_json wrote, once parsed; it may come from a stranger: UserError for anything wrong with it."""
        merges, specials = spec.get("merges"), spec.get("special_tokens")
        if not (isinstance(merges, list) and all(isinstance(merge, list) for merge in merges)):
            raise UserError("a BPE tokenizer needs its merges as a list of pairs")
        if not (isinstance(specials, list) and all(isinstance(token, str) for token in specials)):
            raise UserError("a BPE tokenizer needs its special_tokens as a list of strings")
        return cls(merges, specials)
