"""tokenizer.py: known ids, round trips, an independent implementation of BPE, and files that cannot be trusted."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base.errors import UserError
from corpus import bpe
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, from_json

GPT2 = GPT2Tokenizer()
OWN = bpe.train(["the cat sat on the mat, and the cats sat on mats. " * 3], 300, ["<|user|>", "<|endoftext|>"])

# ---- GPT-2's BPE and one's own


def test_known_ids():
    assert GPT2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # FACTS.md


@pytest.mark.parametrize("own", [GPT2, OWN], ids=["gpt2", "bpe"])
@given(st.text(st.characters(exclude_categories=[])))  # lone surrogates too, from arguments that are not UTF-8
@example("a<|endoftext|><|user|>b")
@example("a\ud800b")
@example("🙂")
def test_any_text_survives_the_round_trip(own, text):
    """Special tokens inside a text are text; half a character decodes to its bytes and to a replacement."""
    ids, clean = own.encode(text), text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert own.decode(ids) == clean
    assert own.decode_bytes(ids) == b"".join(own.decode_bytes([i]) for i in ids) == clean.encode()
    assert all(0 <= i < own.vocab_size - 1 - (own is OWN) for i in ids)
    assert own.decode(own.encode("🙂")[:1]) == "\ufffd"
    assert own.decode([own.end_of_text]) == "<|endoftext|>"


# ---- characters

any_text = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=50)  # lone surrogates too


@given(any_text)
def test_characters_survive_the_round_trip_and_json(text):
    chars = CharTokenizer.train(text)
    ids = chars.encode(text)
    assert chars.decode(ids) == text
    assert chars.decode_bytes(ids) == text.encode(errors="replace")
    assert set(ids) == set(range(chars.vocab_size))
    again = from_json(chars.to_json().encode().decode())
    assert again.characters == chars.characters == sorted(set(text))
    assert again.name == chars.name


@pytest.mark.parametrize("characters", [[], ["a", "a"], ["ab"], [""]])
def test_an_alphabet_needs_distinct_single_characters_and_names_an_unknown_one(characters):
    with pytest.raises(UserError, match="distinct single characters"):
        CharTokenizer(characters)
    with pytest.raises(UserError, match="'ž'"):
        CharTokenizer.train("abc").encode("až")


def test_the_name_tells_alphabets_and_vocabularies_apart():
    names = [CharTokenizer.train(text).name for text in ("abc", "cba", "abd", "ab")]
    assert names[0] == names[1]
    names += [bpe.train([text], 258).name for text in ("abc", "abd")] + [bpe.train(["abd"], 259, ["<s>", "<|endoftext|>"]).name]
    assert len(set(names)) == 6
    assert all(len(name.encode("ascii")) <= 32 for name in names)  # a shard's header has room for no more


# ---- JSON


def test_a_bpe_survives_json():
    assert isinstance(from_json(GPT2.to_json()), GPT2Tokenizer)
    again = from_json(OWN.to_json())
    assert (again.name, again.special_ids) == (OWN.name, {"<|user|>": OWN.vocab_size - 2, "<|endoftext|>": OWN.vocab_size - 1})
    assert again.encode("the cats") == OWN.encode("the cats")


scalar = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["gpt2", "bpe", "char"])
)
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
ids = st.integers(97, 99) | st.integers(255, 262)
fields = {
    "characters": value | st.lists(st.text(max_size=2), max_size=4),
    "merges": value | st.lists(st.lists(ids, min_size=2, max_size=2) | st.lists(ids | value, max_size=3), max_size=6),
    "special_tokens": value | st.lists(st.sampled_from(["<|endoftext|>", "<s>", "b", "[^]"]) | value, max_size=3),
}
near_miss = st.fixed_dictionaries({"type": st.sampled_from(["char", "bpe"]) | value}, optional=fields)
bpe_like = fields["merges"].map(lambda merges: {"type": "bpe", "special_tokens": ["<|endoftext|>"], "merges": merges})


@settings(max_examples=300)
@given((value | near_miss | bpe_like).map(json.dumps) | st.text())
@example("[" * 100_000)
@example("1" * 10_000)
@example('{"type": ["gpt2"]}')
def test_untrusted_json_is_refused_or_understood(text):
    """UserError, or a tokenizer that is what the JSON has; never another exception."""
    try:
        read = from_json(text)
    except UserError as e:
        assert "\n" not in str(e)  # noqa: PT017
        return
    spec = json.loads(text)
    assert spec["type"] == {GPT2Tokenizer: "gpt2", BPETokenizer: "bpe", CharTokenizer: "char"}[type(read)]
    assert not isinstance(read, CharTokenizer) or read.characters == spec["characters"]
    if isinstance(read, BPETokenizer):
        assert [list(merge) for merge in read.merges] == spec["merges"]
        assert read.decode(read.encode("abc <|endoftext|> s")) == "abc <|endoftext|> s"
