"""Shards: what is written comes back, also by a writer that was killed, and no damaged or hostile file gets past its header."""

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from corpus import shards
from corpus.writing import ShardWriter
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer

SMALL = CharTokenizer([chr(0x4E00 + i) for i in range(500)])  # two bytes per id
LARGE = CharTokenizer([chr(i) for i in range(0x10000, 0x10000 + 2**16 + 1)])  # one id too many for two bytes
SHARD = "train_000000.bin"


def write_shards(folder, split: str, ids, tokenizer=SMALL, shard_tokens: int = 10**6) -> list[dict]:
    """The manifest's entries."""
    writer = ShardWriter(folder, split, tokenizer, shard_tokens)
    writer.write(np.asarray(ids, dtype=writer.dtype))
    return writer.finish()


def write_dataset(folder, splits: dict[str, list[int]], tokenizer=SMALL, **how) -> None:
    entries = {split: write_shards(folder, split, ids, tokenizer, **how) for split, ids in splits.items()}
    shards.write_manifest(folder, entries, tokenizer, "a test")


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_a_shard_is_the_documented_header_and_its_tokens(tmp_path, tokenizer):
    """As the table at the top of shards.py has it, decoded by hand."""
    ids = [*range(300), tokenizer.vocab_size - 1]  # the largest id there is
    (entry,) = write_shards(tmp_path, "train", ids, tokenizer)
    content, width = (tmp_path / SHARD).read_bytes(), 2 if tokenizer is SMALL else 4
    numbers = [int.from_bytes(content[at : at + size], "little") for at, size in ((8, 4), (12, 4), (16, 4), (20, 8))]
    assert content[:8] == b"NLADDER\n"
    assert numbers == [1, width, tokenizer.vocab_size, len(ids)]
    assert content[28:256].rstrip(b"\0").decode() == tokenizer.name
    assert [int.from_bytes(content[256 + i * width :][:width], "little") for i in range(len(ids))] == ids
    assert entry == {"file": SHARD, "tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_data_set_of_many_shards_comes_back_and_its_sha256_tells_it_from_another(tmp_path):
    sha256 = set()
    for last in (399, 0):
        ids, folder = [*range(399), last], tmp_path / str(last)
        folder.mkdir()
        write_dataset(folder, {"train": ids, "val": ids[:50]}, shard_tokens=33)
        opened = shards.open_dataset(folder)
        assert [len(s) for s in opened.splits["train"]] == [33] * 12 + [4]
        assert opened.split("train").read(0, 400).tolist() == ids
        assert opened.split("val").read(0, 50).tolist() == ids[:50]
        assert opened.tokenizer.to_json() == SMALL.to_json()
        sha256.add(opened.sha256)
    assert len(sha256) == 2


LETTERS = CharTokenizer(["\n", "a", "b"])


@pytest.mark.parametrize(
    ("tokenizer", "train", "start"),
    [
        (LETTERS, [2, 0, 1], 0),
        (LETTERS, [2, 1, 1], 2),  # the line break is in the val split only
        (CharTokenizer(["a", "b"]), [1, 0], 1),
        (GPT2Tokenizer(), [50, 198, 60], 198),
        (GPT2Tokenizer(), [50, 60], 50),
        (BPETokenizer([]), [97, 10, 98], 10),
        (BPETokenizer([]), [97, 10, 256], 256),
    ],
)
def test_an_empty_prompt_begins_with_a_token_that_was_trained(tmp_path, tokenizer, train, start):
    write_dataset(tmp_path, {"train": train, "val": train}, tokenizer)
    assert shards.open_dataset(tmp_path).tokenizer.start == start


# ---- damage -----------------------------------------------------------------------------------------------------------


def at(offset: int, new: bytes):
    """Bytes put over those at an offset."""
    return lambda content: content[:offset] + new + content[offset + len(new) :]


def manifest(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


def entries(name: str):
    return manifest(splits={"train": [{"file": name, "sha256": ""}], "val": []})


DAMAGE = [  # file, its new content, part of the message
    (SHARD, lambda b: b[:100], "cut off inside its header"),
    (SHARD, lambda b: b[:-200], "400 tokens should take 1056 bytes, not 856"),
    (SHARD, lambda b: b + b"\0\0", "1056 bytes, not 1058"),
    (SHARD, at(0, b"PK\x03\x04"), r"not a token shard of this program \(it begins with b'PK"),
    (SHARD, at(8, b"\2"), "format version 2, this program reads 1"),
    (SHARD, at(12, b"\3"), "3 bytes per token, allowed are 2 and 4"),
    (SHARD, at(28, b"gpt2".ljust(32, b"\0")), "made with the tokenizer gpt2 .* uses char-"),
    (SHARD, at(256 + 2 * 123, b"\xf4\1"), "token 123 is 500, the vocabulary has 500"),
    (SHARD, at(256, b"\1"), "its sha256 is not the manifest's"),
    (SHARD, at(16, b"\xff\xff"), "vocabulary"),
    (shards.MANIFEST, lambda b: b[:-5], "damaged"),
    (shards.MANIFEST, lambda b: b"[1, 2]", "damaged"),
    (shards.MANIFEST, manifest(splits={"train": []}), "has no val split"),
    (shards.MANIFEST, manifest(version=99), "version 99, this program reads 1"),
    (shards.MANIFEST, entries("../train_000000.bin"), "not a shard of its folder"),
    (shards.MANIFEST, entries("train\0.bin"), "not a shard of its folder"),
    (shards.MANIFEST, entries("x" * 300 + ".bin"), "not a shard of its folder"),
    ("tokenizer.json", lambda b: b'{"type": "pickle"}', "damaged"),
    ("tokenizer.json", lambda b: b'{"type": "char", "characters": ["aa"]}', "damaged"),
]
# Opening a FIFO waited for ever, and JSON from /dev/zero was read until the memory ended.
IRREGULAR = {"missing": lambda path: None, "fifo": os.mkfifo, "/dev/zero": lambda path: path.symlink_to("/dev/zero")}
IRREGULAR["folder"] = lambda path: path.mkdir()
DAMAGE += [(name, kind, "") for name in (SHARD, "tokenizer.json", shards.MANIFEST) for kind in IRREGULAR]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_a_damaged_file_is_refused_in_one_line_that_says_what_to_do(tmp_path, name, change, message):
    write_dataset(tmp_path, {"train": [*range(400)], "val": [*range(50)]})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if isinstance(change, str):
        IRREGULAR[change](tmp_path / name)
    else:
        (tmp_path / name).write_bytes(change(content))
    with pytest.raises(UserError, match=f"{tmp_path}.*{message}.*prepare_data.py") as e:
        shards.open_dataset(tmp_path)
    assert "\n" not in str(e.value)
    assert name != SHARD or SHARD in str(e.value)


# ---- a writer that is killed ------------------------------------------------------------------------------------------


parts_of_20 = st.lists(st.integers(0, 20), max_size=6).map(lambda cuts: np.split(np.arange(20, dtype="<u2"), sorted(cuts)))


@settings(max_examples=40)  # each waits for the disk some ten times
@given(parts_of_20, st.integers(1, 25), st.integers(0, 6), st.integers(0, 6))
def test_a_writer_continues_from_any_save_after_any_kill(tmp_path_factory, parts, shard_tokens, saved_after, killed_after):
    """save() after some parts, more parts written, then all of the process lost."""
    folder, straight = tmp_path_factory.mktemp("parts"), tmp_path_factory.mktemp("straight")
    expected = write_shards(straight, "train", range(20), shard_tokens=shard_tokens)
    writer = ShardWriter(folder, "train", SMALL, shard_tokens)
    for part in parts[:saved_after]:
        writer.write(part)
    saved = json.loads(json.dumps(writer.save()))
    for part in parts[saved_after : saved_after + killed_after]:
        writer.write(part)
    if saved_after + killed_after >= len(parts):
        writer.finish()  # the kill came after this, and before the manifest
    elif writer.file:
        writer.file.flush()
    again = ShardWriter(folder, "train", SMALL, shard_tokens, saved)
    assert len(again) == sum(map(len, parts[:saved_after]))
    for part in parts[saved_after:]:
        again.write(part)
    assert again.finish() == expected
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in straight.iterdir()}
    assert [e["sha256"] for e in expected] == [hashlib.sha256((folder / e["file"]).read_bytes()).hexdigest() for e in expected]


@pytest.mark.parametrize("damage", ["shard gone", "shard cut off", "partial gone", "partial changed", "partial cut off"])
def test_what_was_written_before_an_interruption_is_checked(tmp_path, damage):
    writer = ShardWriter(tmp_path, "train", SMALL, 8)
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
        ShardWriter(tmp_path, "train", SMALL, 8, saved)
