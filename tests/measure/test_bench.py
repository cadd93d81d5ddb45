"""bench.py: commands, sizes, and where a result is written."""

import json
import sys

import pytest
import torch

import bench
from base import errors
from engine import machine
from measure import results
from measure.config import BenchConfig
from report import kinds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "is not a command"),
        (["leader"], "did you mean ladder"),
        (["ladder", "config/shakespeare.py"], "one argument too many"),
        (["why", "a.py", "b.py"], "one argument too many"),
        (["run"], "run python bench.py run config/"),
        (["ab", "config/shakespeare.py"], "ab A.py B.py"),
        (["ab", "a.py", "b.py"], "there is no config file a.py"),
        (["compare", "a.json"], "compare A.json B.json"),
        (["compare", "a.json", "b.json", "--max_regression=little"], "--max_regression=3%"),
        (["ladder", "--device=cpu", "--sequence_length=2000"], "sequence_length=2000"),
        (["scale", "config.py"], "settings only"),
        (["scale", "--budgets=1e9,many"], "--budgets=1e10,2e10,4e10"),
        (["scale", "--tokens_per_step=100"], "--tokens_per_step=96"),
        (["scale", "--sizes=2"], "at least 3"),
        (["scale", "--minutes=0"], "above 0"),
        (["scale", "--dataset=nothing"], "prepare_data.py"),
        (["sampling", "--device=cpu", "--out=file"], "file"),  # known before anything is measured
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_command_is_one_line(argv, word, tmp_path, monkeypatch, capsys, workers, own_signals):
    started = workers()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench.MEASURES, "sampling", lambda sizes, device: started.append("it was measured"))
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit, match="2"):
        errors.entry(bench.main)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err
    assert not started


def test_a_result_is_written_and_shown_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, capsys, own_signals):
    def verify(sizes, device) -> dict:
        row = {"check": "x", "against": "y", "tolerance": 1e-5, "errors": {}, "status": "FAILED: z"}
        return results.header("verify", sizes) | {"rows": [row], "passed": False}

    monkeypatch.setitem(bench.MEASURES, "verify", verify)
    monkeypatch.setattr(sys, "argv", ["bench.py", "verify", "--quick"])
    with pytest.raises(SystemExit, match="1"):
        bench.main(["verify", "--quick", "--device=cpu", f"--out={tmp_path}"])
    (path,) = tmp_path.glob("*/verify.trial.json")  # a trial must not replace a measurement
    found = json.loads(path.read_text())
    assert found["command"] == "python bench.py verify --quick"
    assert found["machine"]["hardware"] == machine.hardware_name(CPU)
    assert kinds.as_text(found) in capsys.readouterr().out


def test_every_config_and_size_has_a_file_of_its_own(tmp_path):
    def name(command: str, *places: str, **settings) -> str:
        return bench.result_path(command, list(places), BenchConfig(out=str(tmp_path), **settings), CPU).name

    assert name("ladder") == "ladder.json"
    assert name("ladder", n_layer=2) == "ladder.trial.json"
    assert name("why", "config/enwik8.py") == "why.json"
    assert name("run", "config/enwik8.py") == "run_enwik8.json"
    assert name("decode", "out/shakespeare") == "decode_shakespeare.json"
    assert name("ab", "x/a.py", "y/b.py", sequence_length=32) == "ab_a_b_T32.json"


def test_quick_is_shorter_in_every_way_but_what_was_given_stays():
    for device in ("cpu", "cuda"):
        full, quick = (BenchConfig(quick=q).by_device(device) for q in (False, True))
        assert quick.rounds == 1
        for name in ("steps", "sequence_length", "n_layer"):
            assert getattr(quick, name) < getattr(full, name)
        for s in (full, quick):
            assert s.tokens_per_step % s.sequence_length == 0
            assert s.tokens_per_step >= s.batch_size * s.sequence_length
    given = dict(batch_size=3, sequence_length=5, tokens_per_step=30, steps=2)
    found = BenchConfig(**given, quick=True).by_device("cpu")
    assert {name: getattr(found, name) for name in given} == given
