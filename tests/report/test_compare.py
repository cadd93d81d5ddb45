"""report/compare.py: a regression is told from noise as often as the interval promises; a gate fails what it cannot judge."""

import random

import pytest
from made_results import ladder, verify

from report.compare import compare
from report.results import measured


def noisy(seed: int, slower: float = 1.0, rounds: int = 3) -> dict:
    """A ladder whose rounds and steps scatter by half a percent."""
    r, result = random.Random(seed), ladder()
    for entry in measured(result):
        factor = slower if entry["name"] == "r03_compile" else 1.0
        entry["step_s"] = [
            [0.1 * factor * f * r.gauss(1, 0.005) for _ in range(8)] for f in [r.gauss(1, 0.005) for _ in range(rounds)]
        ]
    return result


def line(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def test_a_regression_of_five_percent_is_told_from_noise():
    found = 0
    for seed in range(20):
        text, failed = compare(noisy(seed), noisy(1000 + seed, slower=1.05), 0.03)
        found += failed and "SLOWER by more than 0.03" in line(text, "r03_compile")
    assert found >= 18


def test_noise_is_called_a_difference_as_often_as_the_interval_says():
    """A 95% interval misses in one of twenty: of 200 comparisons of a ladder with itself, near 10 a rung; never by 3%."""
    differs = 0
    for seed in range(200):
        text, failed = compare(noisy(seed), noisy(1000 + seed), 0.03)
        assert not failed
        differs += "within" not in line(text, "r03_compile")
    assert differs <= 20


def test_without_a_limit_only_what_cannot_be_compared_fails():
    a, b = ladder(), ladder(factor=2.0)
    b["machine"] |= dict(torch="2.14", commit="fff0000", dirty=True)
    text, failed = compare(a, b)
    assert not failed
    for word in ("2.13", "2.14", "abc1234", "fff0000 + changes", "r00_fp32", "SLOWER", "1,280"):
        assert word in text
    assert compare(a, verify())[1]
    assert compare(verify(), verify())[1]


@pytest.mark.parametrize("change", ["missing", "machine", "sizes"])
def test_a_gate_fails_what_it_cannot_judge(change):
    a, b = noisy(0), noisy(1)
    if change == "missing":
        b["rungs"][2] = b["rungs"][1] | {"name": "r03_compile"}
    else:
        b[change][{"machine": "hardware", "sizes": "sequence_length"}[change]] = 64
    text, failed = compare(a, b, 0.5)
    assert failed
    assert not compare(a, b)[1]
    assert {"missing": "not in B: r03_compile"}.get(change, "not measured alike") in text


def test_one_round_and_too_wide_a_spread_are_said():
    text, failed = compare(noisy(0, rounds=1), noisy(1, slower=1.2, rounds=1), 0.03)
    assert failed
    assert "drift between rounds is unknown" in text
    a = ladder()
    a["rungs"][2]["step_s"] = [[0.1], [0.2], [0.3]]
    text, failed = compare(a, ladder(), 0.03)
    assert not failed
    assert "Too noisy to see a loss of 0.03: r03_compile" in text
