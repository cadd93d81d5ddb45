"""measure/scaling/family.py: budgets are spent as planned, with the data and the minutes that there are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies import family

from base.errors import UserError
from measure.scaling.family import Point, depth, make_plan, n_params, round_down
from model import GPT


@pytest.mark.parametrize("n_embd", [8, 22, 64, 190, 192, 768])
def test_parameters_are_the_models(n_embd):
    point = Point(1.0, n_embd, n_params(n_embd, 65, 32), 128)
    cfg = family().config(point, 1, torch.device("cpu"))
    with torch.device("meta"):
        assert GPT(cfg).n_params() == point.N


def test_the_family_ends_in_gpt2():
    assert depth(768) == 12
    assert n_params(768, 50257, 1024) == 124_439_808


@given(
    budget=st.floats(1e9, 1e14),
    ratio=st.floats(5.0, 200.0),
    sizes=st.integers(3, 9),
    tokens_per_step=st.sampled_from([32, 128, 1024]),
    most_tokens=st.sampled_from([20_000, 1_000_000, 10**9]),
)
def test_budgets_are_spent(budget, ratio, sizes, tokens_per_step, most_tokens):
    """6·N·D is within 2% of the budget, in whole steps, with the data that there is, and sizes rise."""
    lab = family(most_tokens, tokens_per_parameter=ratio, sizes=sizes, tokens_per_step=tokens_per_step)
    points = lab.level(budget)
    for p in points:
        assert abs(6 * p.N * p.D / budget - 1) <= 0.02
        assert p.D % tokens_per_step == 0
        assert most_tokens >= p.D
        cfg = lab.config(p, 1, torch.device("cpu"))
        assert cfg.max_steps * cfg.tokens_per_step == p.D
    assert [p.N for p in points] == sorted({p.N for p in points})
    assert len(points) <= sizes


def test_sizes_lie_around_the_ratio_that_was_asked_for():
    points = family(10**9, tokens_per_parameter=50.0).level(1e12)
    ratio, spread = points[2].D / points[2].N, points[-1].N / points[0].N
    assert ratio == pytest.approx(50, rel=0.1)
    assert spread == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(("minutes", "why", "seeds"), [(1000.0, "the data", 10), (4.0, "the data", 3), (0.5, "the minutes", 3)])
def test_plan_fits_into_minutes_and_data(minutes, why, seeds):
    """A step takes 1 ms + 0.1 µs for each parameter."""
    lab = family(minutes=minutes)

    def seconds(p: Point) -> float:
        return (1e-3 + 1e-7 * p.N) * p.D / 128

    plan = make_plan(lab, seconds, jobs=2)
    assert plan.why == why
    assert len(plan.budgets) == 4
    assert plan.seeds >= seeds
    whole = plan.seeds * sum(seconds(p) for c in plan.budgets for p in lab.level(c)) / 2
    assert whole <= 60 * minutes
    assert plan.budgets[-1] / plan.budgets[0] == pytest.approx(8, rel=0.05)
    if why == "the data":
        assert plan.budgets[-1] == round_down(lab.largest_budget())


@pytest.mark.parametrize(("tokens", "minutes", "more"), [(2_000, 10.0, "--epochs"), (1_000_000, 1e-4, "--minutes")])
def test_no_plan_is_one_line(tokens, minutes, more):
    with pytest.raises(UserError, match=more):
        make_plan(family(tokens, minutes=minutes), lambda p: 1e-3 * p.D / 128, 1)
