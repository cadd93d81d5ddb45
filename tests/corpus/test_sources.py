"""sources.py: reading continues from any place in any kind of file or hub data set, and errors name the remedy."""

import itertools
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.errors import UserError
from corpus import sources
from corpus.sources import HubPart, JsonPart, ParquetPart, Reader, SeparatedPart, TextPart, text_parts
from tokenizer import GPT2Tokenizer

TEXTS = [f"document {i}: " + "é 日本 🙂 x\r\n"[: 3 + i % 7] * (i % 11) for i in range(70)]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Many chunks, row groups' batches and blocks in files of some KB."""
    monkeypatch.setattr(sources, "READ_AT_ONCE", 64)
    monkeypatch.setattr(sources, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(sources, "ENCODED_AT_ONCE", 50)
    monkeypatch.setattr(sources, "blocks", lambda text: plain_blocks(text, (), 50))


plain_blocks = sources.blocks


def as_text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def read(part, place=None) -> list:
    """part.read(), with all text as str."""
    return [([(as_text(text), first) for text, first in pieces], after) for pieces, after in part.read(place)]


def write_parquet(path, texts, column="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=16)


def write_rows(path, texts):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")  # blank lines are no rows


def part_of(kind: str, tmp_path):
    """A part of each kind with TEXTS in it."""
    path = tmp_path / "file"
    if kind == "text":
        path.write_bytes("\n".join(TEXTS).encode())
        return TextPart(path, "train", 0, path.stat().st_size)
    if kind == "separated":
        path.write_bytes(b"\xef\xbb\xbf" + "\n<|endoftext|>\n".join(TEXTS).encode())
        return SeparatedPart(path, "<|endoftext|>")
    if kind == "jsonl":
        write_rows(path, TEXTS)
        return JsonPart(path, "text")
    if kind == "parquet":
        write_parquet(path, TEXTS)
        return ParquetPart(path, "text")
    pytest.importorskip("datasets")
    for i, texts in enumerate([TEXTS[:30], TEXTS[30:]]):
        write_parquet(tmp_path / f"train-{i}.parquet", texts)
    return HubPart(str(tmp_path), "", "train", "text", None)


@pytest.mark.parametrize("kind", ["text", "separated", "jsonl", "parquet", "hub"])
def test_reading_continues_at_any_place(tmp_path, kind):
    part = part_of(kind, tmp_path)
    groups = [(pieces, json.loads(json.dumps(place))) for pieces, place in read(part)]
    assert len(groups) > 5
    documents = []
    for text, first in itertools.chain.from_iterable(pieces for pieces, _ in groups):
        documents += [""] * first
        documents[-1] += text
    expected = ["\n".join(TEXTS)] if isinstance(part, TextPart) else TEXTS
    if isinstance(part, SeparatedPart):
        expected = [text.strip("\r\n") for text in TEXTS]  # line breaks around the separator are no text
    assert documents == expected
    shares = [part.share(place) for _, place in groups]
    if not isinstance(part, HubPart):  # whose length a folder does not say
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] == 1.0
    for number, (_, place) in enumerate(groups[:-1]):
        assert [pieces for pieces, _ in read(part, place)] == [pieces for pieces, _ in groups[number + 1 :]]
    assert "".join(text for pieces, _ in read(part, groups[-1][1]) for text, _ in pieces) == ""


@settings(max_examples=50)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.floats(0.01, 0.99), st.booleans())
def test_texts_are_cut_once_at_the_share_of_characters(tmp_path_factory, texts, val_fraction, mark):
    """Nothing is lost or moved, no document is empty, and at most one is cut in two."""
    folder = tmp_path_factory.mktemp("cut")
    texts = [t.replace("\ufeff", "") for t in texts]
    for i, text in enumerate(texts):
        (folder / f"{i}").write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    parts = text_parts([folder / f"{i}" for i in range(len(texts))], val_fraction)
    found = [(part, "".join(text for pieces, _ in read(part) for text, _ in pieces)) for part in parts]
    train_texts, val_texts = ([text for part, text in found if part.split == split] for split in ("train", "val"))
    assert "".join(train_texts + val_texts) == "".join(texts)
    assert sum(map(len, train_texts)) == int(sum(map(len, texts)) * (1 - val_fraction))
    assert all(train_texts + val_texts)
    assert [part.split for part in parts] == ["train"] * len(train_texts) + ["val"] * len(val_texts)
    assert len(parts) <= len([t for t in texts if t]) + 1
    assert sum(part.first for part in parts) == len([t for t in texts if t])


