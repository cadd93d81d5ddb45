"""bench.py: what is timed is the training step, the ladder is a ladder, and what goes wrong is said in one line."""

import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bench
import configurator
from report.kinds import as_text
import train
from base import errors, system
from base.errors import UserError
from bench import BenchConfig, Rung
from configurator import Config
from engine import machine, parallel
from engine.effective import effective
from engine.run import build

CPU = torch.device("cpu")


# ---- timing -----------------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock that only moves while the step runs, and a note of who was called in which order."""

    def __init__(self, durations):
        self.durations, self.now, self.calls, self.steps = durations, 0.0, [], []

    def __call__(self) -> float:
        self.calls.append("clock")
        return self.now

    def do_step(self, step: int) -> None:
        self.calls.append("step")
        self.steps.append(step)
        self.now += self.durations[min(step, len(self.durations) - 1)]


def timed(durations: list[float], steps: int = 1, min_timed: int = 1, **how) -> tuple[list[float], int]:
    """time_steps where step i takes durations[i], and the last of them for ever."""
    clock = FakeClock(durations)
    seconds, warmup = bench.time_steps(clock.do_step, steps, min_timed, clock, **how)
    assert seconds == pytest.approx([durations[min(i, len(durations) - 1)] for i in range(len(seconds))])
    return seconds, warmup


def test_the_clock_is_read_right_before_and_right_after_each_step():
    """Else something else is in the time: nothing happens between a reading and its step, and steps count from 0."""
    clock = FakeClock([9.0, 1.0])
    seconds, _ = bench.time_steps(clock.do_step, 4, 1, clock)
    assert clock.calls == ["clock", "step", "clock"] * len(seconds)
    assert clock.steps == list(range(len(seconds)))


def test_what_happens_between_two_steps_is_in_no_time():
    """A clock that jumps by an hour after it has been read twice: the hours are nobody's."""
    clock = FakeClock([1.0])

    def read() -> float:
        now = clock()
        if len([c for c in clock.calls if c == "clock"]) % 2 == 0:
            clock.now += 3600
        return now

    seconds, _ = bench.time_steps(clock.do_step, 6, 1, read)
    assert seconds == pytest.approx([1.0] * 6)


@pytest.mark.parametrize(
    ("durations", "warmup"),
    [
        ([1, 1, 1, 1], 2),  # calm from the start: the second settles it, and the first two are not counted
        ([60, 1, 1, 1], 2),
        ([60, 2, 1, 1], 3),
        ([60, 3, 2, 1, 1], 4),
        ([60, 1, 1.09, 1], 2),  # within a tenth
        ([60, 1, 1.11, 1.11], 3),  # not within a tenth
        ([60, 1, 0.91, 1], 2),  # nor matters the direction
        ([60, 1, 5, 1, 1], 4),  # an outlier during the warm-up: neither it nor the step behind it counts
        ([60, 1, 1, 50, 1], 2),  # one behind it stays in
        ([64, 32, 16, 8, 4, 2, 1], 5),  # never settles: five, and no more
        ([1, 1.5, 2.25, 3.4, 5, 7.5, 11], 5),  # the same where steps become slower
        ([60, 1, 1.05, 1.1, 1.15], 2),  # a drift slower than a tenth a step is the machine's, and is measured
    ],
)
@pytest.mark.parametrize("min_timed", [1, 3])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_the_warm_up_ends_when_a_step_takes_as_long_as_the_one_before(durations, warmup, steps, min_timed):
    seconds, found = timed(durations, steps, min_timed)
    assert found == warmup
    assert len(seconds) == max(steps, warmup + min_timed)  # as many as are needed, and not one more


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_times_the_first_never_counts_and_enough_do(seed):
    """Random durations, steps, min_timed, max_warmup and settled."""
    r = random.Random(seed)
    durations = [r.choice([60.0, 1.0, 1.0, 1.02, 2.0]) for _ in range(30)]
    steps, min_timed, most = r.randint(1, 12), r.randint(1, 6), r.randint(1, 8)
    seconds, warmup = timed(durations, steps, min_timed, max_warmup=most)
    assert 1 <= warmup <= most
    assert len(seconds) >= steps
    assert len(seconds) - warmup >= min_timed


def test_settled_and_max_warmup_are_obeyed():
    falling = [60, *(1.25**-i for i in range(20))]
    assert timed(falling)[1] == 5
    assert timed(falling, max_warmup=7)[1] == 7
    assert timed(falling, settled=0.3)[1] == 2


# ---- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tiny_run) -> Config:
    return Config(**tiny_run)


def test_measure_times_train_step_itself_and_nothing_else(cfg, monkeypatch):
    """train.train_step sleeps for 40 ms, building and reading back for 250: the times say 40."""

    def slow(function, seconds: float):
        def slowly(*args):
            time.sleep(seconds)
            return function(*args)

        return slowly

    asked = []

    def train_step(run, step):
        asked.append(step)
        time.sleep(0.04)
        return 1.0 + step, 1.0

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "build", slow(build, 0.25))
    monkeypatch.setattr(train, "effective", slow(effective, 0.25))
    found = bench.measure(replace(cfg, prefetch=False), steps=5, min_timed=2)
    assert "error" not in found
    assert asked == list(range(len(found["step_s"])))
    assert found["losses"] == [1.0 + step for step in asked]
    assert all(t >= 0.04 for t in found["step_s"])
    assert min(found["step_s"]) < 0.08  # the least: other programs run here, too
    assert sum(found["step_s"]) < 0.04 * len(asked) + 0.25
    assert found["first_step_s"] == found["step_s"][0]
    assert 1 <= found["warmup"] < len(asked)


