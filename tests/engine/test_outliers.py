"""engine/outliers.py: what is an outlier, and that it is dealt with as asked."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import equal, events, losses, state
from spoil import louder, spoiled

import train
from configurator import Config
from engine import restore
from engine.outliers import Outliers, TrainingStopped
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    """The tiny run, with dropout, so that random numbers matter, and accumulation."""
    return Config(**tiny_run | dict(batch_size=2), out_dir=str(tmp_path / "run"), dropout=0.1)


# ---- what is an outlier ------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(0.5, 20.0, width=32),
    st.just(3.0),
    st.sampled_from([math.nan, math.inf]),
    st.floats(-(2.0**99), 2.0**99, width=32),
)


def judged(losses: list[float], window: int) -> list[float | None]:
    """By numpy: the score of each number against the `window` finite ones before it, None if there are not so many."""
    found = []
    for i, value in enumerate(losses):
        before = np.array([v for v in losses[:i] if math.isfinite(v)][-window:], dtype=np.longdouble)
        if len(before) < window or not math.isfinite(value):
            found.append(None)
            continue
        spread = max(before.std(), 1e-3 * abs(before.mean()), np.longdouble(1e-12))
        found.append(float((value - before.mean()) / spread))
    return found


@given(values=st.lists(NUMBERS, max_size=40), z=st.sampled_from([0.5, 2.0, 8.0]), window=st.integers(2, 7))
@settings(max_examples=150)
def test_an_outlier_is_what_numpy_says_it_is(values, z, window):
    found = Outliers(Config(outlier_z=z, outlier_window=window))
    flagged = 0
    for value, score in zip(values, judged(values, window), strict=True):
        said = found.judge(loss=value, gradient_norm=1.0)
        if score is not None and abs(score - z) < 1e-9 * max(1.0, abs(score)):
            return  # too near to tell apart
        assert (said is not None) == (score is not None and score > z)
        flagged += said is not None
        assert found.count == flagged
        if said:
            assert re.fullmatch(rf"loss \S+ is \S+ standard deviations above the {window} steps before \(\S+\)", said)


def test_either_number_is_judged_by_its_own_past():
    """And nothing stands out where nobody looks."""
    found = Outliers(Config(outlier_z=5.0, outlier_window=4))
    for i in range(4):
        assert found.judge(loss=3.0 + 0.1 * (i % 2), gradient_norm=0.5 + 0.1 * (i % 2)) is None
    assert found.judge(loss=3.05, gradient_norm=3.05).startswith("gradient_norm 3.05")
    assert found.judge(loss=9.0, gradient_norm=0.5).startswith("loss 9")
    assert found.count == 2
    off = Outliers(Config(outlier_z=0.0, outlier_window=2))
    assert [off.judge(loss=v) for v in (1.0, 1.0, 1.0, 1e9)] == [None] * 4


@given(
    values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    windows=st.sampled_from([(5, 5), (6, 3), (3, 6)]),
)
def test_a_resumed_run_judges_as_if_it_had_not_stopped(values, cut, windows):
    """Through the JSON of a checkpoint; and with a smaller window, as one that had that window from the start."""
    before, after = windows
    first = Outliers(Config(outlier_z=2.0, outlier_window=before))
    whole = Outliers(Config(outlier_z=2.0, outlier_window=min(windows)))
    for a, b in values[:cut]:
        first.judge(loss=a, gradient_norm=b)
        whole.judge(loss=a, gradient_norm=b)
    second = Outliers(Config(outlier_z=2.0, outlier_window=after))
    second.load(json.loads(json.dumps(first.state())))
    assert second.count == first.count
    if after > before:
        return  # with a larger one it has to see more steps first
    for a, b in values[cut:]:
        assert second.judge(loss=a, gradient_norm=b) == whole.judge(loss=a, gradient_norm=b)


def test_the_window_travels_with_the_run(cfg):
    """Stopped and resumed, its checkpoint holds what it would have held."""
    cfg = replace(cfg, schedule="constant")
    halves = replace(cfg, out_dir=cfg.out_dir + "_2")
    train.train(cfg)
    train.train(replace(halves, max_steps=3))
    train.train(replace(halves, resume=True))
    kept = [restore.read_training(restore.newest(Path(c.out_dir)))["outliers"] for c in (cfg, halves)]
    assert kept[0] == kept[1]
    assert len(kept[0]["before"]["loss"]) == 6


# ---- what is done about it ----------------------------------------------------------------------------------------------


def with_an_outlier(cfg: Config, at: int = 4) -> Run:
    """A run in whose step number `at` (0, 1, …) the gradients are a thousand times too large."""
    run = build(replace(cfg, outlier_window=3))
    run.step = -1
    plain = run.read
    run.read = lambda step, *args, **how: setattr(run, "step", step) or plain(step, *args, **how)
    run.model.lm_head.weight.register_hook(lambda g: g * (1000.0 if run.step == at else 1.0))
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["continue", "skip", "stop"])
def test_an_outlier_is_dealt_with_as_asked(cfg, policy, dtype):
    run = with_an_outlier(replace(cfg, on_outlier=policy, dtype=dtype, prefetch=False))
    for step in range(4):
        assert train.train_step(run, step).outlier is None
    before = state(run)
    if policy == "stop":
        with pytest.raises(
            TrainingStopped, match=r"step 5: gradient_norm .* \(on_outlier=stop\); the parameters are those before"
        ):
            train.train_step(run, 4)
    else:
        assert train.train_step(run, 4).outlier.startswith("gradient_norm ")
    assert run.outliers.count == 1
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
    cfg = replace(cfg, on_outlier="skip", dropout=0.0, grad_clip=10.0, fused_adamw=engine == "fused", prefetch=False)
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
