"""Losses and gradient norms that stand out, and the error that stops a run before it applies one."""

import math
import statistics
from collections import deque

from torch import Tensor

from base.errors import UserError
from configurator import Config


class TrainingStopped(UserError):
    """Training cannot continue. The parameters are those before step number `step` (0, 1, …); random_before holds the random
    states with which that step began."""

    def __init__(self, step: int, message: str, random_before: Tensor):
        super().__init__(f"step {step + 1}: {message}; the parameters are those before the step")
        self.step, self.random_before = step, random_before


class Outliers:
    """Finds losses and gradient norms that stand out from those of the steps before, and counts them.

    The verdict depends only on numbers that are equal in all processes, so they agree on it.
    """

    def __init__(self, cfg: Config):
        self.z, self.window = cfg.outlier_z, cfg.outlier_window
        self.before: dict[str, deque] = {}
        self.count = 0

    def judge(self, **values: float) -> str | None:
        """What stands out among this step's values ("loss 9.1 is 11.3 standard deviations above …"), or None."""
        found = None
        for name, value in values.items():
            before = self.before.setdefault(name, deque(maxlen=self.window))
            if self.z and len(before) == self.window and math.isfinite(value):
                mean, spread = statistics.fmean(before), statistics.pstdev(before)
                # with a spread of 0 (a constant loss) anything would be an outlier
                z = (value - mean) / max(spread, 1e-3 * abs(mean), 1e-12)
                if z > self.z:
                    before_it = f"the {self.window} steps before ({mean:.4g})"
                    found = f"{name} {value:.4g} is {z:.1f} standard deviations above {before_it}"
            if math.isfinite(value):  # outliers too: if the level has changed for good, the mean follows
                before.append(value)
        self.count += found is not None
        return found

    def state(self) -> dict:
        """For training.json, so that a resumed run judges like one that was never interrupted."""
        return {"count": self.count, "before": {name: list(values) for name, values in self.before.items()}}

    def load(self, state: dict) -> None:
        """The reverse of state(). A smaller window keeps the newest values."""
        self.count = int(state["count"])
        self.before = {name: deque(map(float, values), maxlen=self.window) for name, values in state["before"].items()}
