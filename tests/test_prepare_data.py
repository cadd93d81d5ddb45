"""prepare_data.py: your own text becomes a data set, whole or not at all, whatever the locale."""

import hashlib
import itertools
import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
from runs import contents

import configurator
import prepare_data
import train
from base import download
from base.errors import UserError
from corpus import bpe, hellaswag, shards, sources, writing
from corpus.sources import NAMED

SHORTEST = writing.SHORTEST
TEXT = "".join(chr(0x41 + i % 26) + "é\r\n☃😀"[i % 5] for i in range(200))


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


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(argument, …) in tmp_path prepares into its folder data, with one id per character unless told otherwise; returns
    that folder.
    """
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Path:
        prepare_data.main(["--tokenizer=char", f"--data_dir={tmp_path}/data", *argv])
        return tmp_path / "data"

    return call


@pytest.fixture
def mine(tmp_path) -> Path:
    """A text file."""
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    return tmp_path / "mine.txt"


def prepared_text(folder: Path, *splits: str) -> str:
    opened = shards.open_dataset(folder)
    streams = [opened.split(split) for split in splits]
    return "".join(opened.tokenizer.decode(s.read(0, len(s)).tolist()) for s in streams if len(s))


FILES = {"b.txt": "bb", "a.md": "aaaa", "more/c.TXT": "cc", "picture.png": "\0\1", "empty.txt": ""}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("", "aaaabbcc"), ("b.txt", "bb"), ("*.txt", "bb"), ("**/*.[tT][xX][tT]", "bbcc"), ("[ab].*", "aaaabb")],
)
def test_a_folder_is_its_texts_in_sorted_order_and_a_glob_what_it_matches(prepare, tmp_path, pattern, expected):
    (tmp_path / "notes" / "more").mkdir(parents=True)
    for name, text in FILES.items():
        (tmp_path / "notes" / name).write_text(text)
    assert prepared_text(prepare(f"notes/{pattern}", "--name=globbed") / "globbed", "train", "val") == expected


def test_documents_are_kept_apart_by_end_of_text(tmp_path, prepare, gpt2_files, capsys):
    """Files by themselves, documents of one file by their separator, and by nothing else: a '<|endoftext|>' is text."""
    (tmp_path / "letters").mkdir()
    for name, text in {"a": "a<|endoftext|>", "b": "b", "c": "ccccc"}.items():
        (tmp_path / "letters" / f"{name}.txt").write_text(text)
    opened = shards.open_dataset(prepare("letters", "--tokenizer=gpt2", "--val_fraction=0.25") / "letters")
    ids = opened.split("train").read(0, len(opened.split("train"))).tolist()
    assert ids == [*opened.tokenizer.encode("a<|endoftext|>"), 50256, *opened.tokenizer.encode("b")]
    stories = [f"Story {i}." for i in range(250)]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    capsys.readouterr()
    prepare("stories.txt", "--tokenizer=gpt2", "--name=plain")
    assert "--separator='<|endoftext|>'" in capsys.readouterr().out
    folder = prepare("stories.txt", "--tokenizer=gpt2", "--separator=<|endoftext|>") / "stories"
    assert prepared_text(folder, "val") == "<|endoftext|>".join(stories[::100])
    assert prepared_text(folder, "train").count("<|endoftext|>") == 246
    assert json.loads((folder / "manifest.json").read_text())["documents"] == {"val": 3, "train": 247}


ROWS, LETTERS, LONG = b"a,b\n" * 1000, b"axbxcx" * 100, "x" * 300


@pytest.mark.parametrize(
    ("name", "content", "argv", "message"),
    [
        ("odd.txt", "text".encode("utf-16"), ["odd.txt"], r"odd\.txt is not UTF-8 \(byte 0"),
        ("odd.txt", b"\xef\xbb\xbf", ["odd.txt"], r"odd\.txt has no text"),  # a byte order mark alone
        ("odd.txt", b"a", ["odd.txt"], "the text is too short"),
        ("odd.txt", None, ["odd.txt"], "has no file ending in"),
        ("rows.json", ROWS, ["rows.json"], r"rows\.json holds rows, not prose: .*\.jsonl"),
        ("rows.CSV", ROWS, ["ro*"], r"rows\.CSV holds rows, not prose: .*\.jsonl"),
        ("a.txt", LETTERS, ["a.txt", "--column=body"], "--column=body is for .jsonl"),
        ("a.txt", LETTERS, ["a.txt", "--split=test"], "--split=test is for a data set of the hub"),
        ("a.txt", LETTERS, ["a.txt", "--shard_tokens=0"], "shard_tokens=0 must be at least 1"),
        ("a.txt", LETTERS, ["a.txt", "--separator=x", "--val_fraction=0.6"], "at most 0.5 of documents"),
        (
            "a.txt",
            LETTERS,
            [LONG, "--name=x"],
            "is not a file, folder",
        ),  # a traceback once, as the next two: File name too long
        ("a.txt", LETTERS, ["a.txt", f"--name={LONG}"], "at most 200 bytes"),
        ("a.txt", LETTERS, ["shakespeare", "--name=" + "é" * 150], "at most 200 bytes"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path, prepare, name, content, argv, message):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(*argv)
    assert not (tmp_path / "data").exists()


def test_a_text_is_refused_unless_a_sequence_can_be_trained_on(tmp_path, prepare, monkeypatch):
    """The smallest configs read 64 tokens and the one that follows."""
    monkeypatch.setattr(writing, "SHORTEST", SHORTEST)
    assert min(configurator.load_file(f).T for f in prepare_data.CONFIGS.values()) + 1 == SHORTEST
    (tmp_path / "mine.txt").write_text("ab" * 320)
    with pytest.raises(UserError, match=f"too little text .* the val split has 64 tokens of at least {SHORTEST}"):
        prepare("mine.txt")
    assert not (tmp_path / "data" / "mine").exists()
    (tmp_path / "mine.txt").write_text("ab" * 320 + "a")
    prepare("mine.txt")


def test_utf8_is_read_whatever_the_locale_says(run_script, tmp_path):
    """A C locale without Python's own coercion to UTF-8, and a name that is not ASCII."""
    (tmp_path / "schön.txt").write_bytes(TEXT.encode() * 2)
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("prepare_data.py", tmp_path / "schön.txt", "--tokenizer=char", f"--data_dir={tmp_path}", env=env)
    assert done.returncode == 0, done.stderr
    assert prepared_text(tmp_path / "schön", "train") == (TEXT * 2)[:720]