SPACES = ["\u0085", "\u00a0", "\u1680", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000", "\t", "\x1c", "\x1f", "\x7f"]
SIGNS = [" ", "  ", "\n", "\r\n", "x", "'s", "12", ".", "é", "ぁ", "日", "я", "ก", "🙂"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(SIGNS + SPACES)).map("".join), st.integers(1, 9))
def test_a_cut_in_the_bytes_changes_no_id(tmp_path_factory, gpt2_files, text, size):
    """By any white space that Unicode knows, and any script."""
    path = tmp_path_factory.getbasetemp() / "strange.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ENCODED_AT_ONCE", size)
        patch.setattr(sources, "READ_AT_ONCE", 4)
        pieces = [piece for group, _ in TextPart(path, "train", 0, len(text.encode())).read() for piece, _ in group]
    assert b"".join(pieces) == text.encode()
    gpt2 = GPT2Tokenizer()
    assert [i for piece in pieces for i in gpt2.encode(piece.decode())] == gpt2.encode(text)


@pytest.mark.parametrize("words", ["word ", "汉字\n", "नमस्ते "])
def test_texts_of_any_script_are_cut(tmp_path, words):
    """Or the memory would grow with the file."""
    (tmp_path / "long.txt").write_text(words * 500)
    part = TextPart(tmp_path / "long.txt", "train", 0, (tmp_path / "long.txt").stat().st_size)
    assert max(len(text) for pieces, _ in part.read() for text, _ in pieces) < 100


def documents_of(groups) -> dict[str, str]:
    """split -> its text, with | where <|endoftext|> goes."""
    found: dict[str, str] = {}
    for split, text, separated in itertools.chain.from_iterable(groups):
        found[split] = found.get(split, "") + "|" * separated + as_text(text)
    return found


def test_every_nth_document_validates_whatever_it_lies_in(tmp_path):
    """Three files of three kinds, one of them plain text of several blocks; documents without text have no number."""
    texts = [f"text {i} " * (1 + i) for i in range(23)]
    write_rows(tmp_path / "a.jsonl", [*texts[:9], "", *texts[9:12]])
    (tmp_path / "b.txt").write_text(texts[12])
    write_parquet(tmp_path / "c.parquet", [*texts[13:20], None, *texts[20:]])
    parts = [sources.file_part(path, "text", "") for path in sorted(tmp_path.iterdir())]
    groups = list(Reader(parts, 4))
    assert documents_of(groups) == {
        "val": "|".join(texts[::4]),
        "train": "|".join(text for i, text in enumerate(texts) if i % 4),
    }
    for stop in range(len(groups)):
        first = Reader(parts, 4)
        before = list(itertools.islice(first, stop))
        again = Reader(parts, 4, json.loads(json.dumps(first.position)))
        assert before + list(again) == groups
        assert 0 <= first.share() <= 1


def test_a_document_cut_between_splits_is_no_new_one_and_one_that_goes_away_an_error(tmp_path):
    """No <|endoftext|> at a split's start, one between documents."""
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    parts = text_parts([tmp_path / name for name in "abc"], 0.5)
    assert documents_of(Reader(parts, 100)) == {"train": "a" * 10 + "|" + "b" * 5, "val": "b" * 5 + "|" + "c" * 10}
    (tmp_path / "c").unlink()
    with pytest.raises(UserError, match=r"cannot read .*c: No such file"):
        list(Reader(parts, 100))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 3 is not JSON"),
        ('{"body": "x", "id": 1}', r"line 3 has no column 'text': use --column=… \(it has body, id\)"),
        ('{"text": 5}', "line 3: column 'text' is int, not text"),
        ("[" * 100_000, "line 3 is not JSON"),
    ],
)
def test_a_row_that_is_no_document_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n' + line)
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}") as e:
        list(JsonPart(tmp_path / "a.jsonl", "text").read())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"x" * 100 + b"\xff" + b"y" * 100, "é".encode() * 50 + b"\xc3"])