def test_measure_reports_the_losses_of_training(cfg):
    """Those that train.train_step gives for the same seed, and what was on beside what was asked for."""
    found = bench.measure(cfg, steps=4, min_timed=1)
    run = build(cfg)
    assert found["losses"][:4] == [train.train_step(run, step).loss for step in range(4)]
    assert "error" not in found
    assert found["requested"] == asdict(run.cfg)
    assert found["effective"] == effective(run)
    json.dumps(found)


def test_what_is_not_what_was_asked_is_an_error_in_a_dict(cfg, monkeypatch):
    monkeypatch.setattr(train, "mismatches", lambda run, on: ["compile=True was asked for", "so was dtype"])
    found = bench.measure(cfg, 1, 1)
    assert found["error"] == "compile=True was asked for; so was dtype"
    assert found["step_s"]  # what was measured stays visible


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_cannot_be_built_is_a_workers_result(cfg, tmp_path, monkeypatch, rank):
    """An answer like any other, whichever process it is, and an exit status that makes torchrun end the others."""
    monkeypatch.setenv("RANK", rank)
    job, result_path = tmp_path / "job.json", tmp_path / "result.json"
    what = {"what": "measure", "config": asdict(replace(cfg, dataset="missing")), "steps": 1, "min_timed": 1}
    job.write_text(json.dumps(what))
    with pytest.raises(SystemExit) as stop:
        bench.worker(str(job), str(result_path))
    assert stop.value.code == 1
    assert "prepare_data.py" in json.loads(result_path.read_text())["error"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
    ids=["gpu", "cpu"],
)
def test_running_out_of_memory_is_known_as_such(cfg, monkeypatch, error):
    """Else the rung is left out of the table, where a smaller micro-batch for all would do."""

    def train_step(run, step):
        raise error

    monkeypatch.setattr(train, "train_step", train_step)
    found = bench.measure(cfg, 1, 1)
    assert found["out_of_memory"]
    assert "memory" in found["error"]


# ---- a process of its own ---------------------------------------------------------------------------------------------


@pytest.fixture
def in_place_of_the_worker(monkeypatch, tmp_path):
    """in_place_of_the_worker(code): each fresh process runs this code, with `job` and `result_path`, instead of bench.py."""

    def arrange(code: str) -> None:
        script = tmp_path / "worker.py"
        start = "import json, os, signal, sys\njob, result_path = json.load(open(sys.argv[2])), sys.argv[3]\n"
        script.write_text(start + code, encoding="utf-8")
        monkeypatch.setattr(bench, "__file__", str(script))

    return arrange


def test_every_job_is_a_fresh_process_that_is_told_all(cfg, in_place_of_the_worker):
    in_place_of_the_worker("json.dump({'pid': os.getpid(), 'job': job}, open(result_path, 'w'))")
    first = bench.in_fresh_process(cfg, steps=7, min_timed=3)
    second = bench.in_fresh_process(cfg, "ceilings")
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert first["job"] == {"what": "measure", "config": asdict(cfg), "steps": 7, "min_timed": 3}
    assert second["job"]["what"] == "ceilings"
    assert Config(**first["job"]["config"]) == cfg


@pytest.mark.parametrize(
    ("code", "word", "memory"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing", False),
        ("sys.exit(3)", "3", False),
        ("print('error: the data is gone', file=sys.stderr); sys.exit(2)", "error: the data is gone", False),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "-11", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "-9", True),  # so ends what outgrows the machine's memory
        ("sys.stderr.buffer.write(b'caf\\xe9\\n'); sys.exit(1)", "caf", False),
    ],
)
def test_a_worker_that_dies_is_an_error_and_no_traceback(cfg, in_place_of_the_worker, code, word, memory):
    in_place_of_the_worker(code)
    found = bench.in_fresh_process(cfg)
    assert word in found["error"]
    assert "\n" not in found["error"]
    assert bool(found.get("out_of_memory")) is memory


@pytest.mark.parametrize(
    ("code", "word", "memory"),
    [("raise ValueError('no such thing')", "no such thing", False), ("os.kill(os.getpid(), signal.SIGKILL)", "9", True)],
    ids=["crash", "out of memory"],
)
def test_so_it_is_behind_torchrun(cfg, in_place_of_the_worker, code, word, memory):
    """torchrun's own exit status is 1 whatever became of its processes, and its last line is a rule."""
    in_place_of_the_worker(code)
    found = bench.in_fresh_process(replace(cfg, processes=2))
    assert word in found["error"]
    assert "====" not in found["error"]
    assert "\n" not in found["error"]
    assert bool(found.get("out_of_memory")) is memory


def test_two_processes_leave_one_result(cfg, in_place_of_the_worker):
    in_place_of_the_worker(
        "rank, size = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        "if rank == '0': json.dump({'size': size, 'processes': job['config']['processes']}, open(result_path, 'w'))"
    )
    assert bench.in_fresh_process(replace(cfg, processes=2)) == {"size": "2", "processes": 2}


