"""prepare_data.py: one's own text becomes a data set, whole or not at all, whatever the locale."""

import shlex
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import configurator
import data
import prepare_data
import train
from model import UserError


def prepared_text(folder, split: str) -> str:
    opened = data.open_dataset(folder)
    stream = opened.split(split)
    return opened.tokenizer.decode(stream.read(0, len(stream)).tolist()) if len(stream) else ""


@pytest.fixture
def own(tmp_path):
    """own(argument, …) prepares with the character tokenizer into tmp_path/data and returns that folder."""

    def prepare(*argv: str):
        prepare_data.main([*map(str, argv), "--tokenizer=char", f"--data_dir={tmp_path}/data"])
        return tmp_path / "data"

    return prepare


TEXT = "".join(chr(0x41 + i % 26) + "é\r\n☃😀"[i % 5] for i in range(200))


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_split_cuts_once_at_the_share_of_characters(texts, val_fraction):
    """Nothing is lost or moved; no document is empty; at most one is cut in two."""
    texts = [t for t in texts if t]
    train_texts, val_texts = prepare_data.split(texts, val_fraction)
    total = sum(map(len, texts))
    assert "".join(train_texts + val_texts) == "".join(texts)
    assert sum(map(len, train_texts)) == int(total * (1 - val_fraction))
    assert all(train_texts + val_texts)
    assert len(train_texts) + len(val_texts) <= len(texts) + 1


def test_a_file_becomes_a_data_set_cut_at_nine_tenths(own, tmp_path):
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    folder = own(tmp_path / "mine.txt") / "mine"
    assert prepared_text(folder, "train") == TEXT[:360]
    assert prepared_text(folder, "val") == TEXT[360:]


@pytest.fixture
def several(tmp_path):
    """Files in a folder, one of them below it, one of another kind."""
    notes = tmp_path / "notes"
    (notes / "more").mkdir(parents=True)
    for name, text in {"b.txt": "bb", "a.md": "aaaa", "more/c.TXT": "cc", "picture.png": "\0\1", "empty.txt": ""}.items():
        (notes / name).write_text(text)
    return notes


def test_a_folder_is_its_texts_in_sorted_order(own, several):
    folder = own(several) / "notes"
    assert prepared_text(folder, "train") + prepared_text(folder, "val") == "aaaabbcc"


@pytest.mark.parametrize(("pattern", "expected"), [("*.txt", "bb"), ("**/*.[tT][xX][tT]", "bbcc"), ("[ab].*", "aaaabb")])
def test_a_glob_is_what_it_matches(own, several, pattern, expected):
    folder = own(f"{several}/{pattern}", "--name=globbed") / "globbed"
    assert prepared_text(folder, "train") + prepared_text(folder, "val") == expected