def test_a_byte_that_is_no_utf8_is_found_at_its_place(tmp_path, content):
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.txt is not UTF-8 \(byte 100\)"):
        list(sources.decoded(tmp_path / "odd.txt"))


def test_a_parquet_file_without_the_column_says_what_it_has_and_a_missing_package_its_command(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS, column="body")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    for name, column, message in (
        ("a.parquet", "text", r"column 'text' does not exist: use --column=… \(it has id, body\)"),
        ("a.parquet", "id", "column 'id' is int64, not text"),
        ("b.parquet", "text", r"b\.parquet is not Parquet"),
    ):
        with pytest.raises(UserError, match=message):
            list(ParquetPart(tmp_path / name, column).read())
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="run pip install pyarrow"):
        list(ParquetPart(tmp_path / "a.parquet", "text").read())
    with pytest.raises(UserError, match="hf:owner/name needs a package: run pip install datasets"):
        sources.hub_revision("owner/name", "")


def test_in_a_folder_with_rows_a_readme_is_no_document(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "README.md").write_text("about")
    assert [p.name for p in sources.find([str(tmp_path)], [])] == ["a.jsonl"]
    assert "1 files read, 1 skipped (not .jsonl, .parquet)" in capsys.readouterr().out


# ---- the hub ----------------------------------------------------------------------------------------------------------


def test_a_data_set_that_is_not_there_is_told_from_a_hub_that_is_not_and_from_one_that_needs_a_script(monkeypatch):
    hub, datasets = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")
    errors = pytest.importorskip("huggingface_hub.errors")

    class Answer:  # what the error wants of an HTTP library's response
        headers, request, status_code = {}, None, 404

    def raising(error):
        def answer(*args, **how):
            raise error

        return answer

    missing = errors.RepositoryNotFoundError("404 Client Error.\n\nRepository Not Found", response=Answer())
    for error, message in (
        (OSError("no route"), r"could not reach .* \(no route\).*shakespeare, enwik8 or a folder"),
        (missing, "the hub has no data set 'owner/name' that you may read: Repository Not Found"),
    ):
        monkeypatch.setattr(hub.HfApi, "dataset_info", raising(error))
        with pytest.raises(UserError, match=message) as e:
            sources.hub_revision("owner/name", "")
        assert "\n" not in str(e.value)
    scripts = RuntimeError("Dataset scripts are no longer supported, but found x.py")
    monkeypatch.setattr(datasets, "load_dataset", raising(scripts))
    with pytest.raises(UserError, match=r"x\.py: use --revision=refs/convert/parquet"):
        HubPart("owner/x", "", "train", "text", None).open()


def test_a_wrong_name_is_found_at_once_and_a_stream_that_breaks_off_can_resume(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "train.parquet", TEXTS)
    for split, column, message in (
        ("nonsense", "text", r"nonsense.*use another --subset=… or --split=…"),
        ("train", "body", r"has no column 'body': use --column=… \(it has id, text\)"),
    ):
        with pytest.raises(UserError, match=message) as e:
            sources.hub_parts(str(tmp_path), "", {"": split}, column, None)
        assert "\n" not in str(e.value)
    plain = datasets.IterableDataset.iter

    def broken(self, batch_size):
        yield next(plain(self, batch_size))
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    with pytest.raises(UserError, match=r"broke off after 5 rows \(read timed out\): run the same command again"):
        list(HubPart(str(tmp_path), "", "train", "text", None).read())
