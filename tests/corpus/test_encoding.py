"""encoding.py: the ids are the tokenizer's, of any text, and travel in the smallest type that fits."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import bpe
from corpus.encoding import CannotEncode, Encoder, encode
from tokenizer import CharTokenizer, GPT2Tokenizer

SMALL = bpe.train(["the cat sat on the mat, and the cats sat on mats. " * 3], 300)
LETTERS = CharTokenizer.train("the cat 😀\n\ud800")
encoder_of = functools.cache(Encoder)  # GPT-2's takes a tenth of a second
anything = st.text(st.characters(exclude_categories=[])) | st.lists(
    st.sampled_from(["the cat", "<|endoftext|>", " ", "\n", "\ud800", "日本", "🙂", "don't"])
).map("".join)


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [(GPT2Tokenizer(), anything), (SMALL, anything), (LETTERS, st.text(st.sampled_from("the cat 😀\n\ud800")))],
    ids=["gpt2", "bpe", "char"],
)
@given(data=st.data())
def test_ids_are_the_tokenizers(gpt2_files, tokenizer, texts, data):
    text = data.draw(texts)
    assert encoder_of(tokenizer).encode(text).tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("unknown", ["x", "\0", "\U0010ffff"])
def test_a_character_outside_the_alphabet_is_named_by_whichever_process_meets_it(unknown):
    batches = [(i, {"train": [("the cat", False)]}) for i in range(10)] + [(10, {"train": [("the cat" + unknown, False)]})]
    with pytest.raises(CannotEncode, match=f"(?s){unknown!r}".replace("\\", r"\\")):
        list(encode(LETTERS, batches, 2))
