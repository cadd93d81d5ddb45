"""watchdog.py: a process that is stuck is named, and all end; one that merely sleeps with all others is not. And of stop.py
what the faults, which send signals to real runs, leave out."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
from processes import state, wait_until

import train
from base import errors
from configurator import Config
from engine import parallel, restore
from safety import watchdog
from safety.stop import Stop

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")


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


SECONDS = 2.4  # without a step, until a run is taken to be stuck


@pytest.fixture
def impatient(tiny_run, tmp_path) -> Config:
    changes = dict(learning_rate=1e-3, timeout_minutes=SECONDS / 60, prefetch=False, checkpoint_interval=2)
    return Config(**tiny_run | changes, out_dir=str(tmp_path / "run"))


WAITS = r"rank 0 waits \([a-z ]+ step 3, at [a-z_/]+\.py:\d+\)"
STUCK = r"rank 1 waits \([a-z ]+ step 3, at tests/safety/test_watchdog\.py:\d+\)"


@pytest.mark.parametrize(
    ("how", "told"),
    [("stopped", [r"rank 1 does not answer", WAITS]), pytest.param("asleep", [WAITS, STUCK], marks=pytest.mark.slow)],
)
def test_a_process_that_is_stuck_is_named(impatient, tmp_path, how, told):
    """By one that answers: all others end, a stopped one once it wakes up. What was saved stays. One that is stuck in Python,
    reading data for ever, say, tells its own line."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [1], how) as found:
        ranks.wait([found[0]], 30)
        if how == "stopped":
            os.kill(found[1].pid, signal.SIGCONT)
        ranks.wait(found, 20)
        assert found[0].status == 2
        assert found[1].status not in (0, None)
        (line,) = (found[0].stderr + found[1].stderr * (how == "asleep")).splitlines()
    assert re.search(f"error: nothing has finished for .*{'; '.join(told)}; .*--resume", line)
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000003"  # the best so far, by validation


@pytest.mark.slow
def test_a_run_that_is_suspended_as_a_whole_continues_afterwards(impatient, tmp_path):
    """By a scheduler, or a laptop's lid: nobody is stuck, and the time does not count."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [0, 1], "stopped") as found:
        wait_until(lambda: all(state(r.pid) == "T" for r in found), "all are stopped")
        time.sleep(1.6 * SECONDS)
        for r in found:
            os.kill(r.pid, signal.SIGCONT)
        ranks.wait(found, 30)
        assert [r.status for r in found] == [0, 0], found[0].stderr + found[1].stderr
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000006"


def test_a_process_alone_is_not_watched():
    assert not watchdog.Watchdog(parallel.World(), 0.01).is_alive()


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step():
    stop = Stop(Config(), torch.device("cpu"))
    stop()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
