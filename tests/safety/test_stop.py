"""stop.py: the faults send signals to real runs; here is what they cannot see from outside."""

import signal

import pytest
import torch

from configurator import Config
from safety.stop import Stop


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(own_signals):
    stop = Stop(Config(), torch.device("cpu"))
    stop()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
