"""workers.py: the ids are the tokenizer's, in order, however many processes there are; and none is left behind."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus import bpe
from corpus.encoding import CannotEncode, Encoder, Pool, WorkerDied
from tokenizer import CharTokenizer, GPT2Tokenizer

SMALL = bpe.train(["the cat sat on the mat, and the cats sat on mats. " * 3], 300)
LETTERS = CharTokenizer.train("the cat 😀\n\ud800")
anything = st.text(st.characters(exclude_categories=[])) | st.lists(
    st.sampled_from(["the cat", "<|endoftext|>", " ", "\n", "\ud800", "日本", "🙂", "don't"])
).map("".join)


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return Encoder(GPT2Tokenizer())


@given(anything)
def test_ids_are_those_of_gpt2(gpt2, text):
    assert gpt2.encode(text).tolist() == GPT2Tokenizer().encode(text)


@given(anything)
def test_ids_are_those_of_a_bpe_of_ones_own(text):
    assert Encoder(SMALL).encode(text).tolist() == SMALL.encode(text)


@given(st.text(st.sampled_from("the cat 😀\n\ud800")))
def test_ids_are_those_of_an_alphabet(text):
    assert Encoder(LETTERS).encode(text).tolist() == LETTERS.encode(text)


@pytest.mark.parametrize("unknown", ["x", "\0", "\U0010ffff"])
def test_a_character_outside_the_alphabet_is_named(unknown):
    with pytest.raises(CannotEncode, match=f"(?s){unknown!r}".replace("\\", r"\\")):
        Encoder(LETTERS).encode("the cat" + unknown)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_four_bytes_only_where_two_are_too_few(size, dtype):
    encoder = Encoder(CharTokenizer([chr(i + 0x10000) for i in range(size)]))
    ids = encoder.encode_batch({"train": [(chr(0x10000 + size - 1), False)]})["train"]
    assert ids.dtype == np.dtype(dtype)
    assert ids.tolist() == [size - 1]


def test_a_batch_keeps_splits_apart_and_documents_too():
    batch = {"train": [("the cat", False), (" sat", False), ("on", True)], "val": [("mat", True)]}
    found = {split: ids.tolist() for split, ids in Encoder(SMALL).encode_batch(batch).items()}
    end = [SMALL.end_of_text]
    assert found["train"] == SMALL.encode("the cat") + SMALL.encode(" sat") + end + SMALL.encode("on")
    assert found["val"] == end + SMALL.encode("mat")
    assert Encoder(LETTERS).encode_batch({"train": [("t", False), ("h", True)]})["train"].tolist() == LETTERS.encode("th")


BATCHES = [(i, {"train": [(f"the cat {i} " * (i % 7), True)]}) for i in range(50)]


@pytest.mark.parametrize("processes", [1, 3])
def test_batches_come_back_in_order_and_every_process_is_gone(processes):
    with Pool(processes) as pool:
        found = list(pool.encode(Encoder(SMALL), BATCHES))
    assert [tag for tag, _ in found] == list(range(50))
    expected = [Encoder(SMALL).encode_batch(batch)["train"].tolist() for _, batch in BATCHES]
    assert [ids["train"].tolist() for _, ids in found] == expected
    assert [worker.poll() for worker in pool.workers] == ([0] * processes if processes > 1 else [])
    assert all(used["cpu_s"] > 0 and used["peak_bytes"] > 2**20 for used in pool.usage)


def test_few_batches_start_no_process():
    with Pool(3) as pool:
        assert len(list(pool.encode(Encoder(SMALL), BATCHES[:3]))) == 3
    assert pool.workers == []


def test_processes_that_were_started_for_nothing_end():
    with Pool(2) as pool:
        pool.start()
    assert [worker.poll() for worker in pool.workers] == [0, 0]
    with Pool(1) as pool:
        pool.start()
    assert pool.workers == []


def test_only_so_many_batches_are_read_ahead():
    """Or a corpus would come to lie in memory, when the disk is slower than the cores."""
    read = 0

    def batches():
        nonlocal read
        for read, batch in enumerate(BATCHES):  # noqa: B007 - how far it got is the point
            yield batch

    with Pool(2) as pool:
        for taken, _ in enumerate(pool.encode(Encoder(SMALL), batches())):
            assert read - taken <= 4


def test_a_worker_s_refusal_arrives_as_it_was():
    batches = [*BATCHES[:20], (20, {"train": [("unknown: é", False)]})]
    with pytest.raises(CannotEncode, match="'u'"), Pool(2) as pool:
        list(pool.encode(Encoder(CharTokenizer.train("the cat 0123456789")), batches))
    assert all(worker.poll() is not None for worker in pool.workers)


def test_a_killed_worker_is_an_error_and_no_hang():
    def batches():
        for tag, batch in BATCHES:
            if tag == 20:
                pool.workers[0].kill()
            yield tag, batch

    with pytest.raises(WorkerDied, match="-9"), Pool(2) as pool:
        list(pool.encode(Encoder(SMALL), batches()))
    assert all(worker.poll() is not None for worker in pool.workers)


def test_a_worker_ends_with_the_process_that_started_it(root):
    """... which cannot say goodbye when it is killed."""
    program = (
        "import os, types, workers\n"
        "letters = types.SimpleNamespace(characters=['a', 'b'], vocab_size=2, end_of_text=None)\n"
        "with workers.Pool(2) as pool:\n"
        "    next(pool.encode(workers.Encoder(letters), ((i, {'train': [('ab', False)]}) for i in range(50))))\n"
        "    print(*(w.pid for w in pool.workers), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as f:  # an orphan that nobody waits for stays in the table
        return f.read().rpartition(")")[2].split()[0] != "Z"


def test_workers_do_without_torch(root):
    program = "import sys, workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
