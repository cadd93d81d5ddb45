"""run.py: what is built, and a micro-batch that adapts to the memory that there is."""

import re
from dataclasses import replace

import pytest
import ranks
import torch
from runs import assert_same, events, records, weights

import optim
import train
from base.errors import UserError
from configurator import Config
from engine import restore
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals")


def test_training_starts_from_another_models_weights(cfg, tmp_path):
    """Which has more positions and other padding. What does not fit is refused with the flag that does."""
    cfg = replace(cfg, vocab_multiple=1, bias=False, init_from=str(tmp_path / "other"))
    other = replace(cfg, init_from="", out_dir=cfg.init_from, block_size=48, tokens_per_step=48, vocab_multiple=64, max_steps=1)
    train.train(other)
    theirs = dict(restore.load_model(cfg.init_from)[0].named_parameters())
    for name, p in build(cfg).model.named_parameters():
        assert torch.equal(p, theirs[name][: len(p)])
    misfits = {"n_head=2": dict(n_head=1), "block_size=48": dict(block_size=64), "bias=False": dict(bias=True)}
    for flag, changes in misfits.items():
        with pytest.raises(UserError, match=f"use --{flag}"):
            build(replace(cfg, **changes))


# ---- too little memory ------------------------------------------------------------------------------------------------

MESSAGES = [
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of …",
]


@pytest.fixture
def short_of_memory(monkeypatch):
    """short_of_memory(most, …): from some micro-batch of some step on, those of more sequences do not fit."""

    def arrange(most: int, since: tuple[int, int] = (0, 0), where: str = "forward", message: str = MESSAGES[0]) -> None:
        read, now = Run.next_batch, [(0, 0)]

        def next_batch(run, step, micro):
            now[0] = step, micro
            return read(run, step, micro)

        def too_much(*_):
            raise RuntimeError(message)

        def forward(model, args, loss):
            if now[0] >= since and args[0].size(0) > most and loss.requires_grad:
                too_much() if where == "forward" else loss.register_hook(too_much)

        def tight(cfg):
            run = build(cfg)
            run.model.register_forward_hook(forward)
            return run

        monkeypatch.setattr(train, "build", tight)
        monkeypatch.setattr(Run, "next_batch", next_batch)

    return arrange


@pytest.mark.parametrize(("most", "fits", "batch_size"), [(7, 4, "auto"), (3, 2, 8), (1, 1, "auto")])
def test_out_of_memory_is_the_same_run_in_smaller_micro_batches(cfg, tmp_path, short_of_memory, capsys, most, fits, batch_size):
    """Losses, norms, weights, moments and dropout: in hex those of the run that had begun so."""
    small = replace(cfg, batch_size=fits, out_dir=str(tmp_path / "small"))
    train.train(small)
    capsys.readouterr()
    short_of_memory(most)
    train.train(replace(cfg, batch_size=batch_size))
    output = capsys.readouterr().out
    assert re.findall(r"out of memory with micro-batches of (\d+) sequences", output) == [s for s in "842" if int(s) > fits]
    assert ("batch_size = 8, the whole share of a process; halved until it fits" in output) == (batch_size == "auto")
    assert f"repeating the step as {8 // fits} x {fits}; use --batch_size={fits} to start with that" in output
    assert [(r["step_done"], r["micro_batch"]) for r in events(cfg, "out_of_memory")] == [(1, fits)]
    on = next(r["effective"] for r in records(cfg) if "effective" in r)
    assert (on["micro_batch"], on["accumulation"]) == (fits, 8 // fits)
    assert_same(cfg, small)


@pytest.mark.parametrize(("where", "message"), [("forward", MESSAGES[0]), ("backward", MESSAGES[1])], ids=["cpu", "cuda"])
def test_memory_may_run_out_in_the_middle_of_a_step(cfg, tmp_path, short_of_memory, where, message):
    """In its second micro-batch, of a later step: from there on it is the run that was resumed there with smaller ones."""
    cfg = replace(cfg, max_steps=5, eval_interval=5, schedule="constant")
    other = replace(cfg, out_dir=str(tmp_path / "other"))
    train.train(replace(other, max_steps=3))
    train.train(replace(other, batch_size=2, resume=True))
    short_of_memory(2, since=(3, 1), where=where, message=message)
    train.train(cfg)
    assert_same(cfg, other)


@pytest.mark.parametrize("message", [MESSAGES[0], "mat1 and mat2 shapes cannot be multiplied"])
def test_one_sequence_that_does_not_fit_is_an_error_and_so_is_any_other(cfg, short_of_memory, capsys, message):
    short_of_memory(0, message=message)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        train.train(cfg)
    assert ("repeating the step as" in capsys.readouterr().out) == (message == MESSAGES[0])


def short_in_one(cfg: Config, most: int, rank: int) -> dict:
    """Two processes of which one has little memory: what each finds, and what is left of the search."""
    run = build(cfg)
    tries = []

    def forward(_, args):
        tries.append(args[0].size(0))
        if run.world.rank == rank and args[0].size(0) > most:
            raise RuntimeError(MESSAGES[0])

    hook = run.model.register_forward_pre_hook(forward)
    before, states = weights(run), torch.get_rng_state()
    train.fit_batch(run)
    hook.remove()
    assert torch.equal(weights(run), before)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(p.grad is None for p in run.model.parameters())
    assert not optim.inner_optimizer(run.optimizer).state
    found = [train.train_step(run, step) for step in range(3)]
    run.close()
    return dict(tries=tries, micro_batch=run.micro_batch, accumulation=run.accumulation, found=found)


@pytest.mark.parametrize(("parallel", "rank"), [("ddp", 0), ("zero1", 1)])
def test_all_processes_take_what_fits_the_smallest(cfg, tmp_path, parallel, rank):
    """Found before they exchange anything; then the run is the one that was started with that, bit for bit."""
    cfg = replace(cfg, tokens_per_step=32 * 16, batch_size=8, parallel=parallel)
    parts = ranks.run(2, tmp_path / "ranks", short_in_one, cfg, 3, rank)
    expected = ranks.run(2, tmp_path / "ranks", short_in_one, replace(cfg, batch_size=2), 3, rank)
    for part in parts:
        assert part["tries"] == [8, 4, 2]
        assert (part["micro_batch"], part["accumulation"]) == (2, 4)
        assert part["found"] == expected[0]["found"]
