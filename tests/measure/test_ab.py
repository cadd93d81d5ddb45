"""measure/ab.py and rounds.py: two configs take turns with the same seeds, and Ctrl-C keeps what is finished."""

import json

import pytest
import torch
from stand_ins import result

import bench
from base.errors import UserError
from base.files import ROOT
from measure import ab, ladder
from measure.config import BenchConfig
from report import kinds

CPU = torch.device("cpu")


@pytest.fixture
def pair(tmp_path, tiny_run) -> list[str]:
    """Two config files that differ in fused_adamw."""
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    for path, fused in zip(paths, (False, True), strict=True):
        values = dict(tiny_run) | dict(fused_adamw=fused, seed=7)
        path.write_text(f"from configurator import Config\n\nconfig = Config(**{values!r})\n", encoding="utf-8")
    return [str(p) for p in paths]


def test_ab_alternates_gives_both_sides_the_same_seeds_and_names_one_that_fails(pair, workers, prepared):
    started = workers()
    found = ab.ab(pair, BenchConfig(device="cpu", seeds=4, steps=6, data_dir=str(prepared)), CPU)
    assert [cfg.fused_adamw for cfg, _ in started] == [False, True, True, False, False, True, True, False]
    assert [cfg.seed for cfg, _ in started] == [7, 7, 8, 8, 9, 9, 10, 10]
    assert [s["config"] for s in found["sides"]] == pair
    assert [s["requested"]["fused_adamw"] for s in found["sides"]] == [False, True]
    assert found["changes"] == {"fused_adamw": [False, True]}
    assert all(len(s["losses"]) == len(s["step_s"]) == 4 for s in found["sides"])
    assert {(cfg.tokens_per_step, how["steps"]) for cfg, how in started} == {(256, 6)}  # as in the files; as asked


def test_ab_runs_the_files_as_they_are_but_for_sizes_that_were_given(pair, workers, prepared):
    """A device that a file names is the file's. With --quick the peer and the top rung, whose micro-batches differ, have as
    many tokens a step.
    """
    started = workers()
    ab.ab(pair, BenchConfig(seeds=1, batch_size=2, sequence_length=16, data_dir=str(prepared)), CPU)
    assert {(cfg.device, cfg.batch_size, cfg.T, cfg.tokens_per_step) for cfg, _ in started} == {("cpu", 2, 16, 32)}
    started.clear()
    paths = [str(ROOT / "config" / p) for p in ("peers/nanogpt_cpu.py", "ladder/r10_blocked.py")]
    ab.ab(paths, BenchConfig(quick=True, data_dir=str(prepared)), CPU)
    assert len(started) == 4
    assert len({(cfg.n_layer, cfg.n_embd, cfg.T, cfg.tokens_per_step) for cfg, _ in started}) == 1
    assert all(cfg.n_layer == 1 and cfg.tokens_per_step <= 1024 for cfg, _ in started)
    workers(lambda cfg: {"error": "it burns"} if cfg.fused_adamw else result(cfg))
    with pytest.raises(UserError, match=r"b\.py: it burns"):
        ab.ab(pair, BenchConfig(device="cpu", data_dir=str(prepared)), CPU)


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "ladder"}', '{"kind": "ladder", "rungs": [3]}', "no JSON"])
def test_compare_reports_a_file_that_is_no_result_in_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cannot compare .*a\.json"):
        ab.compare([str(path), str(path)], BenchConfig())


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
    stopped_after(0)
    with pytest.raises(UserError, match="nothing to keep"):
        bench.main(["ladder", "--device=cpu", f"--out={tmp_path}"])
    assert not list(tmp_path.glob("*/*.json"))
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


def test_ab_keeps_whole_pairs(stopped_after, pair, prepared):
    stopped_after(5)
    found = ab.ab(pair, BenchConfig(seeds=4, data_dir=str(prepared)), CPU)
    assert found["interrupted"]
    assert [len(side["step_s"]) for side in found["sides"]] == [len(side["losses"]) for side in found["sides"]] == [2, 2]
