"""The verdict of `bench.py ab`: a difference is told from noise as often as a 95% interval promises."""

import random
import re

import pytest
from made_results import ab

from report import kinds


def compared(a: list[list[float]], b: list[list[float]], losses_a: list[float], losses_b: list[float]) -> list[str]:
    """[on the speed, on the loss], as printed."""
    result = ab()
    for side, times, losses in zip(result["sides"], (a, b), (losses_a, losses_b), strict=True):
        side |= dict(step_s=times, losses=[[11.0, x] for x in losses])
    return re.findall("not distinguishable|[AB] is faster|[AB]'s is lower", kinds.as_text(result))


def noisy(r: random.Random, seconds: float, seeds: int = 5) -> list[list[float]]:
    return [[seconds * r.lognormvariate(0, 0.05) for _ in range(5)] for _ in range(seeds)]


def test_noise_is_called_a_difference_as_often_as_the_interval_says():
    """A 95% interval misses in one of twenty comparisons of a config with itself: of 200, near 10."""
    r, speeds, losses = random.Random(1), 0, 0
    for _ in range(200):
        a, b = ([3 + r.gauss(0, 0.1) for _ in range(5)] for _ in range(2))
        speed, loss = compared(noisy(r, 1.0), noisy(r, 1.0), a, b)
        speeds += speed != "not distinguishable"
        losses += loss != "not distinguishable"
    assert 2 <= speeds <= 20
    assert 2 <= losses <= 20


@pytest.mark.parametrize("faster", ["A", "B"])
def test_a_clear_difference_is_found_and_called_by_its_name(faster):
    r = random.Random(2)
    slow, fast = noisy(r, 1.2), noisy(r, 1.0)
    worse, better = [3.20, 3.32, 3.08], [3.10, 3.20, 3.00]
    sides = (fast[:3], slow[:3], better, worse) if faster == "A" else (slow[:3], fast[:3], worse, better)
    assert compared(*sides) == [f"{faster} is faster", f"{faster}'s is lower"]