# ---- the ladder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rungs(root, monkeypatch) -> list[Rung]:
    """The real ones."""
    monkeypatch.chdir(root)
    return bench.load_ladder()


def is_twin(name: str) -> bool:
    return re.fullmatch(r"r\d\d_\w+", name) is None  # r01b_x


@pytest.fixture
def chain(rungs) -> list[Rung]:
    """The rungs without the twins that stand beside them."""
    return [r for r in rungs if not is_twin(r.name)]


@pytest.fixture
def impossible(monkeypatch):
    """impossible(*names of settings): where a rung changes one of these, it cannot be had; everything else can."""

    def arrange(*fields: str, plain: Config | None = None):
        refused = set(fields)

        def reason(cfg: Config) -> str | None:
            off = [f for f in refused if getattr(cfg, f) != getattr(plain, f)]
            return f"no {off[0]} here" if off else None

        monkeypatch.setattr(bench, "cannot_be_had", lambda cfg, device: reason(cfg))
        monkeypatch.setattr(bench, "in_fresh_process", lambda cfg, *a, **k: {})

    return arrange


def sizes(**changes) -> BenchConfig:
    return BenchConfig(**dict(device="cpu", batch_size=4, sequence_length=64, tokens_per_step=1024) | changes).by_device(CPU)


def test_each_rung_changes_one_setting_of_the_rung_before(rungs, chain):
    assert len(rungs) >= 8
    assert rungs[0].changes == {}
    for before, rung in itertools.pairwise(chain):
        assert rung.versus == before.name
        assert len(rung.changes) == 1
        assert list(configurator.diff(before.cfg, rung.cfg)) == list(rung.changes)
    values = [(f, r.changes[f][1]) for r in chain[1:] for f in r.changes]
    assert len(set(values)) == len(values)  # no setting to the same value twice
    assert all(re.match(r"Rung \d+", r.title) for r in rungs)


def test_a_twin_stands_beside_its_rung_and_nothing_stands_on_it(rungs):
    twins = [r for r in rungs if is_twin(r.name)]
    assert twins
    for twin in twins:
        beside = rungs[rungs.index(twin) - 1]
        assert (twin.versus, list(twin.changes)) == (beside.versus, list(beside.changes))
    assert not {r.versus for r in rungs} & {t.name for t in twins}


def test_what_is_learned_is_the_same_on_all_rungs(rungs):
    """Tokens per step, sequence length, seed, data, data order, model and optimizer: only settings of speed change."""
    speed = "device dtype fp32_precision compile compile_scope attention vocab_multiple fused_adamw reuse_memory prefetch"
    allowed = {*speed.split(), "processes", "batch_size"}
    for rung in rungs:
        assert configurator.diff(rungs[0].cfg, rung.cfg).keys() <= allowed
        assert rung.cfg.tokens_per_step == rungs[0].cfg.tokens_per_step
        assert (rung.cfg.T, rung.cfg.seed, rung.cfg.batch_order) == (rungs[0].cfg.T, rungs[0].cfg.seed, "shuffled")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("replace(previous, compile=True, prefetch=True)", "compile"),
        ("replace(previous)", "none"),
        ("replace(previous, seed=1, fused_adamw=True)", "seed"),
    ],
)
def test_a_file_that_changes_two_settings_or_none_is_refused_by_name(tmp_path, monkeypatch, body, word):
    first = "from configurator import Config\nconfig = Config(compile=False, prefetch=False, fused_adamw=False)\n"
    (tmp_path / "r00_plain.py").write_text(f'"""Rung 0: plain."""\n{first}')
    (tmp_path / "r01_more.py").write_text(
        f'"""Rung 1: more."""\nfrom dataclasses import replace\n{first.replace("config =", "previous =")}config = {body}\n'
    )
    monkeypatch.setattr(bench, "LADDER", f"{tmp_path}/r[0-9][0-9]*.py")
    with pytest.raises(UserError) as e:
        bench.load_ladder()
    assert f"{tmp_path}/r01_more.py" in str(e.value)
    assert word in str(e.value)
    assert "\n" not in str(e.value)


# ---- climbing ---------------------------------------------------------------------------------------------------------


def test_where_everything_can_be_had_the_chain_is_the_ladder(rungs, chain, impossible):
    """Each rung stands on the one before it, the first twin's neighbour included, and the top has all settings."""
    impossible(plain=rungs[0].cfg)
    climbed, skipped = bench.climb(rungs, sizes(), CPU)
    assert skipped == {}
    assert [r.name for r in climbed] == [r.name for r in rungs]
    assert {r.name: r.versus for r in climbed} == {r.name: r.versus for r in rungs}
    for asked, rung in zip(rungs, climbed, strict=True):
        assert list(rung.changes) == list(asked.changes)
        by_name = {r.name: r for r in climbed}
        assert configurator.diff(by_name[rung.versus].cfg, rung.cfg) == rung.changes
    top = climbed[-1].cfg
    wanted = {field: value for asked in chain[1:] for field, (_, value) in asked.changes.items()}  # of two, the later
    for field, value in wanted.items():
        assert getattr(top, field) == value, f"{field} was lost on the way up"


