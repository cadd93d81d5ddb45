"""stop.py: a run ends for a signal or for its time limit, in all processes after the same step."""

import signal

import pytest
import ranks
import torch

from configurator import Config
from engine import parallel
from safety.stop import Stop

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("own_signals")


def test_before_the_first_step_a_signal_ends_the_process():
    Stop(Config(), CPU)
    with pytest.raises(SystemExit) as e:
        signal.raise_signal(signal.SIGTERM)
    assert e.value.code == 128 + signal.SIGTERM


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step():
    stop = Stop(Config(), CPU)
    stop()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def asked_in_one() -> list[bool]:
    """What a process hears in five steps, if the second of two gets a signal during its third."""
    world = parallel.start(CPU)
    stop, heard = Stop(Config(), CPU), []
    for step in range(5):
        if step == 2 and world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        heard.append(stop())
    parallel.stop()
    return heard


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    assert ranks.run(2, tmp_path / "ranks", asked_in_one) == [[False, False, True, True, True]] * 2
