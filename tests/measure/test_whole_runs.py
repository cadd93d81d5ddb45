"""measure/whole_runs.py: scripts are run as a user runs them, and their results hold no path of this machine."""

import json

import pytest

import bench
from base.errors import UserError
from measure import whole_runs
from measure.config import BenchConfig
from report import kinds


@pytest.fixture
def config(tmp_path, tiny_run) -> str:
    values = tiny_run | dict(out_dir="", data_dir="data")
    (tmp_path / "small.py").write_text(f"from configurator import Config\n\nconfig = Config(**{values!r})\n", encoding="utf-8")
    return str(tmp_path / "small.py")


@pytest.mark.slow
def test_one_whole_run_is_trained_evaluated_and_continued(config, prepared, tmp_path, monkeypatch, capsys, own_signals):
    """From another folder than the repository's, with relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(prepared)
    bench.main(["run", "small.py", "--device=cpu", "--out=found"])
    (path,) = tmp_path.glob("found/*/run_small.json")
    found = json.loads(path.read_text())
    assert found["config"] == "small.py"
    assert len(found["losses"]) == 6
    assert list(found["val_losses"]) == ["3", "6"]
    assert found["seconds"].keys() == {"train", "evaluate", "sample"}
    assert found["evaluation"]["kind"] == "evaluate"
    assert found["requested"]["data_dir"] == "data"
    assert str(tmp_path) not in path.read_text()
    assert kinds.as_text(found) in capsys.readouterr().out


@pytest.mark.slow
def test_a_script_that_fails_is_named_with_its_own_words(tmp_path, config):
    with pytest.raises(UserError, match=r"train\.py ended with 2: error: .*prepare_data\.py"):
        whole_runs.train_log(tmp_path / "run", BenchConfig(device="cpu", data_dir=str(tmp_path)), config)


def test_saves_are_told_apart_from_the_last_which_everything_waits_for():
    records = [{"step": s, "loss": 1.0, "ms": float(s)} for s in (1, 2, 3)]
    records += [{"event": "saving", "step_done": s, "pause_ms": 10.0 * s} for s in (1, 2, 3)]
    records += [{"event": "saved", "step_done": s, "save_ms": 100.0 * s} for s in (1, 2, 3)]
    found = whole_runs.saves_in(records)
    assert found == {
        "after_steps": [1, 2],
        "pause_ms": [10.0, 20.0],
        "save_ms": [100.0, 200.0],
        "step_ms": [1.0, 2.0, 3.0],
    }
