"""forecast.curve: a run like those that were recorded is on track; another one is not, and the causes are reported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from base.errors import UserError
from configurator import Config
from forecast import curve

POINT = {"step": 10, "loss": 3.0, "band": 0.1}


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    return Config(**tiny_run | dict(max_steps=60, curve=str(tmp_path / "a.curve.json")))


def tracker(cfg: Config, data_sha256: str = "d") -> curve.Tracker:
    return curve.tracker(cfg, data_sha256, print)


@pytest.fixture
def written(cfg):
    """written(train=…, …) -> the curve's file, for the settings of cfg unless others are given."""

    def write(**changes) -> Path:
        path = Path(cfg.curve)
        known = dict(source="a test", seeds=[1], window=2, data_sha256="d", config=vars(cfg), train=[POINT], val=[])
        path.write_text(json.dumps(known | changes), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(("loss", "side"), [(3.09, "on track"), (3.11, "ABOVE"), (2.89, "BELOW"), (float("nan"), "ABOVE")])
def test_the_mean_over_the_window_is_compared(cfg, written, loss, side):
    """The step at the point and the one before it, at equal distances from `loss`."""
    written()
    track = tracker(cfg)
    assert track.step(8, 100.0) == ""
    assert track.step(9, loss - 1) == ""
    verdict = track.step(10, loss + 1)
    assert side in verdict
    assert f"(mean of 2 {loss:.3f}, expected 3.000 ± 0.100)" in verdict
    assert track.step(11, 50.0) == ""  # no point of the curve


def test_a_verdict_comes_only_when_it_changes(cfg, written):
    written(train=[POINT | {"step": s} for s in range(1, 9)], window=1)
    track = tracker(cfg)
    sides = [track.step(step, loss).partition(" (")[0] for step, loss in enumerate([3.0, 2.95, 9.0, 8.0, 0.1, 0.2, 3.0], 1)]
    assert sides == ["on track", "", "ABOVE the curve", "", "BELOW the curve", "", "on track"]

    # a bound is only crossed upwards: GPT-2's public figures are what a good run reaches or beats
    written(val=[POINT | {"at_most": True}])
    assert "on track" in tracker(cfg).validated(10, 1.0)
    assert "ABOVE" in tracker(cfg).validated(10, 3.2)


def test_causes_come_after_three_checks_once_and_in_order(cfg, written):
    written(train=[POINT | {"step": s} for s in range(1, 20)], window=1)
    other = replace(cfg, learning_rate=0.5, grad_clip=3.0, dropout=0.2)
    track = tracker(other, "another")
    found = []
    for step, loss in enumerate([3.0, 9.0, 9.0, 9.0, 9.0, 3.0, 9.0, 9.0, 9.0], 1):
        track.step(step, loss)
        found.append(track.causes())
    assert [f is not None for f in found] == [False, False, False, True, False, False, False, False, True]
    places = [found[3].index(word) for word in ("learning_rate=0.5", "grad_clip=3.0", "dropout=0.2", "data (its sha256")]
    assert places == sorted(places)
    same = tracker(cfg)
    for step in (1, 2, 3):
        same.step(step, 9.0)
    causes = same.causes()
    places = [causes.index(word) for word in ("learning rate", "batch", "precision", "data")]
    assert "own settings" in causes
    assert places == sorted(places)


def test_another_model_is_not_compared(cfg, written, capsys):
    written(window=1)
    other = tracker(replace(cfg, n_layer=1))
    assert "recorded with n_layer=2" in capsys.readouterr().out
    for untracked in (other, tracker(replace(cfg, curve="off"))):
        assert (untracked.step(10, 9.0), untracked.validated(10, 9.0), untracked.causes()) == ("", "", None)
    assert "ABOVE" in tracker(replace(cfg, learning_rate=1.0)).step(10, 9.0)


def test_a_file_that_is_not_a_curve_is_refused_in_one_line(written):
    """More of them: tests/test_fuzz.py."""
    path = written()
    curve.read(path)
    wrong = [dict(window=10**30), dict(train=[POINT | {"step": 1.5}]), dict(train=[POINT | {"loss": 10**400}])]
    for content in (*("", "[]", "[" * 10**5, " " * 2**21), *(written(**change).read_text() for change in wrong)):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"^[^\n]*a\.curve\.json is not a loss curve[^\n]*$"):
            curve.read(path)


@pytest.mark.slow
def test_a_recorded_curve_knows_its_own_kind(run_script, tmp_path, tiny_run):
    """Of three seeds; a fourth is on track, a tenth of the learning rate is not and reports why."""
    file = tmp_path / "mine.py"
    settings = tiny_run | dict(max_steps=80, eval_interval=40)
    file.write_text(f"from configurator import Config\nconfig = Config(**{settings!r})\n", encoding="utf-8")

    def run(*flags: str) -> str:
        done = run_script("train.py", file, *flags, f"--out_dir={tmp_path / flags[0]}", timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "wrote" in run("--record_curve")
    fourth = run("--seed=99")
    assert "on track" in fourth
    assert "off track" not in fourth
    slow = run("--seed=98", "--learning_rate=1e-3", "--min_lr=1e-4")
    assert "ABOVE the curve" in slow
    assert slow.count("off track in 3 checks in a row; the run differs from the curve") == 1
    assert "learning rate (learning_rate=0.001, there 0.01" in slow
    assert "recorded with n_embd=32" in run("--n_embd=16")
