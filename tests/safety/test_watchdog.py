"""watchdog.py: a process that is stuck is named, and all end; one that merely sleeps with all others is not."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ranks

import train
from base import errors
from configurator import Config
from engine import parallel, restore
from safety import watchdog


def halting(cfg: Config, halt: list[int], how: str) -> None:
    """train.py, in which some processes stop in their fourth step."""
    plain, rank, sleep = train.train_step, int(os.environ["RANK"]), time.sleep
    watchdog.time.sleep = lambda seconds: sleep(min(seconds, 2.0))  # the time that each has to tell where it stands

    def train_step(run, step):
        if step == 3 and rank in halt:
            if how == "asleep":
                run.batches.batch = lambda *_: sleep(1000)
            else:
                os.kill(os.getpid(), signal.SIGSTOP)
        if step >= 3:
            sleep(0.9)  # else the run is over before anybody is named
        return plain(run, step)

    train.train_step = train_step
    errors.entry(lambda _: train.train(cfg))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SECONDS = 2.4  # without a step, until a run is taken to be stuck


@pytest.fixture
def impatient(tiny_run, tmp_path) -> Config:
    changes = dict(learning_rate=1e-3, timeout_minutes=SECONDS / 60, prefetch=False, checkpoint_interval=2)
    return Config(**tiny_run | changes, out_dir=str(tmp_path / "run"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("silent", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_does_not_answer_is_named(impatient, tmp_path, silent):
    """By another, which ends; once it wakes up, it ends as well. What was saved stays."""
    other = 1 - silent
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [silent], "stopped") as found:
        until(lambda: stopped(found[silent].pid))
        ranks.wait([found[other]], 20)
        assert found[other].status == 2
        (line,) = found[other].stderr.splitlines()
        assert line.startswith(f"[rank {other}] error: nothing has finished for")
        assert re.search(rf"rank {silent} does not answer; rank {other} waits \([a-z ]+ step 3, at [a-z_/]+\.py:\d+\); ", line)
        assert "--resume" in line
        os.kill(found[silent].pid, signal.SIGCONT)
        ranks.wait(found, 20)
        assert found[silent].status not in (0, None)
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000003"  # the best so far, by validation


@pytest.mark.slow
def test_a_process_that_is_stuck_in_python_is_named_with_its_line(impatient, tmp_path):
    """Reading data for ever, say; the other one waits for it at a place of its own."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [1], "asleep") as found:
        ranks.wait(found, 30)
        assert [r.status for r in found] == [2, 2]
        (line,) = (found[0].stderr + found[1].stderr).splitlines()
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(n for n, text in enumerate(source, 1) if "run.batches.batch = lambda *_: sleep(1000)" in text)
    assert re.search(rf"rank 1 waits \([a-z ]+ step 3, at tests/safety/{Path(__file__).name}:{number}\)", line)
    assert re.search(r"rank 0 waits \([a-z ]+ step 3, at [a-z_/]+\.py:\d+\)", line)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.slow
def test_a_run_that_is_suspended_as_a_whole_continues_afterwards(impatient, tmp_path):
    """By a scheduler, or a laptop's lid: nobody is stuck, and the time does not count."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [0, 1], "stopped") as found:
        until(lambda: all(stopped(r.pid) for r in found))
        time.sleep(1.6 * SECONDS)
        for r in found:
            os.kill(r.pid, signal.SIGCONT)
        ranks.wait(found, 30)
        assert [r.status for r in found] == [0, 0], found[0].stderr + found[1].stderr
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000006"


def test_a_process_alone_is_not_watched():
    watch = watchdog.Watchdog(parallel.World(), 0.01)
    assert not watch.is_alive()
    time.sleep(0.05)
    watch.beat("anything")
    watch.close()
