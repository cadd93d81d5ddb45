"""prepare_data.py: your own text becomes a data set, whole or not at all, whatever the locale."""

import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import configurator
import prepare_data
import train
from base import download
from base.errors import UserError
from corpus import bpe, hellaswag, shards, sources, writing
from corpus.sources import NAMED


@pytest.fixture
def a_text(monkeypatch):
    """TEXT in place of tiny Shakespeare, from an address that answers."""
    content = TEXT.encode()
    source = replace(sources.SHAKESPEARE, sha256=hashlib.sha256(content).hexdigest())
    for name in ("shakespeare", "shakespeare_char"):
        monkeypatch.setitem(NAMED, name, (NAMED[name][0], source))
    monkeypatch.setattr(download, "fetch", lambda *_: content)


@pytest.fixture(autouse=True)
def tiny_texts():
    """Most texts here are too short to train on."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr(writing, "SHORTEST", 1)


def prepared_text(folder, split: str) -> str:
    opened = shards.open_dataset(folder)
    stream = opened.split(split)
    return opened.tokenizer.decode(stream.read(0, len(stream)).tolist()) if len(stream) else ""


@pytest.fixture
def own(tmp_path):
    """own(argument, …) prepares with the character tokenizer into tmp_path/data and returns that folder."""

    def prepare(*argv: str):
        prepare_data.main([*map(str, argv), "--tokenizer=char", f"--data_dir={tmp_path}/data"])
        return tmp_path / "data"

    return prepare


SHORTEST = writing.SHORTEST
TEXT = "".join(chr(0x41 + i % 26) + "é\r\n☃😀"[i % 5] for i in range(200))


FILES = {"b.txt": "bb", "a.md": "aaaa", "more/c.TXT": "cc", "picture.png": "\0\1", "empty.txt": ""}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("", "aaaabbcc"), ("b.txt", "bb"), ("*.txt", "bb"), ("**/*.[tT][xX][tT]", "bbcc"), ("[ab].*", "aaaabb")],
)
def test_a_folder_is_its_texts_in_sorted_order_and_a_glob_what_it_matches(own, tmp_path, pattern, expected):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "notes" / name).write_text(text)
    folder = own(f"{tmp_path}/notes/{pattern}", "--name=globbed") / "globbed"
    assert prepared_text(folder, "train") + prepared_text(folder, "val") == expected


def test_documents_are_kept_apart_by_end_of_text(tmp_path, gpt2_files):
    """... and by nothing else: a '<|endoftext|>' that a document contains is text. The last quarter validates."""
    (tmp_path / "letters").mkdir()
    for name, text in {"a": "a<|endoftext|>", "b": "b", "c": "ccccc"}.items():
        (tmp_path / "letters" / f"{name}.txt").write_text(text)
    prepare_data.main([str(tmp_path / "letters"), f"--data_dir={tmp_path}/data", "--val_fraction=0.25"])
    opened = shards.open_dataset(tmp_path / "data" / "letters")
    ids = opened.split("train").read(0, len(opened.split("train"))).tolist()
    assert ids == [*opened.tokenizer.encode("a<|endoftext|>"), 50256, *opened.tokenizer.encode("b")]


@pytest.mark.parametrize("content", ["text".encode("utf-16"), b"\xef\xbb\xbf", b"a", None])
def test_nothing_is_written_of_a_text_that_cannot_be_used(own, tmp_path, content):
    """Not UTF-8, a byte order mark alone, too short to be cut in two, a folder without texts."""
    if content is None:
        (tmp_path / "odd.txt").mkdir()
    else:
        (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.txt (is not UTF-8 \(byte 0|has no)|the text is too short|has no file ending in"):
        own(tmp_path / "odd.txt")
    assert not (tmp_path / "data").exists()


def test_utf8_is_read_whatever_the_locale_says(run_script, tmp_path):
    """A C locale without Python's own coercion to UTF-8, and a name that is not ASCII."""
    (tmp_path / "schön.txt").write_bytes(TEXT.encode() * 2)
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("prepare_data.py", tmp_path / "schön.txt", "--tokenizer=char", f"--data_dir={tmp_path}", env=env)
    assert done.returncode == 0, done.stderr
    assert prepared_text(tmp_path / "schön", "train") == (TEXT * 2)[:720]


