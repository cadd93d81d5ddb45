"""bpe.py and BPETokenizer: a reference of ten lines for training and one for encoding, cuts at every place, untrusted files."""

import functools
import itertools
import random
import time
from collections import Counter

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from base.errors import UserError
from corpus import bpe
from tokenizer import END_OF_TEXT, BPETokenizer, blocks

# ---- the references: GPT-2's pattern as it was published, and the algorithm as it is taught

GPT2_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return out


def pieces(text: str) -> list[list[bytes]]:
    return [[bytes([b]) for b in piece.encode()] for piece in GPT2_PATTERN.findall(text)]


def textbook_merges(texts: list[str], n: int) -> list[tuple[bytes, bytes]]:
    words, merges = [word for text in texts for word in pieces(text)], []
    for _ in range(n):
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [merged(word, merges[-1]) for word in words]
    return merges


def textbook_encode(text: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [token for word in pieces(text) for token in functools.reduce(merged, merges, word)]


def train(texts: list[str], n_merges: int) -> BPETokenizer:
    return bpe.train(texts, 257 + n_merges, processes=1)


def spelt(own: BPETokenizer) -> list[tuple[bytes, bytes]]:
    return [(own.tokens[left], own.tokens[right]) for left, right in own.merges]


repetitive = st.text("ab ", max_size=60)  # ties and overlaps
# Characters without a category are left out: regex and tiktoken may know different versions of Unicode.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]))
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u3000"]
fragment = st.sampled_from(["the", " the", "then", "a", "aa", "'s", "'", "!", "12", "é", "日本", "🙂", *SPACES])
mixed = st.lists(fragment | st.characters(exclude_categories=["Cs", "Cn"]), max_size=40).map("".join)
text = repetitive | mixed
NAMES = ["<|user|>", "<|user|><|end|>", END_OF_TEXT]


@pytest.fixture(scope="module")
def prose(root) -> str:
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))]
    return ("".join(texts) * 2)[:130_000]


@pytest.fixture(scope="module")
def trained(prose) -> BPETokenizer:
    return bpe.train([prose], 759, NAMES, processes=1)


# ---- training and encoding


@given(st.lists(text, max_size=4), st.integers(0, 40), text | any_text)
@example(["aaaa aaaaa baaab"], 30, "aaaaaaa aaa aaaaa")
@example(["ab aab ba"], 30, "")  # one token begins with another: (ab, x) against (a, bx)
def test_merges_and_ids_are_the_textbooks(trained, texts, n, other):
    own, merges = train(texts, n), textbook_merges(texts, n)
    assert spelt(own) == merges
    for one in (*texts, other):
        assert [own.tokens[i] for i in own.encode(one)] == textbook_encode(one, merges)
    assert [trained.tokens[i] for i in trained.encode(other)] == textbook_encode(other, spelt(trained))


@pytest.mark.parametrize("processes", [1, 2])
def test_merges_and_counts_of_prose_are_the_textbooks_for_any_processes(monkeypatch, prose, processes):
    assert spelt(bpe.train([prose[:6000]], 557, processes=processes)) == textbook_merges([prose[:6000]], 300)
    monkeypatch.setattr(bpe, "COUNTED_AT_ONCE", 1000)
    counts = bpe.count_pieces([prose, "", "x  " + END_OF_TEXT], (END_OF_TEXT,), processes)
    expected = [piece for part in prose.split(END_OF_TEXT) for piece in GPT2_PATTERN.findall(part)]
    assert counts == Counter([*expected, "x", "  "])


def test_a_lone_surrogate_of_a_json_row_is_learnt_from_as_a_question_mark():
    assert spelt(train(["\ud800\ud800"], 1)) == [(b"?", b"?")]


def test_long_words_are_quick():
    """A word of a megabyte is visited by every merge: looking at each of its tokens every time would take minutes."""
    text = "".join(random.Random(0).choices("acgt", k=2**18))
    began = time.process_time()
    assert len(train([text, "a" * 2**18], 200).merges) == 200
    assert time.process_time() - began < 5


@pytest.mark.parametrize("vocab_size", [0, 256, 2**20 + 1])
def test_a_vocabulary_has_its_limits(vocab_size):
    with pytest.raises(UserError, match=f"vocab_size={vocab_size} must lie between 257"):
        bpe.train(["text"], vocab_size)


@pytest.mark.parametrize("text", [" " * 2**20 + "x", "a" * 2**20, "\n" * 2**20 + "<", " " * 2**20, "<" * 2**20])
def test_long_runs_are_encoded(trained, text):
    assert trained.decode_bytes(trained.encode(text)).decode() == text


# ---- cuts


@given(mixed | any_text, st.integers(1, 12))
@example(" !\x1cx", 1)
def test_cuts_are_safe(trained, text, size):
    """The pieces of the parts are the pieces of the whole, for both engines."""
    parts = list(blocks(text, size=size))
    assert "".join(parts) == text
    assert all(parts)
    assert [p for part in parts for p in GPT2_PATTERN.findall(part)] == GPT2_PATTERN.findall(text)
    assert [i for part in parts for i in trained._encoding.encode_ordinary(part)] == trained._encoding.encode_ordinary(text)


specials = st.sampled_from(["a", " ", "  ", "\n", "<", "<|user|>", "<|end|>", END_OF_TEXT])


@given(st.lists(specials, max_size=20).map("".join), st.integers(1, 12))
@example("a  <|user|>", 1)
def test_cuts_are_safe_beside_special_tokens(text, size):
    """What training counts between special tokens does not depend on where the text is cut."""
    parts = blocks(text, NAMES, size)
    assert sum((bpe.count_block(part, NAMES) for part in parts), Counter()) == bpe.count_block(text, NAMES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"merges": ["ab"]}, "list of pairs"),
        ({"merges": [[97, 98], [256]]}, "merge 1 must be two ids below 257"),
        ({"merges": [[97, -1]]}, "merge 0"),
        ({"merges": [[97, True]]}, "merge 0"),
        ({"merges": [[97, 98], [98, 99], [256, 99], [97, 257]]}, "the same token"),
        ({"merges": [[97, 97], *([256 + k, 256 + k] for k in range(60))]}, "merge 25 are longer than"),
        ({"merges": [[97, 98]] * 2**20}, "a vocabulary of 1,048,833 tokens"),
        ({"special_tokens": [1, END_OF_TEXT]}, "list of strings"),
        ({"special_tokens": ["<s>"]}, "the last of them"),
        ({"special_tokens": [END_OF_TEXT, END_OF_TEXT]}, "distinct"),
        ({"special_tokens": ["a b", END_OF_TEXT]}, "special token 'a b'"),
        ({"special_tokens": ["\ud800", END_OF_TEXT]}, "special token"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(change, reason):
    spec = {"merges": [[97, 98], [256, 99]], "special_tokens": [END_OF_TEXT]}
    assert BPETokenizer.from_spec(spec).encode("abc") == [257]
    with pytest.raises(UserError, match=reason) as refusal:
        BPETokenizer.from_spec(spec | change)
    assert "\n" not in str(refusal.value)
    str(refusal.value).encode()  # can be printed
