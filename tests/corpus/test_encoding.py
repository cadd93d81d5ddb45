"""encoding.py: the ids are the tokenizer's, of any text, and travel in the smallest type that fits."""

import functools

import numpy as np
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
def test_a_character_outside_the_alphabet_is_named(unknown):
    with pytest.raises(CannotEncode, match=f"(?s){unknown!r}".replace("\\", r"\\")):
        Encoder(LETTERS).encode("the cat" + unknown)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_four_bytes_only_where_two_are_too_few(size, dtype):
    encoder = Encoder(CharTokenizer([chr(i + 0x10000) for i in range(size)]))
    ids = encoder.encode_batch({"train": [(chr(0x10000 + size - 1), False)]})["train"]
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [size - 1]


def test_a_batch_keeps_splits_apart_and_documents_too():
    batch = {"train": [("the cat", False), (" sat", False), ("on", True)], "val": [("mat", True)]}
    found = {split: ids.tolist() for split, ids in Encoder(SMALL).encode_batch(batch).items()}
    end = [SMALL.end_of_text]
    assert found["train"] == SMALL.encode("the cat") + SMALL.encode(" sat") + end + SMALL.encode("on")
    assert found["val"] == end + SMALL.encode("mat")
    assert Encoder(LETTERS).encode_batch({"train": [("t", False), ("h", True)]})["train"].tolist() == LETTERS.encode("th")


def test_a_character_that_no_process_knows_is_named():
    batches = [(i, {"train": [("the cat", False)]}) for i in range(20)] + [(20, {"train": [("unknown: é", False)]})]
    with pytest.raises(CannotEncode, match="'u'"):
        list(encode(LETTERS, batches, 2))
