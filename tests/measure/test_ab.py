"""measure/ab.py: two configs take turns with the same seeds."""

import pytest
import torch
from stand_ins import result

from base.errors import UserError
from base.files import ROOT
from measure import ab
from measure.config import BenchConfig

CPU = torch.device("cpu")


@pytest.fixture
def pair(tmp_path, tiny_run) -> list[str]:
    """Two config files that differ in fused_adamw."""
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    for path, fused in zip(paths, (False, True), strict=True):
        values = dict(tiny_run) | dict(fused_adamw=fused, seed=7)
        path.write_text(f"from configurator import Config\n\nconfig = Config(**{values!r})\n", encoding="utf-8")
    return [str(p) for p in paths]


def test_ab_alternates_and_gives_both_sides_the_same_seeds(pair, workers, prepared):
    started = workers()
    found = ab.ab(pair, BenchConfig(device="cpu", seeds=4, steps=6, data_dir=str(prepared)), CPU)
    assert [cfg.fused_adamw for cfg, _ in started] == [False, True, True, False, False, True, True, False]
    assert [cfg.seed for cfg, _ in started] == [7, 7, 8, 8, 9, 9, 10, 10]
    assert {how["steps"] for _, how in started} == {6}
    assert [s["config"] for s in found["sides"]] == pair
    assert [s["requested"]["fused_adamw"] for s in found["sides"]] == [False, True]
    assert found["changes"] == {"fused_adamw": [False, True]}
    assert all(len(s["losses"]) == len(s["step_s"]) == 4 for s in found["sides"])
    assert {cfg.tokens_per_step for cfg, _ in started} == {256}  # as in the files


def test_ab_runs_the_files_as_they_are(pair, workers, prepared):
    """But for sizes that were given; a device that a file names is the file's."""
    started = workers()
    ab.ab(pair, BenchConfig(seeds=1, data_dir=str(prepared)), CPU)
    assert {cfg.device for cfg, _ in started} == {"cpu"}
    started.clear()
    ab.ab(pair, BenchConfig(seeds=1, batch_size=2, sequence_length=16, data_dir=str(prepared)), CPU)
    assert {(cfg.batch_size, cfg.T, cfg.tokens_per_step) for cfg, _ in started} == {(2, 16, 32)}


def test_quick_makes_both_sides_small_and_alike(workers, prepared):
    """The peer and the top rung differ in their micro-batches, but a step has as many tokens."""
    started = workers()
    paths = [str(ROOT / "config" / p) for p in ("peers/nanogpt_cpu.py", "ladder/r10_blocked.py")]
    ab.ab(paths, BenchConfig(quick=True, data_dir=str(prepared)), CPU)
    assert len(started) == 4
    assert len({(cfg.n_layer, cfg.n_embd, cfg.T, cfg.tokens_per_step) for cfg, _ in started}) == 1
    assert all(cfg.n_layer == 1 and cfg.tokens_per_step <= 1024 for cfg, _ in started)


def test_a_side_of_ab_that_fails_is_named(pair, workers, prepared):
    workers(lambda cfg: {"error": "it burns"} if cfg.fused_adamw else result(cfg))
    with pytest.raises(UserError, match=r"b\.py: it burns"):
        ab.ab(pair, BenchConfig(device="cpu", data_dir=str(prepared)), CPU)


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "ladder"}', '{"kind": "ladder", "rungs": [3]}', "no JSON"])
def test_compare_reports_a_file_that_is_no_result_in_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cannot compare .*a\.json"):
        ab.compare([str(path), str(path)], BenchConfig())
