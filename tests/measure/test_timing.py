"""measure/timing.py: what is timed is the training step, and all processes agree on how many steps that takes."""

import time
from dataclasses import asdict

import pytest
import ranks
import torch
import torch.distributed as dist

import train
from engine import parallel
from engine.effective import effective
from engine.run import build
from measure import timing

CPU = torch.device("cpu")


def timed(durations: list[float], steps: int, min_timed: int) -> tuple[list[float], int]:
    """time_steps where step i takes durations[i], the last of them for ever, by a clock that moves while a step runs only."""
    calls, now = [], 0.0

    def clock() -> float:
        calls.append("clock")
        return now

    def do_step(step: int) -> None:
        nonlocal now
        calls.append(step)
        now += durations[min(step, len(durations) - 1)]

    seconds, warmup = timing.time_steps(do_step, steps, min_timed, clock=clock)
    assert seconds == pytest.approx([durations[min(i, len(durations) - 1)] for i in range(len(seconds))])
    assert calls == [call for step in range(len(seconds)) for call in ("clock", step, "clock")]  # right before and right after
    return seconds, warmup


@pytest.mark.parametrize(
    ("durations", "warmup"),
    [
        ([1, 1, 1, 1], 2),  # calm from the start: the second settles it, and the first two are not counted
        ([60, 2, 1, 1], 3),
        ([60, 1, 1.09, 1], 2),  # within a tenth
        ([60, 1, 0.89, 0.89], 3),  # not within a tenth, in either direction
        ([60, 1, 5, 1, 1], 4),  # an outlier during the warm-up: neither it nor the step behind it counts
        ([60, 1, 1, 50, 1], 2),  # one behind it stays in
        ([64, 32, 16, 8, 4, 2, 1], 5),  # never settles: five, and no more
    ],
)
def test_the_warm_up_ends_when_a_step_takes_as_long_as_the_one_before(durations, warmup):
    for steps, min_timed in ((1, 1), (9, 3)):
        seconds, found = timed(durations, steps, min_timed)
        assert found == warmup
        assert len(seconds) == max(steps, warmup + min_timed)  # as many as are needed, and not one more


def time_skewed() -> tuple[int, list[float], int]:
    """Time steps that exchange a number: by process 0's clock each takes 1 s, by the other's half as long as the one before."""
    world = parallel.start(CPU)
    now, durations = 0.0, [1.0] * 40 if world.rank == 0 else [2.0**-i for i in range(40)]
    done = 0

    def clock() -> float:
        return now

    def do_step(step: int) -> None:
        nonlocal now, done
        dist.all_reduce(torch.ones(1))  # as a training step: nobody gets beyond it alone
        now += durations[step]
        done += 1

    seconds, warmup = timing.time_steps(do_step, 1, 1, clock=clock, slowest=timing.slowest(CPU))
    parallel.stop()
    return done, seconds, warmup


def test_processes_with_different_clocks_take_equally_many_steps(tmp_path):
    """Else one waits for ever in the exchange of a step that the other does not take."""
    first, second = ranks.run(2, tmp_path, time_skewed)
    assert first == second
    assert first[1] == [1.0] * first[0]  # a step takes as long as its slowest process


def test_train_step_itself_is_timed_and_nothing_else(cfg, monkeypatch):
    """train.train_step takes 40 ms longer, building and reading back 250: the times are 40. Losses are those of training."""

    def slow(function, seconds):
        return lambda *args: (time.sleep(seconds), function(*args))[1]

    run = build(cfg)
    losses = [train.train_step(run, step).loss for step in range(5)]
    monkeypatch.setattr(train, "train_step", slow(train.train_step, 0.04))
    monkeypatch.setattr(timing, "build", slow(build, 0.25))
    monkeypatch.setattr(timing, "effective", slow(effective, 0.25))
    found = timing.measure_steps(cfg, steps=5, min_timed=2)
    assert "error" not in found
    assert found["losses"][:5] == losses
    assert all(t >= 0.04 for t in found["step_s"])
    assert min(found["step_s"]) < 0.2  # the least: other programs run here, too
    assert found["first_step_s"] == found["step_s"][0]
    assert found["requested"] == asdict(run.cfg)
    assert found["effective"] == effective(run)


def test_what_is_not_what_was_asked_and_running_out_of_memory_are_errors_in_a_dict(cfg, monkeypatch):
    """Were the second not known as such, the rung would be left out, where a smaller micro-batch for all would do."""
    monkeypatch.setattr(timing, "mismatches", lambda run, on: ["compile=True was asked for", "so was dtype"])
    found = timing.measure_steps(cfg, 1, 1)
    assert found["error"] == "compile=True was asked for; so was dtype"
    assert found["step_s"]  # what was measured stays visible

    def train_step(run, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train, "train_step", train_step)
    found = timing.measure_steps(cfg, 1, 1)
    assert found["out_of_memory"]
    assert "memory" in found["error"]
