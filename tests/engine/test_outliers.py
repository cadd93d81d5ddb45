"""engine/outliers.py: what is an outlier, and that it is dealt with as asked."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from runs import equal, events, losses, state
from spoil import louder, spoiled

import train
from configurator import Config
from engine import restore
from engine.outliers import Outliers, TrainingStopped
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def cfg(cfg) -> Config:
    """The tiny run with accumulation."""
    return replace(cfg, batch_size=2)


# ---- what is an outlier ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "value", "deviations"),
    [
        ([2, 4, 2, 4], 7.9, None),  # mean 3, standard deviation 1
        ([2, 4, 2, 4], 8.1, "5.1"),
        ([2, 4, 2, 4], -99, None),  # only above
        ([99, 2, 4, 2, 4], 8.1, "5.1"),  # the window is 4
        ([2, 4, math.nan, math.inf, 2, 4], 8.1, "5.1"),  # of finite values
        ([2, 4, 2], 99, None),
        ([2, 4, 2, 4], math.inf, None),  # an error of another kind
        ([3, 3, 3, 3], 3.014, None),  # at least a thousandth of the mean
        ([3, 3, 3, 3], 3.018, "6.0"),
        ([0, 0, 0, 0], 0.0, None),
    ],
)
def test_an_outlier_is_far_above_the_steps_before(before, value, deviations):
    found, off = Outliers(Config(outlier_z=5.0, outlier_window=4)), Outliers(Config(outlier_z=0.0, outlier_window=4))
    for v in before:
        found.judge(loss=v, gradient_norm=1.0)
        off.judge(loss=v)
    count, said = found.count, found.judge(loss=value, gradient_norm=1.0)
    assert (said is None) == (deviations is None)
    assert found.count == count + (said is not None)
    assert said is None or f"is {deviations} standard deviations above the 4 steps before" in said
    assert off.judge(loss=value) is None


def test_either_number_is_judged_by_its_own_past():
    found = Outliers(Config(outlier_z=5.0, outlier_window=4))
    for i in range(4):
        assert found.judge(loss=3.0 + 0.1 * (i % 2), gradient_norm=0.5 + 0.1 * (i % 2)) is None
    assert found.judge(loss=3.05, gradient_norm=3.05).startswith("gradient_norm 3.05")
    assert found.judge(loss=9.0, gradient_norm=0.5).startswith("loss 9")
    assert found.count == 2


@pytest.mark.parametrize("window", [9, 4])
def test_the_window_travels_with_the_run(cfg, window):
    """Stopped and resumed, its checkpoint holds what it would have held; of a smaller window, the newest values."""
    cfg = replace(cfg, schedule="constant", outlier_window=9)
    halves = replace(cfg, out_dir=cfg.out_dir + "_2")
    train.train(cfg)
    train.train(replace(halves, max_steps=3))
    train.train(replace(halves, resume=True, outlier_window=window))
    whole, kept = (restore.read_training(restore.newest(Path(c.out_dir)))["outliers"] for c in (cfg, halves))
    assert len(whole["before"]["loss"]) == 6
    assert kept == whole | {"before": {name: values[-window:] for name, values in whole["before"].items()}}


# ---- what is done about it ----------------------------------------------------------------------------------------------


def with_an_outlier(cfg: Config, at: int = 4) -> Run:
    """A run in whose step number `at` (0, 1, …) the gradients are a thousand times too large."""
    run = build(replace(cfg, outlier_window=3, prefetch=False))
    run.step = -1
    plain = run.read
    run.read = lambda step, *args, **how: setattr(run, "step", step) or plain(step, *args, **how)
    run.model.lm_head.weight.register_hook(lambda g: g * (1000.0 if run.step == at else 1.0))
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["continue", "skip", "stop"])
def test_an_outlier_is_dealt_with_as_asked(cfg, policy, dtype):
    run = with_an_outlier(replace(cfg, on_outlier=policy, dtype=dtype))
    for step in range(4):
        assert train.train_step(run, step).outlier is None
    before = state(run)
    if policy == "stop":
        message = r"step 5: gradient_norm .* \(on_outlier=stop\); the parameters are those before"
        with pytest.raises(TrainingStopped, match=message):
            train.train_step(run, 4)
    else:
        assert train.train_step(run, 4).outlier.startswith("gradient_norm ")
    assert equal(state(run), before) == (policy != "continue")
    assert all(p.grad is None for p in run.model.parameters())
    if policy != "stop":
        for step in (5, 6):
            assert train.train_step(run, step).outlier is None
        assert not equal(state(run), before)
    assert run.outliers.count == 1
    run.close()


@pytest.mark.parametrize("engine", ["fused", "looped"])
def test_a_skipped_step_is_one_that_never_was(cfg, engine):
    """Its gradients were clipped, and nothing of that reaches the next step, whose are not."""
    cfg = replace(cfg, on_outlier="skip", dropout=0.0, grad_clip=10.0, fused_adamw=engine == "fused")
    found = []
    for steps in ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 5, 6)):
        run = with_an_outlier(cfg)
        norms = [train.train_step(run, step).grad_norm for step in steps]
        assert [n > 10.0 for n in norms] == [step == 4 for step in steps]
        found.append(state(run))
        run.close()
    assert equal(*found)


@pytest.mark.parametrize("policy", ["continue", "skip"])
def test_an_outlier_is_flagged_counted_and_logged(cfg, monkeypatch, capsys, policy):
    spoiled(monkeypatch, train, louder, 5)
    train.train(replace(cfg, outlier_window=3, on_outlier=policy))
    (event,) = [r for r in events(cfg, "outlier") if r["step_done"] == 5]
    assert event["on_outlier"] == policy
    assert "standard deviations above the 3 steps before" in event["what"]
    assert re.search(r"step +5: .* standard deviations above .*; 1 so far", capsys.readouterr().out)
    assert max(losses(cfg)) == 6
