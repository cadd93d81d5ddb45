"""pool.py: results in order, little read ahead, and no process left behind, however the work ends."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from base.errors import UserError
from corpus.pool import map_in_order

PROGRAM = """
from corpus.pool import map_in_order
from test_pool import nap

if __name__ == "__main__":
    for tag, _ in map_in_order(nap, ((i, 0.01) for i in range(10**6)), 2, 1):
        if tag == 2:
            print("both work", flush=True)
"""


def square(number: int) -> int:
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_few_jobs_are_read_ahead_and_every_process_ends(processes):
    """Or a corpus would come to lie in memory when the disk is slower than the cores."""
    read = 0

    def jobs():
        nonlocal read
        for read in range(50):
            yield read, read

    results = map_in_order(square, jobs(), processes, 1)
    assert [(tag, result, read - tag <= 4) for tag, result in results] == [(i, i * i, True) for i in range(50)]
    assert not multiprocessing.active_children()
    assert [pid for _, pid in map_in_order(nap, [(i, 0.0) for i in range(3)], 2, 4)] == [os.getpid()] * 3  # few: no process


def test_a_refusal_arrives_as_it_was_and_closed_early_it_ends_its_processes():
    with pytest.raises(ValueError, match="-1 is negative"):
        list(map_in_order(square, [(i, i if i < 30 else -1) for i in range(60)], 2, 1))
    assert not multiprocessing.active_children()
    results = map_in_order(square, ((i, i) for i in range(10**9)), 2, 1)
    assert next(results) == (0, 0)
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("milliseconds", [0, 10, 30])
def test_a_killed_worker_is_one_line_and_no_hang(milliseconds):
    """Also in the middle of a large result, of whose rest ProcessPoolExecutor waited for ever."""
    results = map_in_order(bytes, ((i, 2**22) for i in range(10**6)), 2, 1)
    next(itertools.islice(results, 5, None))
    time.sleep(milliseconds / 1000)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a worker process was killed.*use --processes=1") as e:
        list(results)
    assert "\n" not in str(e.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(root, tmp_path, number):
    """Even if it is killed; and Ctrl-C, which reaches all processes of a terminal, leaves one traceback: the parent's."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests' / 'corpus'}"}
    process = subprocess.Popen(
        [sys.executable, program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    process.stdout.readline()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    errors = process.communicate(timeout=30)[1]  # the streams end when the last worker, which has inherited them, has ended
    assert process.returncode == -number
    assert errors.count("Traceback") == (number == signal.SIGINT)
