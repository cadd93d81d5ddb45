"""measure/scaling/study.py: a study that is killed keeps its runs, leaves no process, and resumes."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from processes import is_running, wait_until

from base.errors import UserError
from configurator import Config
from measure.scaling import study, training
from report import kinds


@pytest.mark.slow
def test_ctrl_c_and_a_kill_keep_what_is_done_and_the_same_command_resumes(tmp_path, prepared, root):
    """No worker outlives them. Kept runs are left alone, a prediction is made before its run, and a kept run is what training
    gives.
    """
    places = ["--dataset=tiny", f"--data_dir={prepared}", f"--out={tmp_path}", f"--keep={tmp_path}"]
    flags = ["--quick", "--jobs=2", "--device=cpu", "--sequence_length=16", "--tokens_per_step=32", *places]
    command = [sys.executable, str(root / "bench.py"), "scale", *flags]

    def runs() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.glob("run_*.json")}

    for how, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process, before = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), len(runs())
        wait_until(lambda process=process, before=before: process.poll() is not None or len(runs()) > before, "no run was kept")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = list(map(int, children.read_text().split())) if sys.platform == "linux" else []
        process.send_signal(how)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == status, complaint
        wait_until(lambda workers=workers: not any(map(is_running, workers)), "a worker is left over")
    kept = runs()
    assert 1 <= len(kept) < 7
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert len(list(tmp_path.glob("run_*.json"))) == 7
    (path,) = tmp_path.glob("*/scale.trial.json")
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert all(0 < run["loss"] < math.log(30) for run in found["runs"])
    held = found["held_out"]
    assert held["predicted_at"] < held["runs"][0]["started"]
    assert kinds.as_text(found) in done.stdout
    # a third time: nothing is trained, and the prediction keeps its time
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*_*.json")}
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*_*.json")} == files
    assert json.loads(path.read_text())["held_out"] == held
    # one of them trained again by itself: the same loss, to the last bit (eager and one thread)
    one = min((json.loads(p.read_text()) for p in kept), key=lambda k: k["result"]["steps"])
    again = training.train_one(Config(**one["config"]))
    assert (again["loss"], again["N"]) == (one["result"]["loss"], one["result"]["N"])


def test_other_settings_code_or_data_make_other_runs(tmp_path):
    """Where the data lies does not count."""
    a, b = (study.RunCache(tmp_path, {"data": name}) for name in "ab")
    cfg = asdict(Config(max_steps=5))
    assert a.path("run", cfg) == a.path("run", cfg | {"data_dir": "elsewhere"})
    assert len({a.path("run", cfg), b.path("run", cfg), a.path("plan", cfg), a.path("run", cfg | {"seed": 2})}) == 4


def train_or_die(cfg: Config, path: Path) -> dict:
    if cfg.max_steps == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return training.train_and_keep(cfg, path)


@pytest.mark.slow
def test_a_run_that_diverges_or_a_worker_that_is_killed_is_one_line(tiny_run, tmp_path):
    """The worker's error names the model that it happened to, and the worker goes on; what is done is kept."""
    good = Config(**tiny_run)

    def use_pool() -> None:
        with training.workers(1, 1) as pool:
            bad = pool.submit(train_or_die, replace(good, learning_rate=1e30, grad_clip=0.0), tmp_path / "x")
            with pytest.raises(UserError, match=r"n_embd=32, 6 steps.*finite"):
                bad.result()
            assert pool.submit(train_or_die, good, tmp_path / "y").result()["loss"] > 0
            pool.submit(train_or_die, replace(good, max_steps=7), tmp_path / "z").result()

    with pytest.raises(UserError, match=r"a worker process was killed.*to resume"):
        use_pool()
    assert [p.name for p in tmp_path.iterdir()] == ["y"]


def test_without_scipy_a_study_ends_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scipy"):
        study.command(["--quick", f"--out={tmp_path}"])