@pytest.mark.parametrize("number", range(1, 11))
def test_a_setting_that_cannot_be_had_is_left_out_above_and_its_reason_kept(rungs, chain, impossible, number):
    if number >= len(chain):
        pytest.fail(f"the ladder has {len(chain)} rungs: shorten this test")
    rung = chain[number]
    ((field, _),) = rung.changes.items()
    impossible(field, plain=rungs[0].cfg)
    climbed, skipped = bench.climb(rungs, sizes(), CPU)
    assert rung.name in skipped
    assert skipped[rung.name] == f"no {field} here"
    assert set(skipped) == {r.name for r in rungs if list(r.changes) == [field]}
    for other in climbed:
        if other.name not in skipped:
            assert getattr(other.cfg, field) == getattr(climbed[0].cfg, field)
        assert other.versus not in skipped
        assert len(other.changes) == (other is not climbed[0])  # still one setting at a time


def test_all_can_be_impossible(rungs, chain, impossible):
    impossible(*(f for r in chain[1:] for f in r.changes), plain=rungs[0].cfg)
    climbed, skipped = bench.climb(rungs, sizes(), CPU)
    assert set(skipped) == {r.name for r in rungs[1:]}
    assert {r.versus for r in climbed} == {rungs[0].name}


def test_a_twin_never_becomes_part_of_the_chain(rungs, impossible, monkeypatch):
    """Whether its neighbour can be had or not."""
    twins = [r for r in rungs if is_twin(r.name)]
    impossible(plain=rungs[0].cfg)
    for refused in ("tf32", "nothing"):
        answer = {refused: {"error": "no"}}
        monkeypatch.setattr(bench, "in_fresh_process", lambda cfg, answer=answer, **_: answer.get(cfg.fp32_precision, {}))
        climbed, skipped = bench.climb(rungs, sizes(), CPU)
        for twin in twins:
            ((field, (_, value)),) = twin.changes.items()
            assert twin.name not in skipped
            assert [r.name for r in climbed if getattr(r.cfg, field) == value] == [twin.name]
            assert twin.name not in {r.versus for r in climbed}


def test_a_precision_that_shows_only_in_a_run_is_tried_in_a_small_one(rungs, impossible, monkeypatch):
    impossible(plain=rungs[0].cfg)
    tried = []

    def in_fresh_process(cfg, *args, **how):
        tried.append(cfg)
        return {"error": "it multiplies as ieee"} if cfg.fp32_precision == "tf32" else {}

    monkeypatch.setattr(bench, "in_fresh_process", in_fresh_process)
    _, skipped = bench.climb(rungs, sizes(), CPU)
    assert skipped == {next(r.name for r in rungs if r.cfg.fp32_precision == "tf32"): "it multiplies as ieee"}
    assert [c.n_layer for c in tried] == [1] * len(tried)
    assert {c.fp32_precision for c in tried} == {"tf32", "bf16"}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16, 64])
def test_micro_batches_keep_their_ratio_and_all_else_its_size(rungs, impossible, batch_size):
    impossible(plain=rungs[0].cfg)
    asked = sizes(batch_size=batch_size, n_layer=2, tokens_per_step=64 * 640)
    climbed, _ = bench.climb(rungs, asked, CPU)
    for rung, original in zip(climbed, rungs, strict=True):
        assert rung.cfg.batch_size * rungs[0].cfg.batch_size == original.cfg.batch_size * batch_size
        assert (rung.cfg.n_layer, rung.cfg.T, rung.cfg.tokens_per_step) == (2, 64, 64 * 640)
        assert (rung.cfg.seed, rung.cfg.batch_order) == (rungs[0].cfg.seed, rungs[0].cfg.batch_order)


def test_more_processes_than_cores_are_a_reason(rungs, chain, monkeypatch):
    """For real: only the processes' rung needs two cores, and this process has one."""
    monkeypatch.setattr(machine, "cores", lambda: 1)
    two = next(r for r in rungs if r.cfg.processes > 1)
    assert "2 cores" in bench.cannot_be_had(replace(two.cfg, compile=False), CPU)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert bench.cannot_be_had(replace(two.cfg, compile=False, batch_size=4), CPU) is None


def test_a_micro_batch_larger_than_the_step_is_a_reason(rungs):
    cfg = replace(rungs[0].cfg, batch_size=8, tokens_per_step=1024, sequence_length=256)
    assert "--tokens_per_step" in bench.cannot_be_had(cfg, CPU)
    assert bench.cannot_be_had(replace(cfg, tokens_per_step=2048), CPU) is None


@pytest.mark.parametrize("changes", [dict(fp32_precision="bf16"), dict(reuse_memory=True)], ids=str)
def test_what_a_gpu_cannot_do_is_a_reason_there(rungs, changes):
    assert bench.cannot_be_had(replace(rungs[0].cfg, **changes), torch.device("cuda"))


# ---- rounds -----------------------------------------------------------------------------------------------------------


def result(cfg: Config, **changes) -> dict:
    """What a worker that went well leaves behind."""
    times = dict(first_step_s=9.0, warmup=2, step_s=[9.0, 8.0, 1.0, 1.0])
    what = dict(
        requested=asdict(cfg), effective={"on": True, "device": "cpu", "processes": 1}, losses=[3.0, 2.0], memory_gib=1.0
    )
    return what | times | dict(machine={}, peak_flops=None) | changes


CEILINGS = {"peak_flops": None, "gemm_float32_flops": 1e11, "gemm_bfloat16_flops": 5e11, "copy_bytes_per_s": 2e10}


