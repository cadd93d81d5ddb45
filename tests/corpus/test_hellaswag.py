"""hellaswag.py: the same rows from either file, kept where the data is; and how they become batches."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base import download
from base.errors import UserError
from corpus import hellaswag
from corpus.hellaswag import Row, batch_rows, encode_row, load_rows
from tokenizer import CharTokenizer

LETTERS = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz .,ž🙂\n")


def test_the_real_rows_are_the_authors_whichever_file_they_come_from():
    pytest.importorskip("pyarrow", reason="HellaSwag's copy in the package index is in Arrow's format")
    try:
        rows = load_rows("data")
    except UserError as e:
        pytest.skip(f"no HellaSwag: {e}")
    assert len(rows) == 10_042
    content = json.dumps([[row.context, row.endings, row.label] for row in rows]).encode()
    assert hashlib.sha256(content).hexdigest() == "acbe728db663c4af5790feebf795c13f270c2729de7941a0391edbe35bc9e311"


ROWS = [Row(f"context {i} ž", tuple(f"ending {i}{j}" for j in "abcd"), i % 4) for i in range(10)]


@pytest.fixture
def sources(monkeypatch):
    """sources("JSONL", "ARROW"): what can be downloaded; both hold ROWS. Returns the list of what was downloaded."""
    pyarrow = pytest.importorskip("pyarrow")
    table = [{"ind": i, "ctx": row.context, "endings": list(row.endings), "label": row.label} for i, row in enumerate(ROWS)]
    jsonl = "".join(json.dumps(row) + "\n" for row in table).encode()
    table = pyarrow.Table.from_pylist([row | {"label": str(row["label"])} for row in table])  # as in the package
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = {"JSONL": jsonl, "ARROW": sink.getvalue().to_pybytes()}
    for name, data in content.items():
        source = replace(getattr(hellaswag, name), sha256=hashlib.sha256(data).hexdigest(), url=name)
        monkeypatch.setattr(hellaswag, name, source)
    downloaded = []

    def arrange(*available):
        def fetch(source, log):
            if source.url not in available:
                raise UserError(f"cannot download {source.url}")
            downloaded.append(source.url)
            return content[source.url]

        monkeypatch.setattr(download, "fetch", fetch)
        return downloaded

    return arrange


@pytest.mark.parametrize("available", [["JSONL", "ARROW"], ["ARROW"]])
def test_rows_are_the_same_from_either_file_and_downloaded_once(sources, tmp_path, available):
    """... into the data folder that is asked for: they used to go into data/ whatever --data_dir was."""
    downloaded = sources(*available)
    assert load_rows(tmp_path) == load_rows(tmp_path) == ROWS
    assert downloaded == available[:1]
    (kept,) = (tmp_path / ".hellaswag").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert load_rows(tmp_path) == ROWS
    assert len(downloaded) == 2


def test_fewer_rows_are_spread_evenly_and_without_both_files_the_error_is_one_line(sources, tmp_path):
    sources()
    logged = []
    with pytest.raises(UserError, match="cannot download ARROW"):
        load_rows(tmp_path, log=logged.append)
    assert logged == ["cannot download JSONL; using another copy"]
    sources("JSONL")
    assert load_rows(tmp_path, 4) == [ROWS[i] for i in (0, 2, 5, 7)]
    with pytest.raises(UserError, match="rows=11 must lie between 1 and 10"):
        load_rows(tmp_path, 11)


@pytest.mark.parametrize(
    ("block_size", "context", "endings"),
    [
        (11, "abcdef", [" x", " xyzw", " ", " y."]),
        (10, "bcdef", [" x", " xyzw", " ", " y."]),
        (5, "f", [" x", " xyz", " ", " y."]),
        (2, "f", [" ", " ", " ", " "]),
    ],
)
def test_a_row_is_its_text_a_space_and_an_ending_and_what_does_not_fit_loses_its_beginning(block_size, context, endings):
    found, ids, cut = encode_row(Row("abcdef", ("x", "xyzw", "", "y."), 0), LETTERS, block_size)
    assert LETTERS.decode(found) == context
    assert [LETTERS.decode(i) for i in ids] == endings
    assert cut == (block_size < 11)


lengths = st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 7), min_size=4, max_size=4)), min_size=1, max_size=30)


@given(lengths, st.integers(1, 200))
def test_batches_hold_each_row_once_within_the_budget(rows, batch_tokens):
    pairs = [([0] * context, [[0] * n for n in endings], False) for context, endings in rows]
    batches = batch_rows(pairs, batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert len({rows[i][0] for i in batch}) == 1
        tokens = len(batch) * (rows[batch[0]][0] + 4 * max(n for i in batch for n in rows[i][1]))
        assert tokens <= batch_tokens or len(batch) == 1
