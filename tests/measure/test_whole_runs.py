"""measure/whole_runs.py and preparing.py: scripts are run as a user runs them, and every way encodes the same text."""

import json

import pytest

import bench
from measure import preparing, whole_runs
from report import kinds
from tokenizer import GPT2Tokenizer


@pytest.mark.slow
def test_one_whole_run_is_trained_evaluated_and_continued(tiny_run, prepared, tmp_path, monkeypatch, capsys, own_signals):
    """From another folder than the repository's, with relative paths."""
    values = tiny_run | dict(out_dir="", data_dir="data")
    (tmp_path / "small.py").write_text(f"from configurator import Config\n\nconfig = Config(**{values!r})\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(prepared)
    bench.main(["run", "small.py", "--device=cpu", "--out=found"])
    (path,) = tmp_path.glob("found/*/run_small.json")
    found = json.loads(path.read_text())
    assert len(found["losses"]) == 6
    assert list(found["val_losses"]) == ["3", "6"]
    assert found["evaluation"]["kind"] == "evaluate"
    assert found["requested"]["data_dir"] == "data"
    assert str(tmp_path) not in path.read_text()
    assert kinds.as_text(found) in capsys.readouterr().out


def test_saves_are_told_apart_from_the_last_which_everything_waits_for():
    records = [{"step": s, "loss": 1.0, "ms": float(s)} for s in (1, 2, 3)]
    records += [{"event": "saving", "step_done": s, "pause_ms": 10.0 * s} for s in (1, 2, 3)]
    records += [{"event": "saved", "step_done": s, "save_ms": 100.0 * s} for s in (1, 2, 3)]
    expected = dict(after_steps=[1, 2], pause_ms=[10.0, 20.0], save_ms=[100.0, 200.0], step_ms=[1.0, 2.0, 3.0])
    assert whole_runs.saves_in(records) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("gpt2_files")
def test_every_way_encodes_the_same_text(tmp_path):
    path, text = tmp_path / "text.txt", "The quick brown fox — jumps over the lazy dog.\n" * 60_000  # worker processes start
    path.write_text(text, encoding="utf-8")
    result = preparing.measure(path, tmp_path, processes=2, rounds=1)
    expected = len(GPT2Tokenizer().encode(text))
    (timed,) = result["rounds"]
    assert {call: timed[call]["tokens"] for call in preparing.CALLS} == dict.fromkeys(preparing.CALLS, expected)
    assert abs(timed["whole"]["tokens"] - expected) <= 2  # the cut between train and val
    assert [peak > 2**20 for peak in timed["whole"]["worker_peak_bytes"]] == [True, True]
    assert all(learnt["bytes_per_token"]["own"] > 4 for (learnt,) in result["learnt"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]
