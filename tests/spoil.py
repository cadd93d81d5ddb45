"""What goes wrong in a run on purpose, before one of its steps."""

from collections.abc import Callable
from types import ModuleType

import torch

from engine.run import Run


def spoiled(monkeypatch, train: ModuleType, spoil: Callable[[Run], object], at: int) -> None:
    """Before step `at` (1, 2, …) of train.train(), spoil(run) happens."""
    plain = train.train_step

    def train_step(run, number):
        if number == at - 1:
            with torch.no_grad():
                spoil(run)
        return plain(run, number)

    monkeypatch.setattr(train, "train_step", train_step)


def louder(run: Run) -> None:
    """The loss jumps, and stays finite."""
    run.model.transformer.ln_f.weight.mul_(50.0)


def poison(run: Run) -> None:
    """The loss becomes NaN."""
    run.model.transformer.h[1].mlp.c_fc.weight[3, 3] = float("inf")
