"""bench.py: commands, sizes, and where a result is written."""

import json
import sys
from pathlib import Path

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
        (["decode", "out/a", "out/b"], "one argument too many"),
        (["why", "a.py", "b.py"], "one argument too many"),
        (["run"], "run python bench.py run config/"),
        (["ab", "config/shakespeare.py"], "ab A.py B.py"),
        (["ab", "a.py", "b.py"], "there is no config file a.py"),
        (["compare", "a.json"], "compare A.json B.json"),
        (["compare", "a.json", "b.json", "--max_regression=little"], "--max_regression=3%"),
        (["ladder", "--rounds=0"], "rounds=0 must be at least 1"),
        (["ladder", "--device=cpu", "--sequence_length=2000"], "sequence_length=2000"),
        (["scale", "--budgets=1e9"], "--budgets=1e10,2e10,4e10"),
        (["scale", "config.py"], "settings only"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_command_is_one_line(argv, word, tmp_path, monkeypatch, capsys, workers, own_signals):
    started = workers()
    monkeypatch.chdir(tmp_path)
    one_line_with(word, argv, monkeypatch, capsys)
    assert not started


def one_line_with(word, argv, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit) as e:
        errors.entry(bench.main)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


def test_results_that_cannot_be_written_are_known_before_anything_is_measured(tmp_path, monkeypatch, capsys, own_signals):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(bench.MEASURES, "sampling", lambda sizes, device: pytest.fail("it was measured"))
    one_line_with(str(tmp_path / "file"), ["sampling", "--device=cpu", f"--out={tmp_path}/file"], monkeypatch, capsys)


def test_a_result_is_written_and_shown_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, capsys, own_signals):
    def verify(sizes, device) -> dict:
        row = {"check": "x", "against": "y", "tolerance": 1e-5, "errors": {}, "status": "FAILED: z"}
        return results.header("verify", sizes) | {"rows": [row], "passed": False}

    monkeypatch.setitem(bench.MEASURES, "verify", verify)
    monkeypatch.setattr(sys, "argv", ["bench.py", "verify", "--quick"])
    with pytest.raises(SystemExit) as e:
        bench.main(["verify", "--quick", "--device=cpu", f"--out={tmp_path}"])
    assert e.value.code == 1
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


def test_quick_is_shorter_in_every_way():
    for device in ("cpu", "cuda"):
        full, quick = (BenchConfig(quick=q).by_device(device) for q in (False, True))
        assert quick.rounds == 1
        assert quick.steps < full.steps
        assert quick.sequence_length < full.sequence_length
        assert quick.n_layer < full.n_layer == 12
        for s in (full, quick):
            assert s.tokens_per_step % s.sequence_length == 0
            assert s.tokens_per_step >= s.batch_size * s.sequence_length


def test_sizes_that_were_given_stay():
    given = BenchConfig(batch_size=3, sequence_length=5, tokens_per_step=30, steps=2, quick=True).by_device("cpu")
    assert (given.batch_size, given.sequence_length, given.tokens_per_step, given.steps) == (3, 5, 30, 2)


def test_a_hardware_is_a_folder_of_plain_letters(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "hardware_name", lambda device: "AMD EPYC 9V74 (80-Core), 2 cores")
    assert results.results_dir(str(tmp_path), CPU) == Path(tmp_path, "amd-epyc-9v74-80-core-2-cores")
