"""shards.py: what is written comes back, and a damaged or hostile file never gets past its header."""

import hashlib
import json
import os

import numpy as np
import pytest

from base.errors import UserError
from corpus import shards
from corpus.writing import ShardWriter
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer

SMALL = CharTokenizer([chr(0x4E00 + i) for i in range(500)])  # two bytes per id
LARGE = CharTokenizer([chr(i) for i in range(0x10000, 0x10000 + 2**16 + 1)])  # one id too many for two bytes


def write_shards(folder, split: str, ids, tokenizer=SMALL, shard_tokens: int = 10**6) -> list[dict]:
    """The manifest's entries."""
    writer = ShardWriter(folder, split, tokenizer, shard_tokens)
    writer.write(np.asarray(ids, dtype=writer.dtype))
    return writer.finish()


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_a_shard_is_the_documented_header_and_its_tokens(tmp_path, tokenizer):
    """As the table at the top of shards.py has it, decoded by hand."""
    ids = [*range(300), tokenizer.vocab_size - 1]  # the largest id there is
    (entry,) = write_shards(tmp_path, "train", ids, tokenizer)
    content, width = (tmp_path / "train_000000.bin").read_bytes(), 2 if tokenizer is SMALL else 4
    numbers = [int.from_bytes(content[at : at + size], "little") for at, size in ((8, 4), (12, 4), (16, 4), (20, 8))]
    assert content[:8] == b"NLADDER\n"
    assert numbers == [1, width, tokenizer.vocab_size, len(ids)]
    assert content[28:256].rstrip(b"\0").decode() == tokenizer.name
    assert [int.from_bytes(content[256 + i * width :][:width], "little") for i in range(len(ids))] == ids
    assert entry == {"file": "train_000000.bin", "tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
    assert shards.read_shard(tmp_path / "train_000000.bin", tokenizer).tolist() == ids


def write_dataset(folder, splits: dict[str, list[int]], tokenizer=SMALL, **how) -> None:
    entries = {split: write_shards(folder, split, ids, tokenizer, **how) for split, ids in splits.items()}
    shards.write_manifest(folder, entries, tokenizer, "a test")


@pytest.fixture
def folder(tmp_path):
    """A small data set of two splits."""
    write_dataset(tmp_path, {"train": [*range(400)], "val": [*range(50)]})
    return tmp_path


def test_a_data_set_comes_back_and_its_sha256_tells_it_from_another(tmp_path):
    """A split of many shards is one stream."""
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


SHARD = "train_000000.bin"


def overwrite(at: int, content: bytes):
    """A kind of damage: bytes put over those at an offset."""
    return lambda b: b[:at] + content + b[at + len(content) :]


DAMAGE = {
    "truncated header": (lambda b: b[:100], "cut off inside its header"),
    "truncated body": (lambda b: b[:-200], r"400 tokens should take 1056 bytes, not 856"),
    "too long": (lambda b: b + b"\0\0", r"1056 bytes, not 1058"),
    "foreign": (lambda b: b"PK\x03\x04" + b[4:], r"not a token shard of this program \(it begins with b'PK"),
    "wrong version": (overwrite(8, b"\2"), "format version 2, this program reads 1"),
    "wrong width": (overwrite(12, b"\3"), "3 bytes per token, allowed are 2 and 4"),
    "wrong tokenizer": (overwrite(28, b"gpt2".ljust(32, b"\0")), "made with the tokenizer gpt2 .* uses char-"),
    "id outside": (overwrite(256 + 2 * 123, b"\xf4\1"), "token 123 is 500, the vocabulary has 500"),
    "wrong vocabulary": (overwrite(16, b"\xff\xff"), "vocabulary"),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_to_a_shard_has_its_own_message(folder, kind):
    """... which names the file, what is wrong, and what to do."""
    change, message = DAMAGE[kind]
    shard = folder / SHARD
    content = shard.read_bytes()
    shard.unlink()
    if change:
        shard.write_bytes(change(content))
    with pytest.raises(UserError, match=message) as e:
        shards.open_dataset(folder)
    assert SHARD in str(e.value)
    assert "prepare_data.py" in str(e.value)
    assert "\n" not in str(e.value)


def manifest(**changes):
    """A kind of damage: other values in the manifest."""
    return lambda text: json.dumps(json.loads(text) | changes)


def entries(name: str):
    return manifest(splits={"train": [{"file": name}], "val": []})


MANIFEST_DAMAGE = {
    "no JSON": lambda text: text[:-5],
    "not an object": lambda text: "[1, 2]",
    "not UTF-8": lambda text: "\xff\xfe",
    "no val": manifest(splits={"train": []}),
    "other format version": manifest(version=99),
    "outside the folder": entries("../train_000000.bin"),
    "a zero byte": entries("train\0.bin"),
    "300 characters": entries("x" * 300 + ".bin"),
    "nested too deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("kind", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_refused(folder, kind):
    """One line that names the folder, never another exception."""
    path = folder / shards.MANIFEST
    path.write_text(MANIFEST_DAMAGE[kind](path.read_text()), encoding="latin-1")
    with pytest.raises(UserError, match=str(folder)) as e:
        shards.open_dataset(folder)
    assert "prepare" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_or_foreign_tokenizer_is_refused_and_a_missing_manifest(folder):
    for content in (None, "{", '{"type": "pickle"}', '{"type": "char", "characters": ["aa"]}'):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        if content:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            shards.open_dataset(folder)
    (folder / shards.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"has no prepared data.*: run python prepare_data\.py"):
        shards.open_dataset(folder)


@pytest.mark.parametrize("name", [shards.MANIFEST, "tokenizer.json", SHARD])
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
def test_what_is_not_a_regular_file_is_refused_at_once(folder, name, kind):
    """Opening a FIFO waited for ever, and JSON from /dev/zero was read until the memory ended."""
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(kind)
    with pytest.raises(UserError, match=r"prepare_data\.py") as e:
        shards.open_dataset(folder)
    assert "\n" not in str(e.value)


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
    """... after which a text begins anew, if there is one."""
    write_dataset(tmp_path, {"train": train, "val": train}, tokenizer)
    assert shards.open_dataset(tmp_path).tokenizer.start == start
