"""measure/ladder.py: the ladder is a ladder, what this machine lacks is left out of it, and rounds are interleaved."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from stand_ins import CEILINGS, result

import bench
import configurator
from base import system
from base.errors import UserError
from configurator import Config
from engine import machine
from measure import ladder
from measure.config import BenchConfig
from measure.ladder import Rung
from report import kinds

CPU = torch.device("cpu")


def sizes(**changes) -> BenchConfig:
    given = dict(device="cpu", batch_size=4, sequence_length=64, tokens_per_step=1024) | changes
    return BenchConfig(**given).by_device("cpu")


@pytest.fixture
def chain(rungs) -> list[Rung]:
    """The rungs without the twins that stand beside them."""
    return [r for r in rungs if not r.twin]


def test_each_rung_changes_one_setting_of_the_rung_before(rungs, chain):
    """And only settings of speed: tokens per step, seed, data, data order, model and optimizer are those of the first rung."""
    speed = "device dtype fp32_precision compile compile_scope attention vocab_multiple fused_adamw reuse_memory prefetch"
    assert len(rungs) >= 8
    assert rungs[0].changes == {}
    for before, rung in itertools.pairwise(chain):
        assert rung.versus == before.name
        assert len(rung.changes) == 1
        assert list(configurator.diff(before.cfg, rung.cfg)) == list(rung.changes)
    values = [(f, r.changes[f][1]) for r in chain[1:] for f in r.changes]
    assert len(set(values)) == len(values)  # no setting to the same value twice
    assert {f for r in rungs for f in configurator.diff(rungs[0].cfg, r.cfg)} <= {*speed.split(), "processes", "batch_size"}
    assert all(re.match(r"Rung \d+", r.title) for r in rungs)
    twins = [r for r in rungs if r.twin]
    assert "r01b_bf16_matmul" in [t.name for t in twins]
    for twin in twins:  # it stands beside its rung, and nothing stands on it
        beside = rungs[rungs.index(twin) - 1]
        assert (twin.versus, list(twin.changes)) == (beside.versus, list(beside.changes))
    assert not {r.versus for r in rungs} & {t.name for t in twins}


def test_a_file_that_changes_two_settings_or_none_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "LADDER", tmp_path)
    config = "from configurator import Config\nconfig = Config(compile={}, prefetch={})\n"
    (tmp_path / "r00_plain.py").write_text(f'"""Rung 0: plain."""\n{config.format(False, False)}')
    for on, word in ((True, "compile"), (False, "none")):
        (tmp_path / "r01_more.py").write_text(f'"""Rung 1: more."""\n{config.format(on, on)}')
        with pytest.raises(UserError, match=rf"r01_more.*{word}"):
            ladder.load_ladder()


def test_what_this_machine_cannot_run_or_what_would_be_no_other_measurement_has_a_reason(rungs, monkeypatch):
    cfg = rungs[0].cfg
    assert ladder.unavailable(cfg, CPU) is None
    assert ladder.unavailable(replace(cfg, processes=99), CPU) is None  # slow, but it runs
    assert "needs 2 GPUs" in ladder.unavailable(replace(cfg, processes=2), torch.device("mps"))
    assert "mps" in ladder.unavailable(replace(cfg, fp32_precision="tf32"), torch.device("mps"))
    assert ladder.unavailable(replace(cfg, reuse_memory=True), torch.device("cuda"))
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    assert "does nothing here: float32 matmuls run as ieee" in ladder.unavailable(replace(cfg, fp32_precision="bf16"), CPU)
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: how)
    assert ladder.unavailable(replace(cfg, fp32_precision="bf16"), CPU) is None
    cfg = replace(cfg, batch_size=8, tokens_per_step=2048, sequence_length=256)
    assert ladder.pointless(cfg, CPU) is None
    assert "--tokens_per_step" in ladder.pointless(replace(cfg, tokens_per_step=1024), CPU)
    assert ladder.pointless(replace(cfg, attention="blocked"), torch.device("cuda"))
    monkeypatch.setattr(system, "cores", lambda: 1)
    assert "2 cores" in ladder.pointless(replace(cfg, processes=2), CPU)


def test_where_everything_is_available_the_chain_is_the_ladder(rungs, available):
    available()
    climbed, skipped = ladder.climb(rungs, sizes(batch_size=3, n_layer=2, tokens_per_step=64 * 640), CPU)
    assert skipped == {}
    assert {r.name: r.versus for r in climbed} == {r.name: r.versus for r in rungs}
    by_name = {r.name: r for r in climbed}
    for asked, rung in zip(rungs, climbed, strict=True):
        assert list(rung.changes) == list(asked.changes)
        assert configurator.diff(by_name[rung.versus].cfg, rung.cfg) == rung.changes
        assert rung.cfg.batch_size * rungs[0].cfg.batch_size == asked.cfg.batch_size * 3
        assert (rung.cfg.n_layer, rung.cfg.T, rung.cfg.tokens_per_step) == (2, 64, 64 * 640)


def test_a_setting_that_is_not_available_is_left_out_above_and_its_reason_kept(rungs, chain, available):
    for rung in chain[1:]:
        ((field, _),) = rung.changes.items()
        available(field)
        climbed, skipped = ladder.climb(rungs, sizes(), CPU)
        assert skipped[rung.name] == f"no {field} here"
        assert set(skipped) == {r.name for r in rungs if list(r.changes) == [field]}
        for other in climbed:
            if other.name not in skipped:
                assert getattr(other.cfg, field) == getattr(climbed[0].cfg, field)
            assert other.versus not in skipped
            assert len(other.changes) == (other is not climbed[0])  # still one setting at a time
    available(*(f for r in chain[1:] for f in r.changes))
    climbed, skipped = ladder.climb(rungs, sizes(), CPU)
    assert set(skipped) == {r.name for r in rungs[1:]}
    assert {r.versus for r in climbed} == {rungs[0].name}


def named(*names: str) -> list[Rung]:
    """Rungs that differ in nothing but their names, which their configs carry as wandb_project."""
    return [Rung(n, f"the {n}", Config(wandb_project=n), names[max(0, i - 1)], {}) for i, n in enumerate(names)]


def test_rounds_are_interleaved_and_a_rung_that_fails_is_not_run_again(workers):
    """Losses are compared in the first round only."""
    started = workers(lambda cfg: {"error": "it burns"} if cfg.wandb_project == "b" else result(cfg))
    skipped = {"c": "known before"}
    found, _ = ladder.run_rounds(named("a", "b", "c", "d"), skipped, sizes(rounds=3, steps=8), min_timed=2)
    assert [cfg.wandb_project for cfg, _ in started] == ["a", "b", "d", "a", "d", "a", "d"]
    assert [how["steps"] for _, how in started] == [8] * 3 + [1] * 4
    assert {how["min_timed"] for _, how in started} == {2}
    assert skipped == {"b": "it burns", "c": "known before"}
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 3, "b": 0, "c": 0, "d": 3}


def test_all_rungs_get_smaller_micro_batches_when_one_needs_more_memory(rungs, available, workers, capsys):
    """The rung with twice the micro-batch does not fit above 4: all others are measured again with half of theirs. At 1 the
    reason ends the command.
    """
    available()
    started = workers(lambda cfg: {"error": "oops", "out_of_memory": True} if cfg.batch_size > 4 else result(cfg))
    found = ladder.ladder(sizes(batch_size=8, rounds=1, tokens_per_step=64 * 16), CPU)
    assert re.search("oops.*micro-batches of 4.*oops.*micro-batches of 2", capsys.readouterr().err, re.DOTALL)
    final = started[-len(rungs) :]
    assert [cfg.batch_size for cfg, _ in final] == [2 * r.cfg.batch_size // rungs[0].cfg.batch_size for r in rungs]
    assert {cfg.tokens_per_step for cfg, _ in final} == {64 * 16}  # what is learned stays
    assert found["sizes"]["batch_size"] == 2
    assert not any("skipped" in e for e in found["rungs"])
    started = workers(lambda cfg: {"error": "8 GiB short", "out_of_memory": True})
    with pytest.raises(UserError, match=r"r00_fp32: 8 GiB short.*--sequence_length"):
        ladder.ladder(sizes(batch_size=6, rounds=1), CPU)
    assert [cfg.batch_size for cfg, _ in started] == [6, 3, 1]


def test_a_ladder_without_its_first_rung_still_has_a_table_but_none_without_any(rungs, available, workers):
    available()
    workers(lambda cfg: {"error": "it burns"} if cfg.dtype == "float32" else result(cfg))
    assert "it burns" in kinds.as_text(ladder.ladder(sizes(rounds=1), CPU))
    workers(lambda cfg: {"error": "it burns"})
    with pytest.raises(UserError, match="it burns"):
        ladder.ladder(sizes(rounds=1), CPU)


def test_each_entry_puts_one_setting_back_to_what_it_was_below(rungs, chain, available, workers):
    available()
    started = workers()
    asked = sizes(rounds=1, tokens_per_step=64 * 32)
    found = ladder.ablate(asked, CPU)["rungs"]
    top = next(cfg for cfg, _ in started if cfg.prefetch)
    assert top.processes == 0  # what several processes bring is no loss of the one
    gone = ("fp32_precision", "processes")  # with bf16 no float32 matmul is left; the top is in one process
    back = {f"without_{r.name}": r for r in chain[1:] if not set(r.changes) & set(gone)}
    assert [e["name"] for e in found] == ["top", *back]
    by_name = {r.name: r for r in ladder.climb(rungs, asked, CPU)[0]}
    for entry in found:
        changes = configurator.diff(top, Config(**entry["requested"]))
        assert ({k: list(v) for k, v in changes.items()}, "top") == (entry["changes"], entry["versus"])
        for field in entry["changes"]:
            below = by_name[by_name[back[entry["name"]].name].versus]
            assert entry["requested"][field] == getattr(below.cfg, field)


def test_candidates_are_the_top_rung_with_one_other_setting(available, workers):
    """What is not available is skipped with its reason, and running out of memory halves nothing."""
    available()
    workers(lambda cfg: {"error": "too large", "out_of_memory": True} if cfg.compile_scope == "block" else result(cfg))
    found = ladder.candidates(sizes(rounds=1), CPU)
    top, *others = found["rungs"]
    B, T = (top["requested"][name] for name in ("batch_size", "sequence_length"))
    assert found["sizes"]["tokens_per_step"] == top["requested"]["tokens_per_step"] >= 2 * B * T
    assert {field for e in others for field in e["changes"]} == set(ladder.CANDIDATES)
    assert all(len(e["changes"]) == 1 and e["versus"] == "top" for e in others)
    assert len({str(e["changes"]) for e in others}) == len(others)
    assert [e["skipped"] for e in others if "skipped" in e] == ["too large"]
    assert kinds.as_text(found)


@pytest.mark.slow
def test_results_hold_raw_times_and_what_was_on(prepared, tiny_run, tmp_path, monkeypatch, capsys, own_signals):
    """Every step's time, those of the warm-up too: where it ended is a judgement. One rung needs more cores."""
    values = tiny_run | dict(compile=False, fused_adamw=False, prefetch=False)
    for number, more in enumerate([{}, dict(fused_adamw=True), dict(fused_adamw=True, processes=system.cores() + 1)]):
        text = f"from configurator import Config\nconfig = Config(**{values | more!r})\n"
        (tmp_path / f"r{number:02}_rung.py").write_text(f'"""Rung {number}: a thing."""\n{text}', encoding="utf-8")
    argv = ["ladder", "--device=cpu", "--n_layer=1", "--batch_size=2", "--sequence_length=16", "--tokens_per_step=64"]
    argv += ["--rounds=1", "--steps=3", f"--data_dir={prepared}", f"--out={tmp_path}/results"]
    monkeypatch.setattr(ladder, "LADDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    bench.main(argv)
    (path,) = tmp_path.glob("results/*/ladder.trial.json")  # one layer is no measurement
    found, printed = json.loads(path.read_text(encoding="utf-8")), capsys.readouterr().out
    assert found["command"].startswith("python bench.py ladder --device=cpu --n_layer=1")
    assert all(math.isfinite(found["ceilings"][k]) and found["ceilings"][k] > 1e6 for k in CEILINGS if k != "peak_flops")
    plain, fused, many = found["rungs"]
    for entry, on in ((plain, False), (fused, True)):
        assert entry["requested"]["fused_adamw"] is entry["effective"]["fused_adamw"] is on
        assert (entry["effective"]["micro_batch"], entry["effective"]["accumulation"]) == (2, 2)
        assert len(entry["warmup_s"][0]) + len(entry["step_s"][0]) == len(entry["losses"]) >= 3
        assert entry["first_step_s"][0] == entry["warmup_s"][0][0]
        assert all(t > 0 for t in entry["step_s"][0])
        assert entry["memory_gib"] > 0
    assert fused["changes"] == {"fused_adamw": [False, True]}
    assert "cores" in many["skipped"]
    assert kinds.as_text(found) in printed
    machine.set_fp32_precision("bf16", CPU)
    here = machine.fp32_precision_measured(CPU)
    machine.set_fp32_precision("ieee", CPU)
    assert ladder.precision_that_runs("bf16", "cpu") == here  # tried in a process of its own
