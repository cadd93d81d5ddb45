"""tokenizer.py: known ids, round trips, an independent implementation of BPE, and files that cannot be trusted."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from base.errors import UserError
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, from_json

GPT2 = GPT2Tokenizer()

# ---- GPT-2's BPE


def test_known_ids():
    assert GPT2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # FACTS.md
    assert GPT2.decode([15496, 11, 314, 1101, 257, 3303, 2746, 11]) == "Hello, I'm a language model,"


@given(st.text())
def test_any_text_survives_the_round_trip(text):
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert GPT2.decode_bytes(ids) == text.encode()
    assert all(0 <= i < GPT2.vocab_size - 1 for i in ids)  # never <|endoftext|>


@pytest.fixture(scope="module")
def other_bpe():
    """The same BPE by another implementation (the tokenizers package), from the files as OpenAI released them."""
    tokenizers = pytest.importorskip("tokenizers")
    GPT2.encode("a")  # fetches the files if need be
    merges, ranks = (
        str(tokenizer.cache_dir() / hashlib.sha1(source.url.encode()).hexdigest())
        for source in (tokenizer.GPT2_MERGES, tokenizer.GPT2_RANKS)
    )
    return tokenizers.ByteLevelBPETokenizer(ranks, merges)


@given(
    st.lists(st.sampled_from(["ROMEO", ":", " ", "\n", "  ", "don't", "é", "日本", "🙂", "x1", "123", "\t", "naïve"])).map(
        "".join
    )
)
def test_ids_equal_those_of_another_implementation(other_bpe, text):
    assert GPT2.encode(text) == other_bpe.encode(text).ids


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b"])
def test_end_of_text_inside_a_text_is_text(text):
    ids = GPT2.encode(text)
    assert GPT2.end_of_text not in ids
    assert GPT2.decode(ids) == text
    assert GPT2.decode([GPT2.end_of_text]) == "<|endoftext|>"


def test_half_a_character_decodes_to_its_bytes_and_to_a_replacement():
    ids = GPT2.encode("🙂")
    assert len(ids) > 1
    assert b"".join(GPT2.decode_bytes([i]) for i in ids) == "🙂".encode()
    assert GPT2.decode(ids[:1]) == "\ufffd"


def test_a_lone_surrogate_is_a_replacement_character():
    """They come from arguments and files that are not UTF-8."""
    assert GPT2.decode(GPT2.encode("a\ud800b")) == "a\ufffdb"


# ---- characters

any_text = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=50)  # lone surrogates too


@given(any_text)
def test_characters_survive_the_round_trip(text):
    chars = CharTokenizer.train(text)
    ids = chars.encode(text)
    assert chars.decode(ids) == text
    assert chars.decode_bytes(ids) == text.encode(errors="replace")
    assert set(ids) == set(range(chars.vocab_size))
    assert chars.characters == sorted(set(text))


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'ž'"):
        CharTokenizer.train("abc").encode("až")


@pytest.mark.parametrize("characters", [[], ["a", "a"], ["ab"], [""], ["a", ""]])
def test_an_alphabet_needs_distinct_single_characters(characters):
    with pytest.raises(UserError, match="distinct single characters"):
        CharTokenizer(characters)


def test_the_name_tells_alphabets_apart():
    names = [CharTokenizer.train(text).name for text in ("abc", "cba", "abd", "ab")]
    assert names[0] == names[1]
    assert len(set(names)) == 3


# ---- JSON


@given(any_text)
def test_a_character_tokenizer_survives_json(text):
    chars = CharTokenizer.train(text)
    again = from_json(chars.to_json().encode().decode())
    assert again.characters == chars.characters
    assert again.name == chars.name


def test_gpt2_survives_json():
    assert isinstance(from_json(GPT2.to_json()), GPT2Tokenizer)


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
bpe_like = st.fixed_dictionaries(
    {"type": st.just("bpe"), "special_tokens": st.just(["<|endoftext|>"]), "merges": fields["merges"]}
)


@settings(max_examples=300)
@given((value | near_miss | bpe_like).map(json.dumps) | st.text())
def test_untrusted_json_is_refused_or_understood(text):
    """UserError, or a tokenizer that is what the JSON has; never another exception."""
    try:
        read = from_json(text)
    except UserError:
        return
    spec = json.loads(text)
    assert spec["type"] == {GPT2Tokenizer: "gpt2", BPETokenizer: "bpe", CharTokenizer: "char"}[type(read)]
    assert not isinstance(read, CharTokenizer) or read.characters == spec["characters"]
    if isinstance(read, BPETokenizer):
        assert [list(merge) for merge in read.merges] == spec["merges"]
        assert read.decode(read.encode("abc <|endoftext|> s")) == "abc <|endoftext|> s"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "", "\x00", '{"type": ["gpt2"]}'])
def test_hostile_json_is_refused(text):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        from_json(text)