def test_what_is_there_is_not_replaced_without_force(own, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    folder = own(path) / "mine"
    before = shards.open_dataset(folder).sha256
    path.write_text("something else " * 20)
    with pytest.raises(UserError, match=r"already exists: use --force"):
        own(path)
    assert shards.open_dataset(folder).sha256 == before
    own(path, "--force")
    assert shards.open_dataset(folder).sha256 != before
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="has other files in it"):
        own(path, "--name=other")
    assert [p.name for p in (tmp_path / "data" / "other").iterdir()] == ["thesis.txt"]


def test_a_damaged_data_set_is_repaired_by_the_command_its_error_names(a_text, tmp_path):
    """The message says to prepare the data again: that must be possible."""
    command = ["shakespeare_char", f"--data_dir={tmp_path}"]
    prepare_data.main(command)
    folder = tmp_path / "shakespeare_char"
    (folder / "train_000000.bin").write_bytes(b"")
    with pytest.raises(UserError) as e:
        shards.open_dataset(folder)
    prepare_data.main([*command, *(["--force"] if "--force" in str(e.value) else [])])
    assert prepared_text(folder, "train") == TEXT[:360]


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_a_failure_while_writing_leaves_no_data_set(own, tmp_path, monkeypatch, failing):
    """Disk full at the tokenizer, the progress, either shard, the tokenizer again or the manifest: the earlier data set is
    gone or whole, never mixed.
    """
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    folder = own(path) / "mine"
    path.write_text("something else " * 20)
    calls, plain = iter(range(1, 100)), os.replace

    def full(temporary, target):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return plain(temporary, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        own(path, "--force")
    assert not (folder / shards.MANIFEST).exists()
    monkeypatch.undo()
    own(path)  # and the way is free
    assert prepared_text(folder, "train").startswith("something else")


def test_too_little_space_is_found_before_anything_is_written(own, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="MiB free"):
        own(tmp_path / "mine.txt")
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("own_signals")
def test_the_next_command_that_is_printed_runs(tmp_path, text, tiny_flags, capsys, monkeypatch, root):
    """In a shell, with the flags of the tiny run in front of its own."""
    monkeypatch.chdir(root)
    (tmp_path / "my own text.txt").write_text(text)
    prepare_data.main([f"{tmp_path}/my own text.txt", "--tokenizer=char", f"--data_dir={tmp_path}/data"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines[-2:]] == ["next: ", "then: "]
    python, script, config, *flags = shlex.split(lines[-2][6:])
    assert (python, script) == ("python", "train.py")
    small = [f for f in tiny_flags if not f.startswith(("--dataset", "--data_dir", "--vocab_size"))]
    cfg = configurator.load([config, *small, *flags], "")
    assert shlex.split(lines[-1][6:]) == ["python", "sample.py", cfg.out_dir]
    train.train(replace(cfg, out_dir=f"{tmp_path}/run"))
    assert (tmp_path / "run" / "step_00000006").is_dir()


# ---- at scale, in miniature ---------------------------------------------------------------------------------------------

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "ran", "after", "its", "tail", "and", "fell.\n", "<|endoftext|>"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder: rows.jsonl, 600 documents of some 300 characters; vocabulary/tokenizer.json, a small BPE."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    documents = [" ".join(random.choice(WORDS, random.integers(0, 120))) for _ in range(600)]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "vocabulary").mkdir()
    (folder / "vocabulary" / "tokenizer.json").write_text(bpe.train(documents, 300).to_json())
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    """600 documents are some 90 batches; the progress is saved after each."""
    monkeypatch.setattr(writing, "BATCH", 2000)
    monkeypatch.setattr(writing, "SAVE_SECONDS", 0.0)


def arguments(corpus: Path, data_dir: Path, *more: str) -> list[str]:
    common = ["--name=made", f"--tokenizer={corpus / 'vocabulary'}", "--shard_tokens=7000", f"--data_dir={data_dir}"]
    return [str(corpus / "rows.jsonl"), *common, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="session")
def expected(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What all of the ways below must come to, made in one go by one process."""
    folder = tmp_path_factory.mktemp("straight")
    prepare_data.main(arguments(corpus, folder, "--processes=1"))
    made = contents(folder / "made")
    assert sum(name.startswith("train_") for name in made) > 5
    assert set(made) - {name for name in made if name.endswith(".bin")} == {".lock", "tokenizer.json", "manifest.json"}
    return made


def test_every_hundredth_document_validates_and_the_rest_trains(corpus, expected, tmp_path):
    """Each document's ids are its own, with <|endoftext|> between, over the borders of blocks, batches and shards."""
    (tmp_path / "made").mkdir()
    for name, content in expected.items():
        (tmp_path / "made" / name).write_bytes(content)
    opened = shards.open_dataset(tmp_path / "made")
    rows = [json.loads(line)["text"] for line in (corpus / "rows.jsonl").read_text().splitlines()]
    rows = [text for text in rows if text]  # an empty one is none
    for split, texts in {"val": rows[::100], "train": [t for i, t in enumerate(rows) if i % 100]}.items():
        stream, end = opened.split(split), opened.tokenizer.end_of_text
        ids = [i for text in texts for i in [end, *opened.tokenizer.encode(text)]][1:]
        assert stream.read(0, len(stream)).tolist() == ids
        assert [len(s) for s in opened.splits[split]][:-1] == [7000] * (len(ids) // 7000)
    documents = json.loads(expected["manifest.json"])["documents"]
    assert documents == {"val": len(rows[::100]), "train": len(rows) - len(rows[::100])}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_shards_do_not_depend_on_processes_or_batches(corpus, expected, tmp_path, small_batches, processes):
    prepare_data.main(arguments(corpus, tmp_path, f"--processes={processes}"))
    assert contents(tmp_path / "made") == expected


class Killed(BaseException):
    """Nothing may catch this one."""


def test_interrupted_anywhere_it_resumes_to_the_same_bytes(corpus, expected, tmp_path, monkeypatch, capsys):
    """Stopped before each flush to the disk and each renaming, in turn: the moments between which files differ."""
    monkeypatch.setattr(writing, "BATCH", 40_000)
    monkeypatch.setattr(writing, "SAVE_SECONDS", 0.0)
    plain = {name: getattr(os, name) for name in ("fsync", "replace")}
    left, resumed = 0, 0

    def counting(name):
        def call(*args):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return None if name == "fsync" else plain[name](*args)

        return call

    for name in plain:
        monkeypatch.setattr(os, name, counting(name))
    for stop in itertools.count(1):
        left, folder = stop, tmp_path / f"{stop}"
        try:
            prepare_data.main(arguments(corpus, folder, "--processes=1"))
        except Killed:
            assert not (folder / "made" / shards.MANIFEST).exists()
        else:
            break
        capsys.readouterr()
        left = 0
        prepare_data.main(arguments(corpus, folder, "--processes=1"))
        resumed += "resuming where it stopped" in capsys.readouterr().out
        assert contents(folder / "made") == expected
        shutil.rmtree(folder)
    assert stop > 40
    assert resumed > stop - 10  # all but the first few, before which there was nothing


PROGRAM = """
import sys, time
import prepare_data
from corpus import writing

writing.BATCH, writing.SAVE_SECONDS = 2000, 0.0
plain = writing.batches
writing.batches = lambda reader: (time.sleep(0.02) or batch for batch in plain(reader))  # time enough to be killed in
if __name__ == "__main__":
    prepare_data.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_for_good_it_resumes_to_the_same_bytes(corpus, expected, tmp_path, root):
    """SIGKILL, two processes tokenizing, when there are so many shards."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), *arguments(corpus, tmp_path, "--processes=2")]
    for count in (2, 6):
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL)
        while len(list(tmp_path.glob("made/train_*.bin"))) < count:
            assert process.poll() is None, "it was done before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert (tmp_path / "made" / writing.PROGRESS).is_file()
        assert not (tmp_path / "made" / shards.MANIFEST).exists()
    prepare_data.main(arguments(corpus, tmp_path))
    assert contents(tmp_path / "made") == expected


@pytest.fixture
def half(corpus, tmp_path, monkeypatch, small_batches):
    """The folder of a data set that is incomplete."""
    plain = writing.ShardWriter.write

    def write(self, ids):
        if len(self.entries) == 3:
            raise Killed
        plain(self, ids)

    monkeypatch.setattr(writing.ShardWriter, "write", write)
    with pytest.raises(Killed):
        prepare_data.main(arguments(corpus, tmp_path, "--processes=1"))
    monkeypatch.setattr(writing.ShardWriter, "write", plain)
    return tmp_path / "made"


def test_an_incomplete_one_of_something_else_is_refused_and_started_again_with_force(half, corpus, expected):
    with pytest.raises(UserError, match=r"is incomplete, from another request \(shard_tokens was 7000\): use --force"):
        prepare_data.main(arguments(corpus, half.parent, "--shard_tokens=8000"))
    with writing.lock(half), pytest.raises(UserError, match="another process is preparing"):
        prepare_data.main(arguments(corpus, half.parent))
    os.utime(corpus / "rows.jsonl")
    with pytest.raises(UserError, match=r"incomplete, from another request \(text was .*rows\.jsonl"):
        prepare_data.main(arguments(corpus, half.parent))
    prepare_data.main(arguments(corpus, half.parent, "--force"))
    assert contents(half) == expected


DAMAGE = {
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "not UTF-8": lambda text: "\xff",
    "another place": lambda text: text.replace('"part": 0', '"part": 1'),
    "another request": lambda text: text.replace('"request"', '"wish"'),
    "nested too deep": lambda text: "[" * 100_000,
}


def test_a_damaged_progress_is_refused(half, corpus):
    """Also what is no regular file: opening a FIFO waited for ever, and reading /dev/zero did not end."""
    path = half / writing.PROGRESS
    text = path.read_text()
    for kind in [*DAMAGE, "fifo", "/dev/zero", "folder"]:
        if kind in DAMAGE:
            path.write_text(DAMAGE[kind](text), encoding="latin-1")
        else:
            irregular(path, kind)
        with pytest.raises(UserError, match=r"progress\.json is damaged .*: use --force"):
            prepare_data.main(arguments(corpus, half.parent))


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_a_tokenizer_that_is_not_a_regular_file_is_refused_at_once(own, tmp_path, kind):
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    (tmp_path / "other").mkdir()
    irregular(tmp_path / "other" / "tokenizer.json", kind)
    with pytest.raises(UserError, match=r"is not gpt2, bpe, char or a folder with a tokenizer\.json"):
        prepare_data.main([f"{tmp_path}/mine.txt", f"--data_dir={tmp_path}", f"--tokenizer={tmp_path}/other"])


def irregular(path: Path, kind: str) -> None:
    """Something that is not a file, in its place."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("argv", [["x" * 300], ["MINE", "--name=" + "x" * 300], ["shakespeare", "--name=" + "é" * 150]])
def test_a_name_that_is_too_long_is_a_user_error(tmp_path, a_text, argv):
    """It was a traceback: File name too long."""
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    with pytest.raises(UserError, match=r"at most 200 bytes|is not a file, folder"):
        prepare_data.main([a.replace("MINE", f"{tmp_path}/mine.txt") for a in argv] + [f"--data_dir={tmp_path}"])


@pytest.mark.slow
def test_parquet_and_the_hub_come_to_the_same_shards_as_json_lines(corpus, expected, tmp_path, monkeypatch, small_batches):
    """The hub is a folder here; streamed by datasets all the same."""
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in (corpus / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows").mkdir()
    for i in range(0, 600, 200):
        table = pyarrow.Table.from_pylist(rows[i : i + 200])
        parquet.write_table(table, tmp_path / "rows" / f"train-{i}.parquet", row_group_size=64)
    monkeypatch.setattr(sources, "hub_revision", lambda name, revision: "abcdef")
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 20)
    for folder, source in {tmp_path / "files": f"{tmp_path}/rows", tmp_path / "hub": f"hf:{tmp_path}/rows"}.items():
        prepare_data.main([source, *arguments(corpus, folder)[1:]])
        made, straight = contents(folder / "made"), dict(expected)
        manifests = [json.loads(m.pop("manifest.json")) for m in (made, straight)]
        assert made == straight
        assert manifests[0]["splits"] == manifests[1]["splits"]
    assert manifests[0]["revision"] == "abcdef"


def test_a_data_set_with_splits_of_its_own_keeps_them(tmp_path, monkeypatch, gpt2_files):
    """tinystories has."""
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, texts in {"train": ["a"] * 5, "validation": ["b"] * 3}.items():
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / f"{name}.parquet")
    hub = sources.Hub(str(tmp_path), "", {"train": "train", "val": "validation"}, 0)
    monkeypatch.setitem(NAMED, "tinystories", ("gpt2", hub))
    monkeypatch.setattr(sources, "hub_revision", lambda name, revision: None)
    prepare_data.main(["tinystories", f"--data_dir={tmp_path}"])
    opened = shards.open_dataset(tmp_path / "tinystories")
    assert opened.split("train").read(0, 9).tolist() == [64, 50256] * 4 + [64]
    assert opened.split("val").read(0, 5).tolist() == [65, 50256] * 2 + [65]
    with pytest.raises(UserError, match=r"--val_fraction=0\.5 is for texts without splits of their own"):
        prepare_data.main(["tinystories", f"--data_dir={tmp_path}", "--val_fraction=0.5", "--force"])


@pytest.mark.parametrize(
    ("argv", "kind", "next_command"),
    [
        (["shakespeare_char"], "char-", "config/shakespeare_char_cpu.py --vocab_size=31 --data_dir="),
        (["shakespeare", "--tokenizer=bpe"], "bpe-", "--dataset=named --vocab_size="),
        (["shakespeare_char", "--name=other"], "char-", "config/shakespeare_char_cpu.py --dataset=other --vocab_size="),
    ],
)
def test_a_named_text_has_its_tokenizer_unless_another_is_given(tmp_path, a_text, capsys, argv, kind, next_command):
    name = ["--name=named"] if "--tokenizer=bpe" in argv else []  # whatever config/shakespeare.py trains on
    for _ in range(2):  # what exists already names the next command again
        prepare_data.main([*argv, *name, f"--data_dir={tmp_path}"])
        assert next_command in capsys.readouterr().out.splitlines()[-2]
    (folder,) = (p for p in tmp_path.iterdir() if p.name != ".sources")
    assert shards.open_dataset(folder).tokenizer.name.startswith(kind)


def test_enwik8_is_cut_as_usual(tmp_path, monkeypatch):
    """90, 5 and 5 million bytes."""
    (tmp_path / "enwik8").write_bytes(b"")
    monkeypatch.setattr(prepare_data, "local_copy", lambda source, data_dir: tmp_path / "enwik8")
    todo = prepare_data.plan(prepare_data.PrepareConfig(), ["enwik8"])
    assert [(part.split, part.size) for part in todo.parts] == [("train", 90_000_000), ("val", 5_000_000), ("test", 5_000_000)]
    assert [part.begin for part in todo.parts] == [0, 90_000_000, 95_000_000]
    assert todo.name == "enwik8"


def test_documents_of_one_file_are_told_apart_by_their_separator(tmp_path, gpt2_files, capsys):
    stories = tmp_path / "stories.txt"
    stories.write_text("\n<|endoftext|>\n".join(f"Story {i}." for i in range(250)) + "\n<|endoftext|>\n")
    prepare_data.main([str(stories), f"--data_dir={tmp_path}", "--name=plain"])
    assert "--separator='<|endoftext|>'" in capsys.readouterr().out
    prepare_data.main([str(stories), f"--data_dir={tmp_path}", "--separator=<|endoftext|>"])
    assert prepared_text(tmp_path / "stories", "val") == "<|endoftext|>".join(f"Story {i}." for i in (0, 100, 200))
    assert prepared_text(tmp_path / "stories", "train").count("<|endoftext|>") == 246
    assert json.loads((tmp_path / "stories" / "manifest.json").read_text())["documents"] == {"val": 3, "train": 247}


def test_a_bpe_is_learnt_from_the_start_of_a_large_text(tmp_path, monkeypatch):
    """... of its train split, and no more of it than LEARNT_FROM characters."""
    texts = ["val", *["train"] * 5, *["rest"] * 50]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.setattr(prepare_data, "LEARNT_FROM", 25)
    prepare_data.main([str(tmp_path / "rows.jsonl"), f"--data_dir={tmp_path}", "--tokenizer=bpe", "--vocab_size=300"])
    tokens = shards.open_dataset(tmp_path / "rows").tokenizer.tokens
    assert b"train" in tokens
    assert not any(piece in tokens for piece in (b"re", b"st", b"va"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--column=body"], "--column=body is for .jsonl"),
        (["--split=test"], "--split=test is for a data set of the hub"),
        (["--shard_tokens=0"], "shard_tokens=0 must be at least 1"),
        (["--separator=x", "--val_fraction=0.6"], "at most 0.5 of documents"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(tmp_path, own, flags, message):
    (tmp_path / "mine.txt").write_text("axbxcx" * 100)
    with pytest.raises(UserError, match=message):
        own(tmp_path / "mine.txt", *flags)


def test_a_text_is_refused_unless_a_sequence_can_be_trained_on(tmp_path, own, monkeypatch):
    """The smallest configs read 64 tokens and the one that follows."""
    monkeypatch.setattr(writing, "SHORTEST", SHORTEST)
    assert min(configurator.load_file(f).T for f in prepare_data.CONFIGS.values()) + 1 == SHORTEST
    (tmp_path / "mine.txt").write_text("ab" * 320)
    with pytest.raises(UserError, match=f"too little text .* the val split has 64 tokens of at least {SHORTEST}"):
        own(tmp_path / "mine.txt")
    assert not (tmp_path / "data" / "mine").exists()
    (tmp_path / "mine.txt").write_text("ab" * 320 + "a")
    own(tmp_path / "mine.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n' * 99 + b"{", "line 100 is not JSON"),
        (b'{"text": "aaaa"}', "too little text to train on: the train split has 0 tokens"),
    ],
)
def test_an_error_in_the_text_leaves_nothing_behind(tmp_path, content, message, small_batches):
    """... so that the same command runs once the text is right. It was `is incomplete, from another request`."""
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "tokenizer.json").write_text(json.dumps({"type": "char", "characters": ["a"]}))
    argv = [f"{tmp_path}/rows.jsonl", f"--tokenizer={tmp_path}/vocabulary", f"--data_dir={tmp_path}/data"]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_data.main(argv)
    assert not (tmp_path / "data" / "rows").exists()
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' * 200)
    prepare_data.main(argv)
    assert prepared_text(tmp_path / "data" / "rows", "val") == "aa"


@pytest.mark.parametrize("name", ["rows.json", "rows.CSV"])
def test_rows_are_not_read_as_prose(tmp_path, own, name):
    (tmp_path / name).write_text("a,b\n" * 1000)
    for pattern in (tmp_path / name, f"{tmp_path}/ro*"):
        with pytest.raises(UserError, match=rf"{name} holds rows, not prose: .*\.jsonl"):
            own(pattern)
    assert not (tmp_path / "data").exists()


def test_windows_line_ends_are_kept_and_said_once(tmp_path, own, capsys):
    for name, ends in {"a": "\n", "b": "\r\n", "c": "\r\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(f"one{ends}two{ends}".encode())
    folder = own(tmp_path / "b.txt", tmp_path / "c.txt") / "b"
    assert prepared_text(folder, "train") + prepared_text(folder, "val") == "one\r\ntwo\r\n" * 2
    assert capsys.readouterr().out.count("CRLF") == 1
    own(tmp_path / "a.txt")
    assert "CRLF" not in capsys.readouterr().out


def test_a_name_that_nobody_chose_is_announced(tmp_path, own, capsys):
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text("ab" * 20)
    assert (own(tmp_path / "first.txt", tmp_path / "second.txt") / "first" / shards.MANIFEST).is_file()
    assert "is named first: use --name=" in capsys.readouterr().out
    assert (own(f"{tmp_path}/*.txt") / "mine" / shards.MANIFEST).is_file()
    assert "is named mine: use --name=" in capsys.readouterr().out
    own(tmp_path / "second.txt")
    own(tmp_path / "first.txt", tmp_path / "second.txt", "--name=both")
    assert "is named" not in capsys.readouterr().out


def test_a_bpe_that_ends_early_says_so(tmp_path, capsys):
    """ "ab " times n has one word: a, b, ab, and with the space before it."""
    (tmp_path / "mine.txt").write_text("ab " * 100)
    prepare_data.main([f"{tmp_path}/mine.txt", "--tokenizer=bpe", "--vocab_size=300", f"--data_dir={tmp_path}"])
    ids = shards.open_dataset(tmp_path / "mine").tokenizer.vocab_size
    assert ids == 256 + 2 + 1  # ab, " ab", <|endoftext|>
    assert f"the BPE ends at {ids} of 300 ids" in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("ab " * 100)
    prepare_data.main([f"{tmp_path}/other.txt", "--tokenizer=bpe", "--vocab_size=258", f"--data_dir={tmp_path}"])
    assert "the BPE ends" not in capsys.readouterr().out


def test_hellaswag_goes_into_the_data_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "load_rows", lambda data_dir: ["row"] * 3 if data_dir == f"{tmp_path}/new" else [])
    prepare_data.main(["hellaswag", f"--data_dir={tmp_path}/new"])
    expected = f"3 questions; next: python evaluate.py gpt2 --hellaswag --data_dir={tmp_path}/new\n"
    assert capsys.readouterr().out == expected


def test_no_torch_is_loaded(run_script, tmp_path):
    """By no way that prepares, or in a worker: it takes seconds and 200 MB for each core."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "mine.txt").write_text("the cat sat on the mat. " * 100_000)  # several batches, so workers start
    argv = [tmp_path / "mine.txt", "--tokenizer=bpe", f"--data_dir={tmp_path}", "--processes=2"]
    done = run_script("prepare_data.py", *argv, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "train.py" in done.stdout


# ---- the real text ----------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(("name", "train", "val"), [("shakespeare", 301_966, 36_059), ("shakespeare_char", 1_003_854, 111_540)])
def test_tiny_shakespeare_has_the_known_counts(gpt2_files, tmp_path, root, name, train, val):
    """Counts as published by nanoGPT's data/shakespeare*/readme.md."""
    try:
        text = download.cached(sources.SHAKESPEARE, root / "data" / ".sources" / sources.SHAKESPEARE.sha256[:16])
    except UserError as e:
        pytest.skip(f"no tiny Shakespeare: {e}")
    (tmp_path / ".sources").mkdir()
    (tmp_path / ".sources" / sources.SHAKESPEARE.sha256[:16]).write_bytes(text)
    prepare_data.main([name, f"--data_dir={tmp_path}"])
    opened = shards.open_dataset(tmp_path / name)
    assert (len(opened.split("train")), len(opened.split("val"))) == (train, val)
    assert (prepared_text(tmp_path / name, "train") + prepared_text(tmp_path / name, "val")).encode() == text
