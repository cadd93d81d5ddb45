"""Stop: when a run should end, because of a signal or because its time is up."""

import math
import signal
import sys
import time

import torch

from configurator import Config
from engine import parallel


class Stop:
    """Whether the run should end after this step: a signal came, or max_minutes are over. All processes agree."""

    def __init__(self, cfg: Config, device: torch.device):
        self.deadline = time.monotonic() + 60 * cfg.max_minutes if cfg.max_minutes else math.inf
        self.device, self.cfg, self.signals = device, cfg, []
        self.asked = self.stepped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: self.on_signal(n))

    def on_signal(self, number: int) -> None:
        """Note a signal, for the end of the step. A second Ctrl-C ends the process at once, as does any signal before the first
        step: compiling may take longer than the sender waits, and there is nothing to save.
        """
        if number == signal.SIGINT and signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        self.signals.append(number)
        if not self.stepped:
            sys.exit(128 + number)

    def __call__(self) -> bool:
        """The same answer in every process; each must ask equally often. Once True it stays so."""
        self.stepped = True
        if not self.asked:
            self.asked = parallel.any_rank(bool(self.signals) or time.monotonic() > self.deadline, self.device)
        return self.asked