@pytest.fixture
def workers(monkeypatch):
    """workers(answer) -> the list of (config, keywords) of the processes that would have been started."""

    def arrange(answer=result) -> list[tuple[Config, dict]]:
        started = []

        def in_fresh_process(cfg, what="measure", **how):
            if what == "ceilings":
                return CEILINGS
            started.append((cfg, how))
            return answer(cfg)

        monkeypatch.setattr(bench, "in_fresh_process", in_fresh_process)
        return started

    return arrange


def named(*names: str) -> list[Rung]:
    """Rungs that differ in nothing but their names, which their configs carry as wandb_project."""
    return [Rung(n, f"the {n}", Config(wandb_project=n), names[max(0, i - 1)], {}) for i, n in enumerate(names)]


def test_rounds_are_interleaved(workers):
    """All rungs, then all again: drift of the machine hits all alike. Losses are compared in the first round only."""
    started = workers()
    found = bench.run_rounds(named("a", "b", "c"), {}, sizes(rounds=3, steps=8), min_timed=2)
    assert [cfg.wandb_project for cfg, _ in started] == ["a", "b", "c"] * 3
    assert [how["steps"] for _, how in started] == [8] * 3 + [1] * 6
    assert {how["min_timed"] for _, how in started} == {2}
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_rung_that_fails_is_skipped_with_its_reason_and_not_run_again(workers):
    started = workers(lambda cfg: {"error": "it burns"} if cfg.wandb_project == "b" else result(cfg))
    skipped = {"c": "known before"}
    found = bench.run_rounds(named("a", "b", "c", "d"), skipped, sizes(rounds=3), min_timed=2)
    assert [cfg.wandb_project for cfg, _ in started] == ["a", "b", "d", "a", "d", "a", "d"]
    assert skipped == {"b": "it burns", "c": "known before"}
    assert found["b"] == found["c"] == []


def test_out_of_memory_in_any_rung_ends_the_attempt(workers):
    started = workers(lambda cfg: {"error": "8 GiB short", "out_of_memory": cfg.wandb_project == "b"})
    skipped = {}
    with pytest.raises(bench.OutOfMemory, match="b: 8 GiB short"):
        bench.run_rounds(named("a", "b", "c"), skipped, sizes(), min_timed=2)
    assert [cfg.wandb_project for cfg, _ in started] == ["a", "b"]
    assert "b" not in skipped