def test_what_is_there_is_not_replaced_without_force(prepare, mine, tmp_path):
    folder = prepare("mine.txt") / "mine"
    before = shards.open_dataset(folder).sha256
    mine.write_text("something else " * 20)
    with pytest.raises(UserError, match=r"already exists: use --force"):
        prepare("mine.txt")
    assert shards.open_dataset(folder).sha256 == before
    prepare("mine.txt", "--force")
    assert shards.open_dataset(folder).sha256 != before
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="has other files in it"):
        prepare("mine.txt", "--name=other")
    assert [p.name for p in (tmp_path / "data" / "other").iterdir()] == ["thesis.txt"]


def test_a_damaged_data_set_is_repaired_by_the_command_its_error_names(a_text, tmp_path):
    command = ["shakespeare_char", f"--data_dir={tmp_path}"]
    prepare_data.main(command)
    folder = tmp_path / "shakespeare_char"
    (folder / "train_000000.bin").write_bytes(b"")
    with pytest.raises(UserError) as e:
        shards.open_dataset(folder)
    prepare_data.main([*command, *(["--force"] if "--force" in str(e.value) else [])])
    assert prepared_text(folder, "train") == TEXT[:360]


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 6])
def test_a_failure_while_writing_leaves_no_data_set(prepare, mine, monkeypatch, failing):
    """Disk full at the tokenizer, the progress, either shard, the tokenizer again or the manifest: the earlier data set is
    gone or whole, never mixed.
    """
    folder = prepare("mine.txt") / "mine"
    mine.write_text("something else " * 20)
    calls, plain = iter(range(1, 100)), os.replace

    def full(temporary, target):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return plain(temporary, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            prepare("mine.txt", "--force")
    assert not (folder / shards.MANIFEST).exists()
    prepare("mine.txt")  # and the way is free
    assert prepared_text(folder, "train").startswith("something else")


def test_too_little_space_is_found_before_anything_is_written(prepare, mine, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="MiB free"):
        prepare("mine.txt")
    assert not (tmp_path / "data").exists()


def test_the_next_command_that_is_printed_runs(tmp_path, text, tiny_flags, capsys, prepare, root, monkeypatch):
    """In a shell, with the flags of the tiny run in front of its own."""
    (tmp_path / "my own text.txt").write_text(text)
    prepare("my own text.txt")
    monkeypatch.chdir(root)
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


@pytest.fixture(scope="session")
def straight(corpus, tmp_path_factory) -> Path:
    """What all of the ways below must come to, made in one go by one process."""
    folder = tmp_path_factory.mktemp("straight")
    prepare_data.main(arguments(corpus, folder, "--processes=1"))
    return folder / "made"


def test_every_hundredth_document_validates_and_the_rest_trains(corpus, straight):
    """Each document's ids are its own, with <|endoftext|> between, over the borders of blocks, batches and shards."""
    opened = shards.open_dataset(straight)
    rows = [json.loads(line)["text"] for line in (corpus / "rows.jsonl").read_text().splitlines()]
    rows = [text for text in rows if text]  # an empty one is none
    for split, texts in {"val": rows[::100], "train": [t for i, t in enumerate(rows) if i % 100]}.items():
        stream, end = opened.split(split), opened.tokenizer.end_of_text
        ids = [i for text in texts for i in [end, *opened.tokenizer.encode(text)]][1:]
        assert stream.read(0, len(stream)).tolist() == ids
        assert [len(s) for s in opened.splits[split]][:-1] == [7000] * (len(ids) // 7000)
    assert len(opened.splits["train"]) > 5
    documents = json.loads((straight / "manifest.json").read_text())["documents"]
    assert documents == {"val": len(rows[::100]), "train": len(rows) - len(rows[::100])}
    assert {p.name for p in straight.iterdir() if p.suffix != ".bin"} == {".lock", "tokenizer.json", "manifest.json"}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_shards_do_not_depend_on_processes_or_batches(corpus, straight, tmp_path, small_batches, processes):
    prepare_data.main(arguments(corpus, tmp_path, f"--processes={processes}"))
    assert contents(tmp_path / "made") == contents(straight)


def killed_at(stop: int, argv: list[str]) -> None:
    """Prepare, and end without a word before that flush to the disk or renaming: the moments between which files differ."""
    writing.BATCH, writing.SAVE_SECONDS = 40_000, 0.0
    calls = itertools.count(1)

    def dying(plain):
        return lambda *args: os._exit(9) if next(calls) == stop else plain(*args)

    os.fsync, os.replace = dying(lambda _: None), dying(os.replace)
    prepare_data.main(argv)


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(corpus, straight, tmp_path, capsys):
    resumed = 0
    for stop in itertools.count(1):
        argv, made = arguments(corpus, tmp_path / "data", "--processes=1"), tmp_path / "data" / "made"
        with ranks.started(1, tmp_path / f"{stop}", killed_at, stop, argv) as started:
            ranks.wait(started)
        if started[0].status == 0:
            break
        assert started[0].status == 9
        assert not (made / shards.MANIFEST).exists()
        capsys.readouterr()
        prepare_data.main(argv)
        resumed += "resuming where it stopped" in capsys.readouterr().out
        assert contents(made) == contents(straight)
        shutil.rmtree(made)
    assert stop > 40
    assert resumed > stop - 10  # all but the first few, before which there was nothing


@pytest.fixture
def half(corpus, tmp_path, monkeypatch, small_batches) -> Path:
    """The folder of a data set that is incomplete."""

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing.ShardWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_data.main(arguments(corpus, tmp_path, "--processes=1"))
    return tmp_path / "made"


def test_an_incomplete_one_of_something_else_is_refused_and_started_again_with_force(half, corpus, straight):
    with pytest.raises(UserError, match=r"is incomplete, from another request \(shard_tokens was 7000\): use --force"):
        prepare_data.main(arguments(corpus, half.parent, "--shard_tokens=8000"))
    with writing.lock(half), pytest.raises(UserError, match="another process is preparing"):
        prepare_data.main(arguments(corpus, half.parent))
    os.utime(corpus / "rows.jsonl")
    with pytest.raises(UserError, match=r"incomplete, from another request \(text was .*rows\.jsonl"):
        prepare_data.main(arguments(corpus, half.parent))
    prepare_data.main(arguments(corpus, half.parent, "--force"))
    assert contents(half) == contents(straight)


DAMAGE = {
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "not UTF-8": lambda text: "\xff",
    "another place": lambda text: text.replace('"part": 0', '"part": 1'),
    "another request": lambda text: text.replace('"request"', '"wish"'),
    "nested too deep": lambda text: "[" * 100_000,
}
IRREGULAR = {  # opening a FIFO waited for ever, and reading /dev/zero did not end
    "fifo": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", [*DAMAGE, *IRREGULAR])
def test_a_damaged_progress_is_refused_and_a_tokenizer_that_is_no_file(half, corpus, kind):
    path, other = half / writing.PROGRESS, half.parent / "tokenizer.json"
    if kind in DAMAGE:
        path.write_text(DAMAGE[kind](path.read_text()), encoding="latin-1")
    else:
        path.unlink()
        for place in (path, other):
            IRREGULAR[kind](place)
        with pytest.raises(UserError, match=r"is not gpt2, bpe, char or a folder with a tokenizer\.json"):
            prepare_data.main(arguments(corpus, half.parent, "--name=new", f"--tokenizer={other.parent}"))
    with pytest.raises(UserError, match=r"progress\.json is damaged .*: use --force"):
        prepare_data.main(arguments(corpus, half.parent))


def test_an_error_in_the_text_leaves_nothing_behind(tmp_path, prepare, small_batches):
    """... so that the same command runs once the text is right. It was `is incomplete, from another request`."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({"type": "char", "characters": ["a"]}))
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' * 99 + b"{")
    with pytest.raises(UserError, match="line 100 is not JSON"):
        prepare("rows.jsonl", f"--tokenizer={tmp_path}")
    assert not (tmp_path / "data" / "rows").exists()
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' * 200)
    assert prepared_text(prepare("rows.jsonl", f"--tokenizer={tmp_path}") / "rows", "val") == "aa"


# ---- other sources ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parquet_and_the_hub_come_to_the_same_shards_as_json_lines(corpus, straight, tmp_path, monkeypatch, small_batches):
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
        made, expected = contents(folder / "made"), contents(straight)
        manifests = [json.loads(m.pop("manifest.json")) for m in (made, expected)]
        assert made == expected
        assert manifests[0]["splits"] == manifests[1]["splits"]
    assert manifests[0]["revision"] == "abcdef"


def test_a_data_set_with_splits_of_its_own_keeps_them(tmp_path, monkeypatch, gpt2_files):
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
        (["shakespeare", "--tokenizer=bpe", "--name=named"], "bpe-", "--dataset=named --vocab_size="),
        (["shakespeare_char", "--name=other"], "char-", "config/shakespeare_char_cpu.py --dataset=other --vocab_size="),
    ],
)
def test_a_named_text_has_its_tokenizer_unless_another_is_given(tmp_path, a_text, capsys, argv, kind, next_command):
    for _ in range(2):  # what exists already names the next command again
        prepare_data.main([*argv, f"--data_dir={tmp_path}"])
        assert next_command in capsys.readouterr().out.splitlines()[-2]
    (folder,) = (p for p in tmp_path.iterdir() if p.name != ".sources")
    assert shards.open_dataset(folder).tokenizer.name.startswith(kind)


def test_enwik8_is_cut_as_usual(tmp_path, monkeypatch):
    """90, 5 and 5 million bytes."""
    (tmp_path / "enwik8").write_bytes(b"")
    monkeypatch.setattr(prepare_data, "local_copy", lambda source, data_dir: tmp_path / "enwik8")
    todo = prepare_data.plan(prepare_data.PrepareConfig(), ["enwik8"])
    cuts = [("train", 0, 90_000_000), ("val", 90_000_000, 5_000_000), ("test", 95_000_000, 5_000_000)]
    assert [(part.split, part.begin, part.size) for part in todo.parts] == cuts
    assert todo.name == "enwik8"


def test_a_bpe_is_learnt_from_the_start_of_a_large_text_and_may_end_early(tmp_path, prepare, monkeypatch, capsys):
    """... of its train split, and no more of it than LEARNT_FROM characters. "ab " times n has one word: a, b, ab, " ab"."""
    for name, size, warns in (("mine", 300, True), ("other", 258, False)):
        (tmp_path / f"{name}.txt").write_text("ab " * 100)
        opened = shards.open_dataset(prepare(f"{name}.txt", "--tokenizer=bpe", f"--vocab_size={size}") / name)
        assert opened.tokenizer.vocab_size == min(size, 256 + 2 + 1)  # ab, " ab", <|endoftext|>
        assert ("the BPE ends at 259 of 300 ids" in capsys.readouterr().out) == warns
    texts = ["val", *["train"] * 5, *["rest"] * 50]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.setattr(prepare_data, "LEARNT_FROM", 25)
    tokens = shards.open_dataset(prepare("rows.jsonl", "--tokenizer=bpe", "--vocab_size=300") / "rows").tokenizer.tokens
    assert b"train" in tokens
    assert not any(piece in tokens for piece in (b"re", b"st", b"va"))


def test_windows_line_ends_are_kept_and_a_name_that_nobody_chose_is_announced(tmp_path, prepare, capsys):
    for name, ends in {"a": "\n", "b": "\r\n", "c": "\r\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(f"one{ends}two{ends}".encode())
    for argv, name, announced, crlf in (
        (["b.txt", "c.txt"], "b", True, True),
        (["*.txt"], "mine", True, True),
        (["a.txt"], "a", False, False),
        (["a.txt", "c.txt", "--name=both"], "both", False, True),
    ):
        folder = prepare(*argv) / name
        out = capsys.readouterr().out
        assert ("is named" in out, f"is named {name}: use --name=" in out) == (announced, announced)
        assert out.count("CRLF") == crlf  # once
        assert name != "b" or prepared_text(folder, "train", "val") == "one\r\ntwo\r\n" * 2


def test_hellaswag_goes_into_the_data_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "load_rows", lambda data_dir: ["row"] * 3 if data_dir == f"{tmp_path}/new" else [])
    prepare_data.main(["hellaswag", f"--data_dir={tmp_path}/new"])
    expected = f"3 questions; next: python evaluate.py gpt2 --hellaswag --data_dir={tmp_path}/new\n"
    assert capsys.readouterr().out == expected


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
    assert prepared_text(tmp_path / name, "train", "val").encode() == text