def test_documents_are_kept_apart_by_end_of_text(several, tmp_path, gpt2_files):
    """... and by nothing else: a '<|endoftext|>' that a document contains is text."""
    (several / "a.md").write_text("aaaa <|endoftext|>" + "x" * 40)
    prepare_data.main([str(several), f"--data_dir={tmp_path}", "--name=apart"])
    opened = data.open_dataset(tmp_path / "apart")
    ids = [i for s in ("train", "val") for i in opened.split(s).read(0, len(opened.split(s))).tolist()]
    assert ids.count(50256) in (1, 2)  # three documents; the cut into train and val may fall between two
    assert "<|endoftext|>" in opened.tokenizer.decode([i for i in ids if i != 50256])
    assert prepare_data.tokenize(["a", "b", "c"], opened.tokenizer, "").tolist() == [64, 50256, 65, 50256, 66]


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "text".encode("utf-16"), b"\xff"])
def test_what_is_not_utf8_is_refused_by_name_and_byte(own, tmp_path, content):
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.txt is not UTF-8 \(byte \d"):
        own(tmp_path / "odd.txt")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_refused(own, tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.txt: there is no text"):
        own(tmp_path / "empty.txt")


def test_a_folder_without_text_is_refused(own, tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="holds no file ending in"):
        own(tmp_path / "pictures")


def test_a_text_too_short_to_be_split_is_refused(own, tmp_path):
    """One character leaves nothing to train on: better said here than at the first step."""
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UserError, match="short"):
        own(tmp_path / "short.txt")


def test_a_byte_order_mark_is_no_text(own, tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    folder = own(tmp_path / "bom.txt") / "bom"
    assert prepared_text(folder, "train") == TEXT[:360]


def test_utf8_is_read_whatever_the_locale_says(run_script, tmp_path):
    """A C locale without Python's own coercion to UTF-8, and a name that is not ASCII."""
    (tmp_path / "schön.txt").write_bytes(TEXT.encode())
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("prepare_data.py", tmp_path / "schön.txt", "--tokenizer=char", f"--data_dir={tmp_path}", env=env)
    assert done.returncode == 0, done.stderr
    assert prepared_text(tmp_path / "schön", "train") == TEXT[:360]


def test_what_is_there_is_not_replaced_without_force(own, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    folder = own(path) / "mine"
    before = data.open_dataset(folder).sha256
    path.write_text("something else " * 20)
    with pytest.raises(UserError, match=r"is there already: type --force"):
        own(path)
    assert data.open_dataset(folder).sha256 == before
    own(path, "--force")
    assert data.open_dataset(folder).sha256 != before


def test_a_folder_that_holds_something_else_is_left_alone(own, tmp_path):
    (tmp_path / "mine.txt").write_bytes(TEXT.encode())
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        own(tmp_path / "mine.txt")
    assert [p.name for p in (tmp_path / "data" / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_data_set_is_mended_by_the_command_its_error_names(monkeypatch, tmp_path):
    """The message says to prepare the data again: that must be possible."""
    monkeypatch.setattr(prepare_data, "fetch", lambda source: TEXT.encode())
    command = ["shakespeare_char", f"--data_dir={tmp_path}"]
    prepare_data.main(command)
    folder = tmp_path / "shakespeare_char"
    (folder / "train_000000.bin").write_bytes(b"")
    with pytest.raises(UserError) as e:
        data.open_dataset(folder)
    prepare_data.main([*command, *(["--force"] if "--force" in str(e.value) else [])])
    assert prepared_text(folder, "train") == TEXT[:360]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_while_writing_leaves_no_data_set(own, tmp_path, monkeypatch, failing):
    """Disk full at the first, second, third or fourth file: the earlier data set is gone or whole, never mixed."""
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    folder = own(path) / "mine"
    path.write_text("something else " * 20)
    calls, plain = iter(range(1, 100)), data.write_atomically

    def full(target, content):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return plain(target, content)

    monkeypatch.setattr(data, "write_atomically", full)
    with pytest.raises(UserError, match="No space left on device"):
        own(path, "--force")
    assert not (folder / data.MANIFEST).exists()
    with pytest.raises(UserError, match="holds no prepared data"):
        data.open_dataset(folder)
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
@pytest.mark.parametrize("name", ["mine", "my own text"])
def test_the_next_command_that_is_printed_runs(tmp_path, text, tiny_flags, capsys, monkeypatch, root, name):
    """As typed into a shell, with the flags of the tiny run in front of its own."""
    monkeypatch.chdir(root)
    (tmp_path / f"{name}.txt").write_text(text)
    prepare_data.main([f"{tmp_path}/{name}.txt", "--tokenizer=char", f"--data_dir={tmp_path}/data"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next: ")
    launcher, script, config, *flags = shlex.split(line.removeprefix("next: "))
    assert (launcher, script) == ("torchrun", "train.py")
    small = [f for f in tiny_flags if not f.startswith(("--dataset", "--data_dir", "--vocab_size"))]
    train.train(configurator.load([config, *small, *flags, f"--out_dir={tmp_path}/run"], ""))
    assert (tmp_path / "run" / "step_00000006").is_dir()


def test_ids_are_those_of_the_characters(own, tmp_path):
    """Code point order, so that the same alphabet always has the same ids."""
    (tmp_path / "mine.txt").write_text("cab" * 10)
    stream = data.open_dataset(own(tmp_path / "mine.txt") / "mine").split("train")
    np.testing.assert_array_equal(stream.read(0, 27), [2, 0, 1] * 9)