def test_all_rungs_get_smaller_micro_batches_when_one_needs_more_memory(rungs, impossible, workers, capsys):
    """The rung with twice the micro-batch does not fit above 4: all others are measured again with half of theirs."""
    impossible(plain=rungs[0].cfg)
    started = workers(lambda cfg: {"error": "oops", "out_of_memory": True} if cfg.batch_size > 4 else result(cfg))
    asked = sizes(batch_size=8, rounds=1, tokens_per_step=64 * 16)
    found = bench.with_smaller_batches(asked, lambda s: bench.ladder(s, CPU))
    said = capsys.readouterr().err
    assert "micro-batches of 4" in said
    assert "micro-batches of 2" in said
    assert "oops" in said
    final = started[-len(rungs) :]
    assert [cfg.batch_size for cfg, _ in final] == [2 * r.cfg.batch_size // rungs[0].cfg.batch_size for r in rungs]
    assert {cfg.tokens_per_step for cfg, _ in final} == {64 * 16}  # what is learned stays
    assert found["sizes"]["batch_size"] == 2
    assert [e["requested"]["batch_size"] for e in found["rungs"]] == [cfg.batch_size for cfg, _ in final]
    assert not any("skipped" in e for e in found["rungs"])


def test_micro_batches_of_one_that_do_not_fit_are_one_clear_line(capsys):
    tried = []

    def attempt(s: BenchConfig) -> dict:
        tried.append(s.batch_size)
        raise bench.OutOfMemory("r00_fp32: 8 GiB short")

    with pytest.raises(UserError) as e:
        bench.with_smaller_batches(sizes(batch_size=6), attempt)
    assert tried == [6, 3, 1]
    assert "r00_fp32: 8 GiB short" in str(e.value)
    assert "--sequence_length" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("failing", ["r00_fp32", "all"])
def test_a_ladder_without_its_first_rung_still_has_an_answer(rungs, impossible, workers, failing):
    """A worker's failure is never bench's: a table, or one line, and within three seconds."""
    impossible(plain=rungs[0].cfg)
    workers(lambda cfg: {"error": "it burns"} if failing == "all" or cfg.dtype == "float32" else result(cfg))

    def too_long(*_):
        raise TimeoutError("the table is never finished")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(3)
    try:
        said = as_text(bench.ladder(sizes(rounds=1), CPU))
    except UserError as e:
        said = str(e)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "it burns" in said


# ---- ablation ---------------------------------------------------------------------------------------------------------


def test_each_entry_puts_one_setting_back_to_what_it_was_below(rungs, chain, impossible, workers):
    impossible(plain=rungs[0].cfg)
    started = workers()
    asked = sizes(rounds=1, tokens_per_step=64 * 32)
    found = bench.ablate(asked, CPU)
    top = next(cfg for cfg, _ in started if cfg.prefetch)
    assert top.processes == 0  # what several processes bring is no loss of the one
    entries = {e["name"]: e for e in found["rungs"]}
    assert entries["top"]["changes"] == {}
    gone = ("fp32_precision", "processes")  # with bf16 no float32 matmul is left; the top is in one process
    back = [r for r in chain[1:] if not set(r.changes) & set(gone)]
    assert list(entries) == ["top", *(f"without_{r.name}" for r in back)]
    assert len({str(e["changes"]) for e in found["rungs"]}) == len(found["rungs"])  # each is another measurement
    for entry in found["rungs"]:
        changes = configurator.diff(top, Config(**entry["requested"]))
        assert {k: list(v) for k, v in changes.items()} == entry["changes"]
        assert entry["versus"] == "top"
    by_name = {r.name: r for r in bench.climb(rungs, asked, CPU)[0]}
    for rung in back:
        ((field, _),) = rung.changes.items()
        below = by_name[rung.name].versus
        assert entries[f"without_{rung.name}"]["requested"][field] == getattr(by_name[below].cfg, field)


def test_candidates_are_the_top_rung_with_one_other_setting(rungs, impossible, workers):
    """What cannot be had is skipped with its reason, and running out of memory halves nothing."""
    impossible(plain=rungs[0].cfg)
    workers(lambda cfg: {"error": "too large", "out_of_memory": True} if cfg.compile_scope == "block" else result(cfg))
    found = bench.candidates(sizes(rounds=1), CPU)
    top, *others = found["rungs"]
    B, T = (top["requested"][name] for name in ("batch_size", "sequence_length"))
    assert found["sizes"]["tokens_per_step"] == top["requested"]["tokens_per_step"] >= 2 * B * T
    assert {field for e in others for field in e["changes"]} == set(bench.CANDIDATES)
    assert all(len(e["changes"]) == 1 and e["versus"] == "top" for e in others)
    assert len({str(e["changes"]) for e in others}) == len(others)
    assert [e["skipped"] for e in others if "skipped" in e] == ["too large"]
    assert as_text(found)


def test_what_was_impossible_is_not_ablated(rungs, impossible, workers):
    impossible("compile", "processes", plain=rungs[0].cfg)
    started = workers()
    names = [e["name"] for e in bench.ablate(sizes(rounds=1), CPU)["rungs"]]
    assert "without_r06_fused" in names
    assert not {"without_r03_compile", "without_r11_processes"} & set(names)
    assert not any(cfg.compile or cfg.processes for cfg, _ in started)


def test_without_autocast_the_precision_of_float32_matmuls_is_ablated(rungs, impossible, workers):
    impossible("dtype", plain=rungs[0].cfg)
    workers()
    names = [e["name"] for e in bench.ablate(sizes(rounds=1), CPU)["rungs"]]
    assert "without_r01_tf32" in names


# ---- two configs ------------------------------------------------------------------------------------------------------


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
    found = bench.ab(pair, BenchConfig(device="cpu", seeds=4, steps=6, data_dir=str(prepared)), CPU)
    assert [cfg.fused_adamw for cfg, _ in started] == [False, True, True, False, False, True, True, False]
    assert [cfg.seed for cfg, _ in started] == [7, 7, 8, 8, 9, 9, 10, 10]
    assert {how["steps"] for _, how in started} == {6}
    assert [s["config"] for s in found["sides"]] == pair
    assert [s["requested"]["fused_adamw"] for s in found["sides"]] == [False, True]
    assert found["changes"] == {"fused_adamw": [False, True]}
    assert all(len(s["losses"]) == len(s["step_s"]) == 4 for s in found["sides"])
    assert {cfg.tokens_per_step for cfg, _ in started} == {256}  # as in the files


def test_ab_runs_the_files_as_they_are(pair, workers, prepared):
    """But for sizes that were typed; a device that a file names is the file's."""
    started = workers()
    bench.ab(pair, BenchConfig(seeds=1, data_dir=str(prepared)), CPU)
    assert {cfg.device for cfg, _ in started} == {"cpu"}
    started.clear()
    bench.ab(pair, BenchConfig(seeds=1, batch_size=2, sequence_length=16, data_dir=str(prepared)), CPU)
    assert {(cfg.batch_size, cfg.T, cfg.tokens_per_step) for cfg, _ in started} == {(2, 16, 32)}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ab_takes_two_files(pair, count):
    with pytest.raises(UserError, match=r"ab A\.py B\.py"):
        bench.ab((pair * 2)[:count], BenchConfig(device="cpu"), CPU)


def test_a_side_of_ab_that_fails_is_named(pair, workers, prepared):
    workers(lambda cfg: {"error": "it burns"} if cfg.fused_adamw else result(cfg))
    with pytest.raises(UserError, match=r"b\.py: it burns"):
        bench.ab(pair, BenchConfig(device="cpu", data_dir=str(prepared)), CPU)


def ab_result(a: list[list[float]], b: list[list[float]], losses_a: list[float], losses_b: list[float]) -> dict:
    def side(name, times, losses):
        steps = [[11.0, x] for x in losses]
        return {"config": name, "requested": {"tokens_per_step": 1024}, "effective": {}, "step_s": times, "losses": steps}

    where = dict(hardware="a machine", torch="2.13", commit="abc", dirty=False)
    sides = [side("a.py", a, losses_a), side("b.py", b, losses_b)]
    return {"kind": "ab", "date": "2026-11-20T00:00:00", "machine": where, "sides": sides, "changes": {}}


def noisy(r: random.Random, seconds: float, seeds: int = 5) -> list[list[float]]:
    return [[seconds * r.lognormvariate(0, 0.05) for _ in range(5)] for _ in range(seeds)]


def verdicts(found: dict) -> tuple[str, str]:
    """(on the speed, on the loss) as printed."""
    text = as_text(found)
    speed, loss = (part.partition(": ")[2].partition(".")[0] for part in text.split("95% CI")[1:])
    return speed, loss


def test_a_config_against_itself_is_not_distinguishable():
    times, losses = noisy(random.Random(0), 1.0), [3.1, 3.2, 3.0, 3.1, 3.3]
    assert verdicts(ab_result(times, times, losses, losses)) == ("not distinguishable", "not distinguishable")


def test_noise_is_called_a_difference_as_often_as_the_interval_says():
    """A 95% interval misses in one of twenty comparisons of a config with itself: of 400, near 20."""
    r = random.Random(1)
    speeds, losses = [], []
    for _ in range(400):
        a, b = ([3 + r.gauss(0, 0.1) for _ in range(5)] for _ in range(2))
        speed, loss = verdicts(ab_result(noisy(r, 1.0), noisy(r, 1.0), a, b))
        speeds.append(speed != "not distinguishable")
        losses.append(loss != "not distinguishable")
    assert 6 <= sum(speeds) <= 40
    assert 6 <= sum(losses) <= 40


@pytest.mark.parametrize("faster", ["A", "B"])
def test_a_clear_difference_is_found_and_called_by_its_name(faster):
    r = random.Random(2)
    slow, fast = noisy(r, 1.2), noisy(r, 1.0)
    worse, better = [3.20, 3.32, 3.08], [3.10, 3.20, 3.00]
    sides = (fast[:3], slow[:3], better, worse) if faster == "A" else (slow[:3], fast[:3], worse, better)
    speed, loss = verdicts(ab_result(*sides))
    assert speed == f"{faster} is faster"
    assert loss == f"{faster}'s is lower"


# ---- what is written down ---------------------------------------------------------------------------------------------


def test_every_step_time_is_in_the_results(workers):
    """Those of the warm-up too: where it ended is a judgement, and the raw times are what others judge it by."""
    workers()
    rungs = named("a", "b")
    times = {"a": [9.0, 7.0, 1.25, 1.5], "b": [8.0, 6.0, 1.0, 1.125]}
    rounds = {n: [result(rungs[0].cfg, step_s=t, first_step_s=t[0])] * 2 for n, t in times.items()}
    found = bench.record("ladder", sizes(), rungs, {}, rounds)

    def numbers(value) -> list[float]:
        if isinstance(value, list):
            return [n for v in value for n in numbers(v)]
        return [value]

    for entry in found["rungs"]:
        written = numbers([v for k, v in entry.items() if k.endswith("_s")])
        assert set(times[entry["name"]]) <= set(written), f"only {sorted(set(written))} of {times[entry['name']]}"
        assert entry["step_s"] == [times[entry["name"]][2:]] * 2  # the ones that count


@pytest.fixture(scope="module")
def real(prepared, tiny_run, tmp_path_factory) -> tuple[dict, str]:
    """(the results, what was printed) of `bench.py ladder` over two real rungs and one that needs more cores."""
    folder = tmp_path_factory.mktemp("ladder")
    values = tiny_run | dict(compile=False, fused_adamw=False, prefetch=False)
    rungs = ["", "fused_adamw=True", f"fused_adamw=True, processes={system.cores() + 1}"]
    for number, more in enumerate(rungs):
        text = f"from dataclasses import replace\nfrom configurator import Config\nconfig = Config(**{values!r})\n"
        text += f"config = replace(config, {more})\n"
        (folder / f"r{number:02}_rung.py").write_text(f'"""Rung {number}: a thing."""\n{text}', encoding="utf-8")
    argv = ["ladder", "--device=cpu", "--n_layer=1", "--batch_size=2", "--sequence_length=16", "--tokens_per_step=64"]
    argv += ["--rounds=1", "--steps=3", f"--data_dir={prepared}", f"--out={folder}/results"]
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as capture:
        patch.setattr(bench, "LADDER", f"{folder}/r[0-9][0-9]*.py")
        patch.setattr(sys, "argv", ["bench.py", *argv])
        printed = []
        capture.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        bench.main(argv)
    (path,) = (folder / "results").glob("*/ladder.trial.json")  # one layer is no measurement
    assert path.parent == bench.results_dir(BenchConfig(out=f"{folder}/results"), CPU)
    return json.loads(path.read_text(encoding="utf-8")), "\n".join(printed)


def test_results_say_when_where_and_from_which_source(real, root):
    found, _ = real
    assert found["date"].endswith("+00:00")
    assert found["date"][:2] == "20"
    assert found["command"].startswith("python bench.py ladder --device=cpu --n_layer=1")
    where = found["machine"]
    assert where["hardware"] == machine.hardware_name(CPU)
    assert where["torch"] == torch.__version__
    assert where["python"] == ".".join(map(str, sys.version_info[:3]))
    assert isinstance(where["dirty"], bool) or where["commit"] is None
    if (root / ".git").exists():
        git = bench.subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        assert git.stdout.startswith(where["commit"])
    assert where["threads"] >= 1
    assert found["sizes"]["n_layer"] == 1
    rates = [found["ceilings"][k] for k in CEILINGS if k != "peak_flops"]
    assert all(math.isfinite(r) and r > 1e6 for r in rates)


def test_results_hold_raw_times_and_what_was_on(real):
    found, _ = real
    plain, fused, many = found["rungs"]
    for entry, on in ((plain, False), (fused, True)):
        assert entry["requested"]["fused_adamw"] is entry["effective"]["fused_adamw"] is on
        assert entry["requested"]["sequence_length"] == 16
        assert entry["requested"]["tokens_per_step"] == 64
        assert entry["effective"]["micro_batch"] == 2
        assert entry["effective"]["accumulation"] == 2
        assert len(entry["first_step_s"]) == len(entry["step_s"]) == 1
        assert len(entry["step_s"][0]) >= 2
        assert all(0 < t < 10 for t in entry["step_s"][0])
        assert entry["memory_gib"] > 0
        assert len(entry["losses"]) >= 3
    assert fused["changes"] == {"fused_adamw": [False, True]}
    both = list(zip(plain["losses"], fused["losses"], strict=False))  # one may have warmed up for longer
    assert [a for a, _ in both] == pytest.approx([b for _, b in both], abs=1e-4)
    assert "cores" in many["skipped"]
    assert "step_s" not in many


def test_the_worker_trains_as_train_does(real):
    """The losses in the results are those of train.train_step for the config in the results."""
    found, _ = real
    entry = found["rungs"][0]
    run = build(Config(**entry["requested"]))
    expected = [train.train_step(run, step).loss for step in range(3)]
    assert entry["losses"][:3] == pytest.approx(expected, abs=1e-5)
    parallel.stop()


def test_the_table_has_a_row_per_rung_and_names_the_skipped(real):
    found, printed = real
    text = as_text(found)
    assert text in printed
    assert "fused_adamw False → True" in text
    assert text.count("skipped") == 2  # in its row, and with its reason below
    assert found["rungs"][2]["skipped"] in text
    assert "ladder.trial.json" in printed


# ---- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "type python bench.py"),
        (["leader"], "is no command"),
        (["ladder", "config/shakespeare.py"], "one argument too many"),
        (["sampling", "again"], "one argument too many"),
        (["ab", "config/shakespeare.py"], "ab A.py B.py"),
        (["ab", "a.py", "b.py"], "there is no config file a.py"),
        (["ladder", "--rounds=0"], "rounds=0 must be at least 1"),
        (["ladder", "--steps=many"], "--steps"),
        (["ladder", "--n_layers=2"], "did you mean n_layer"),
        (["ladder", "--batch_size=-1"], "batch_size=-1"),
        (["ladder", "--device=tpu"], "tpu"),
        (["ladder", "--device=cpu", "--sequence_length=2000"], "sequence_length=2000"),
        (["ladder", "--device=cpu", "--tokens_per_step=100"], "tokens_per_step=100"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_command_is_one_line(argv, word, root, monkeypatch, capsys, workers):
    started = workers()
    one_line_with(word, argv, root, monkeypatch, capsys)
    assert not started


def one_line_with(word, argv, cwd, monkeypatch, capsys) -> None:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
    with pytest.raises(SystemExit) as e:
        errors.entry(bench.main)
    err = capsys.readouterr().err
    assert e.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


def test_results_that_cannot_be_written_are_one_line(tmp_path, root, monkeypatch, capsys):
    """Best before hours of measuring; never a traceback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(bench.MEASURES, "sampling", lambda sizes, device: {"kind": "sampling"})
    argv = ["sampling", "--device=cpu", f"--out={tmp_path}/file"]
    one_line_with(str(tmp_path / "file"), argv, root, monkeypatch, capsys)


def test_another_working_folder_is_one_line_or_no_matter(tmp_path, monkeypatch, capsys, workers, impossible, rungs):
    """config/ladder/ lies beside bench.py, wherever it is started from."""
    impossible(plain=rungs[0].cfg)
    started = workers()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", "ladder", "--device=cpu", "--rounds=1", f"--out={tmp_path}"])
    status = None
    try:
        errors.entry(bench.main)
    except SystemExit as e:
        status = e.code
    assert started or (status == 2 and capsys.readouterr().err.count("\n") == 1)


def test_quick_is_shorter_in_every_way():
    for device in (CPU, torch.device("cuda")):
        full, quick = (BenchConfig(quick=q).by_device(device) for q in (False, True))
        assert quick.rounds == 1
        assert quick.steps < full.steps
        assert quick.sequence_length < full.sequence_length
        for s in (full, quick):
            assert s.tokens_per_step % s.sequence_length == 0
            assert s.tokens_per_step >= s.batch_size * s.sequence_length


def test_sizes_that_were_typed_stay():
    typed = BenchConfig(batch_size=3, sequence_length=5, tokens_per_step=30, steps=2, quick=True).by_device(CPU)
    assert (typed.batch_size, typed.sequence_length, typed.tokens_per_step, typed.steps) == (3, 5, 30, 2)


def test_a_hardware_is_a_folder_of_plain_letters(monkeypatch):
    monkeypatch.setattr(machine, "hardware_name", lambda device: "AMD EPYC 9V74 (80-Core), 2 cores")
    assert bench.results_dir(BenchConfig(out="results"), CPU) == Path("results/amd-epyc-9v74-80-core-2-cores")
