"""measure/rounds.py: Ctrl-C ends the measuring and keeps what is finished, in a file of its own."""

import json

import pytest
import torch
from stand_ins import result

import bench
from base.errors import UserError
from measure import ab, ladder
from measure.config import BenchConfig
from report import kinds

CPU = torch.device("cpu")


@pytest.fixture
def stopped_after(workers):
    """stopped_after(n): the worker after the n-th is interrupted by Ctrl-C."""

    def arrange(count: int) -> None:
        done = []

        def answer(cfg) -> dict:
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(cfg)
            return result(cfg)

        workers(answer)

    return arrange


def test_what_was_finished_is_printed_kept_apart_and_ends_with_130(available, stopped_after, tmp_path, capsys, own_signals):
    available()
    stopped_after(2)
    with pytest.raises(SystemExit) as e:
        bench.main(["ladder", "--device=cpu", "--n_layer=12", f"--out={tmp_path}"])
    assert e.value.code == 130
    (path,) = tmp_path.glob("*/*.json")
    assert path.name == "ladder.partial.trial.json"  # the measurement of another day stays
    found = json.loads(path.read_text())
    assert [e["name"] for e in found["rungs"] if "skipped" not in e] == ["r00_fp32", "r01_tf32"]
    assert {e["skipped"] for e in found["rungs"][2:]} == {ladder.NOT_REACHED}
    printed = capsys.readouterr().out
    assert kinds.as_text(found) in printed
    assert "stopped by Ctrl-C" in printed
    assert printed.index("r01_tf32 ") < printed.index("tok/s  ")  # its line came before the table


def test_without_a_finished_measurement_there_is_nothing_to_keep(available, stopped_after, tmp_path, own_signals):
    available()
    stopped_after(0)
    with pytest.raises(UserError, match="nothing to keep"):
        bench.main(["ladder", "--device=cpu", f"--out={tmp_path}"])
    assert not list(tmp_path.glob("*/*.json"))


def test_ab_keeps_whole_pairs(stopped_after, tmp_path, tiny_run):
    stopped_after(5)
    path = tmp_path / "a.py"
    path.write_text(f"from configurator import Config\n\nconfig = Config(**{tiny_run!r})\n", encoding="utf-8")
    found = ab.ab([str(path), str(path)], BenchConfig(seeds=4, data_dir=tiny_run["data_dir"]), CPU)
    assert found["interrupted"]
    assert [len(side["step_s"]) for side in found["sides"]] == [len(side["losses"]) for side in found["sides"]] == [2, 2]
