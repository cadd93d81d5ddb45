"""writing.py: whenever it is killed, a writer continues to the same bytes, or refuses files that have changed."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from corpus.writing import ShardWriter
from tokenizer import CharTokenizer

LETTERS = CharTokenizer([chr(0x4E00 + i) for i in range(500)])  # two bytes per id


def write_split(folder, split: str, ids, shard_tokens: int, tokenizer=LETTERS) -> list[dict]:
    """All ids at once; the manifest's entries."""
    writer = ShardWriter(folder, split, tokenizer, shard_tokens)
    writer.write(np.asarray(ids, dtype=writer.dtype))
    return writer.finish()


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(UserError, match="500 does not fit"):
        write_split(tmp_path, "train", [500], 10)
    assert not list(tmp_path.iterdir())


parts_of_20 = st.lists(st.integers(0, 20), max_size=6).map(lambda cuts: np.split(np.arange(20), sorted(cuts)))


@settings(max_examples=40)  # each waits for the disk some ten times
@given(parts_of_20, st.integers(1, 25), st.integers(0, 6), st.integers(0, 6))
def test_it_continues_from_any_save_after_any_kill(tmp_path_factory, parts, shard_tokens, saved_after, killed_after):
    """save() after some parts, more parts written, then all of the process lost."""
    folder, straight = tmp_path_factory.mktemp("parts"), tmp_path_factory.mktemp("straight")
    expected = write_split(straight, "train", range(20), shard_tokens)
    writer = ShardWriter(folder, "train", LETTERS, shard_tokens)
    for part in parts[:saved_after]:
        writer.write(part.astype(writer.dtype))
    saved = json.loads(json.dumps(writer.save()))
    for part in parts[saved_after : saved_after + killed_after]:
        writer.write(part.astype(writer.dtype))
    if saved_after + killed_after >= len(parts):
        writer.finish()  # the kill came after this, and before the manifest
    elif writer.file:
        writer.file.flush()
    again = ShardWriter(folder, "train", LETTERS, shard_tokens, saved)
    assert len(again) == sum(map(len, parts[:saved_after]))
    for part in parts[saved_after:]:
        again.write(part.astype(again.dtype))
    assert again.finish() == expected
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in straight.iterdir()}
    assert [e["sha256"] for e in expected] == [hashlib.sha256((folder / e["file"]).read_bytes()).hexdigest() for e in expected]


@pytest.mark.parametrize("damage", ["shard gone", "shard cut off", "partial gone", "partial changed", "partial cut off"])
def test_what_was_written_before_an_interruption_is_checked(tmp_path, damage):
    writer = ShardWriter(tmp_path, "train", LETTERS, 8)
    writer.write(np.arange(20, dtype=writer.dtype))
    saved = writer.save()
    which, how = damage.split(maxsplit=1)
    path = tmp_path / ("train_000001.bin" if which == "shard" else "train_000002.bin.partial")
    content = bytearray(path.read_bytes())
    path.unlink()
    content[-1] ^= how == "changed"
    if how != "gone":
        path.write_bytes(content[:-3] if how == "cut off" else content)
    with pytest.raises(UserError, match=rf"{path.name}.*--force"):
        ShardWriter(tmp_path, "train", LETTERS, 8, saved)
