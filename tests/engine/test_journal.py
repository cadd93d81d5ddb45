"""journal.py: what a run writes about itself can be read, by people in 120 columns and by programs as JSON."""

import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import losses, records

import train
from base.errors import UserError
from configurator import Config
from engine import journal
from engine.journal import Journal, Progress, StepResult
from engine.parallel import World

pytestmark = pytest.mark.usefixtures("own_signals")


def opened(cfg: Config, out: Path, rank: int = 0) -> Journal:
    out.mkdir(exist_ok=True)
    run = SimpleNamespace(cfg=cfg, device=torch.device("cpu"), world=World(rank=rank), micro_batch=1)
    return Journal(run, out, resumed=False)


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is what the journal takes for the time."""
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("seconds", [0.0157, 9.9994, 12.397])
@pytest.mark.parametrize("norm", [0.4321, 99.996, 3e38, math.nan])
def test_a_log_line_fits_120_columns(tmp_path, monkeypatch, capsys, clock, seconds, norm):
    """A GPT-2 whose numbers are as wide as they get: 19,073 steps, a full GPU, ten hours to go."""
    monkeypatch.setattr(journal.machine, "memory_gib", lambda device: 139.94)
    monkeypatch.setattr(journal.machine, "peak_flops", lambda device: 1e17 / seconds)
    cfg = SimpleNamespace(**asdict(Config(max_steps=19_073, log_interval=1)) | dict(tokens_per_step=seconds * 15e6, T=1024))
    cfg.flops_per_token = Config().flops_per_token
    log = opened(cfg, tmp_path)
    for step in (1, 10_000):
        log.step(Progress(step=step), StepResult(loss=10.98765, grad_norm=norm, lr=6e-4, seconds=seconds), last=False)
        clock[0] += 36_300 / 9_073 * 9_999
    line = capsys.readouterr().out.splitlines()[1]
    assert len(line) <= 120, (len(line), line)
    assert line.startswith("step  10000/19073 | loss 10.9877 | lr 6.0e-04 | norm ")
    assert line.endswith(" | 140 GiB | eta 10h05m")


ETAS = {  # (first step, steps, log_interval, seconds of each step) -> the time left in each line
    "the first step compiles": (1, 5, 1, [60, 2, 3, 2, 2], [None, "6s", "5s", "2s", None]),
    "a resumed run counts its own steps": (901, 1000, 10, [1] * 10, [None, "1m30s"]),
}


@pytest.mark.parametrize("case", ETAS)
def test_the_time_left_is_never_that_of_the_first_step_and_ends_with_the_run(tmp_path, capsys, clock, case):
    first, steps, interval, seconds, expected = ETAS[case]
    log = opened(Config(max_steps=steps, log_interval=interval), tmp_path)
    for step, took in enumerate(seconds, first):
        clock[0] += took
        log.step(Progress(step=step), StepResult(loss=1.0, grad_norm=1.0, lr=1.0, seconds=2.0), last=step == steps)
    lines = capsys.readouterr().out.splitlines()
    assert [(re.findall(r"eta (\S+)", line) or [None])[0] for line in lines] == expected


def test_a_duration_is_two_units_at_most():
    texts = {0.4: "0s", 59.6: "1m00s", 75: "1m15s", 3599.7: "1h00m", 36_300: "10h05m"}
    assert {seconds: journal.duration(seconds) for seconds in texts} == texts


@pytest.mark.parametrize("rest", ['{"step": 99, "lo', '{"step": 99}', "\0\0\0"])
def test_half_a_line_is_cut_on_resuming(cfg, rest):
    """Of a run that was killed while it wrote; what follows must be readable."""
    train.train(replace(cfg, max_steps=3, schedule="constant"))
    log = Path(cfg.out_dir) / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + rest)
    train.train(replace(cfg, resume=True))
    assert log.read_text().startswith(whole)
    assert max(losses(cfg)) == 6
    assert len(records(cfg)) > len(whole.splitlines())


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["folder", "fifo", "zero"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_log_that_is_no_file_is_refused_in_one_line(cfg, make, resume):
    """And neither waited for nor read to its end."""
    log = Path(cfg.out_dir) / "log.jsonl"
    train.train(replace(cfg, max_steps=3))
    log.unlink()
    make(log)
    with pytest.raises(UserError, match=re.escape(cfg.out_dir)) as e:
        train.train(replace(cfg, resume=resume))
    assert "\n" not in str(e.value)


def test_only_the_first_process_writes(tmp_path, capsys):
    log = opened(Config(), tmp_path, rank=1)
    log.step(Progress(step=1), StepResult(loss=1.0, grad_norm=1.0, lr=1.0, seconds=1.0), last=True)
    log.say("anything")
    log.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path):
    log = opened(Config(), tmp_path)
    log.file = open("/dev/full", "w")
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device.*use --resume"):
        log.event("start", 0)
