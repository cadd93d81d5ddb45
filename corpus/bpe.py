"""Learn a byte-level BPE from your own text. tokenizer.BPETokenizer is what comes out, and encodes with it.

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

Vocabulary: 256 bytes, the merges in order, the special tokens, <|endoftext|> last as in GPT-2.
"""

import functools
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

import regex

from base import system
from base.errors import UserError
from corpus import pool
from tokenizer import END_OF_TEXT, MAX_VOCAB, PATTERN, BPETokenizer, blocks

PIECES = regex.compile(PATTERN)
COUNTED_AT_ONCE = 2**22  # characters; a third of a second, against which starting a job is nothing
COUNTED_ALONE = 8  # blocks; fewer are counted before a worker has started


def count_block(block: str, special_tokens: Sequence[str]) -> Counter[str]:
    """How often each piece occurs between the special tokens of a block; the longest token first where several begin."""
    special = "|".join(re.escape(t) for t in sorted(special_tokens, key=len, reverse=True))
    return Counter(chain.from_iterable(map(PIECES.findall, re.split(special, block))))


def count_pieces(texts: Iterable[str], special_tokens: Sequence[str], processes: int = 0) -> Counter[str]:
    """How often each piece occurs in all texts; one core takes 2 minutes per GB. The counts do not depend on `processes`."""
    todo = ((None, block) for text in texts for block in blocks(text, special_tokens, COUNTED_AT_ONCE))
    count = functools.partial(count_block, special_tokens=special_tokens)
    counts: Counter[str] = Counter()
    for _, part in pool.map_in_order(count, todo, processes or system.cores(), COUNTED_ALONE):
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


def train(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_OF_TEXT,), processes: int = 0
) -> BPETokenizer:
    """The tokenizer of some texts; smaller than vocab_size if every piece becomes one token before. processes: 0: all cores.

    UserError if vocab_size leaves no room for the bytes and the special tokens.
    """
    least = BPETokenizer([], special_tokens).vocab_size  # refuses bad special tokens before the work, not after it
    if not least <= vocab_size <= MAX_VOCAB:
        raise UserError(f"vocab_size={vocab_size} must lie between {least} (bytes, special tokens) and {MAX_VOCAB:,}")
    return BPETokenizer(learn_merges(count_pieces(texts, special_tokens, processes), vocab_size - least), special_tokens)
