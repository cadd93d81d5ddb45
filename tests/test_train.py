"""train.py: what must not change what is learned does not, and a run that is stopped loses nothing."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import assert_same, digest, equal, events, losses, numbers, records, state, weights
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import evaluate
import optim
import train
from configurator import Config
from engine import checkpoint, machine, restore
from engine.outliers import TrainingStopped
from engine.run import build


def stepped(cfg: Config, steps: int = 5) -> tuple[list[float], torch.Tensor]:
    """(losses, final weights) of a few steps without the loop around them."""
    run = build(cfg)
    return [train.train_step(run, s).loss for s in range(steps)], weights(run)


def crash() -> None:
    raise RuntimeError("power cut")


# ---- one step ---------------------------------------------------------------------------------------------------------


def test_a_step_is_clip_and_adamw_on_the_mean_gradient(cfg):
    """The step written out: mean loss of the tokens of both micro-batches, clipped to norm 0.1, AdamW at the scheduled rate."""
    cfg = replace(cfg, dropout=0.0, grad_clip=0.1, batch_size=4)
    run, other = build(cfg), build(cfg)
    for step in range(3):
        result = train.train_step(run, step)
        x, y = other.batches.batch(step, 0, 8, 1, 0, 1)
        logits = other.model(x)
        expected = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        gradients = torch.autograd.grad(expected, list(other.model.parameters()))
        total = math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients))
        for p, g in zip(other.model.parameters(), gradients, strict=True):
            p.grad = g * min(1.0, 0.1 / total)
        for group in other.optimizer.param_groups:
            group["lr"] = optim.learning_rate(cfg, step)
        other.optimizer.step()
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(total, rel=1e-4)  # before clipping
        assert result.lr == optim.learning_rate(cfg, step)
    torch.testing.assert_close(weights(run), weights(other), rtol=0, atol=2e-4)


def test_gradients_are_clipped_alike_inside_and_outside_of_the_kernel(cfg):
    """The fused AdamW clips while it reads; in float16 a GradScaler has a say in the same step."""
    cfg = replace(cfg, dropout=0.0, learning_rate=1e-3, dtype="float16")
    fused, looped, unclipped = (
        stepped(replace(cfg, fused_adamw=fused, grad_clip=clip)) for fused, clip in ((True, 0.05), (False, 0.05), (True, 0.0))
    )
    assert fused[0] == pytest.approx(looped[0], rel=1e-3)
    torch.testing.assert_close(fused[1], looped[1], rtol=0, atol=2e-4)
    assert not torch.equal(fused[1], unclipped[1])


def test_gradients_travel_once_per_step(cfg, tmp_path):
    """With 8 micro-batches, DDP's communication hook sees each bucket on the last one only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        run, sent = build(replace(cfg, batch_size=1)), []

        def hook(_, bucket):
            sent.append(sum(g.numel() for g in bucket.gradients()))
            return allreduce_hook(None, bucket)

        run.train_model = DDP(run.compiled, gradient_as_bucket_view=True)
        run.train_model.register_comm_hook(None, hook)
        for step in range(2):
            train.train_step(run, step)
    finally:
        dist.destroy_process_group()
    assert sum(sent) == 2 * sum(p.numel() for p in run.model.parameters())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_update(cfg, poison, grad_clip):
    """Parameters and moments are what they were, bit for bit, and no gradient is left over."""
    run = build(replace(cfg, grad_clip=grad_clip))
    train.train_step(run, 0)
    if poison == "loss":
        with torch.no_grad():
            run.model.transformer.wpe.weight[0, 0] = math.inf
    else:
        run.model.transformer.ln_f.weight.register_hook(lambda g: g * math.nan)
    before = state(run)
    with pytest.raises(TrainingStopped, match=f"step 2: the {poison}"):
        train.train_step(run, 1)
    assert equal(state(run), before)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision(cfg, dtype):
    """60 steps on words of a small dictionary: far below the loss at the start, which is near ln(vocabulary)."""
    cfg = replace(cfg, dtype=dtype, max_steps=60, dropout=0.0, eval_interval=60)
    train.train(cfg)
    found = numbers(cfg, "loss")
    assert found[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.3)
    assert sum(found[-3:]) / 3 < found[0] - 1.0


def test_a_float16_overflow_is_left_out_and_the_log_stays_json(cfg, monkeypatch):
    """A scale at which every gradient overflows: no update, half the scale, until it fits; then it learns."""

    def overscaled(cfg):
        run = build(cfg)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return run

    monkeypatch.setattr(train, "build", overscaled)
    cfg = replace(cfg, dtype="float16", dropout=0.0, batch_order="one_batch", max_steps=25)
    train.train(cfg)
    found = numbers(cfg, "loss")
    assert found[0] == found[1]  # nothing was updated
    assert found[-1] < found[0] - 0.2


# ---- the whole run ----------------------------------------------------------------------------------------------------


def test_the_log_holds_one_object_per_event(cfg, monkeypatch):
    """MFU is 6 x matmul weights + 12·L·C·T operations a token (PaLM, appendix B), over a made-up peak."""
    monkeypatch.setattr(machine, "peak_flops", lambda device: 3e9)
    train.train(cfg)
    lines = records(cfg)
    steps = [r for r in lines if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    per_token = 6 * (2 * 12 * 32 * 32 + cfg.vocab_size * 32) + 12 * 2 * 32 * 32
    for r in steps:
        assert {"grad_norm", "memory_gib"} <= r.keys()
        assert r["lr"] == optim.learning_rate(cfg, r["step"] - 1)
        assert r["tokens_per_s"] == pytest.approx(cfg.tokens_per_step / r["ms"] * 1e3)
        assert r["mfu"] == pytest.approx(r["tokens_per_s"] * per_token / 3e9)
    assert [r["step"] for r in lines if "val_loss" in r] == [3, 6]
    (start,) = events(cfg, "start")
    assert start["config"]["n_embd"] == 32
    assert start["step_done"] == 0


def test_the_loss_before_training_is_said_and_changes_nothing(cfg, capsys):
    """The looks of a loop, this one and validations, draw nothing from the random states that dropout uses."""
    train.train(cfg)
    run = build(cfg)
    x, y = run.batches.batch(0, 0, 1, 1, 0, 1)
    assert f"loss before training: {run.model.eval()(x, y).item():.2f} on one sequence" in capsys.readouterr().out
    assert stepped(cfg, cfg.max_steps)[0] == [r["loss"] for r in records(cfg) if "loss" in r]


@pytest.mark.parametrize(
    ("number", "step", "kept"),
    [(signal.SIGTERM, 1, []), (signal.SIGINT, 3, [3, 2]), (signal.SIGTERM, 5, [5, 4, 3]), (None, 3, [2]), (None, 4, [3, 2])],
)
def test_a_run_that_is_stopped_or_crashes_ends_as_the_whole_one(cfg, uninterrupted, interrupt, capsys, number, step, kept):
    """A signal finishes and saves its step: each is in the log once. The first step, which may compile, is not finished:
    nothing is lost. A crash loses what came after the last checkpoint, at 2, at 3 (the best validation so far) or at 4."""
    interrupt(step, (lambda: os.kill(os.getpid(), number)) if number else crash)
    cfg = replace(cfg, checkpoint_interval=2)
    with pytest.raises(SystemExit if number else RuntimeError) as e:
        train.train(cfg)
    assert not number or e.value.code == 128 + number
    told = f"stopped by a signal after step {step}; to continue: python train.py {cfg.out_dir}"
    assert (told in capsys.readouterr().out) == bool(number and kept)
    assert [checkpoint.step_of(c) for c in checkpoint.candidates(Path(cfg.out_dir))] == kept
    train.train(replace(cfg, resume="auto"))
    assert not number or [r["step"] for r in records(cfg) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert_same(cfg, uninterrupted)


def test_how_often_is_validated_logged_and_saved_changes_nothing_but_the_seed_does(cfg, uninterrupted):
    """Else these equalities would hold for a program that ignores everything."""
    often = replace(cfg, eval_interval=1, log_interval=1, checkpoint_interval=1, eval_tokens=64)
    train.train(often)
    assert_same(often, uninterrupted)
    seeded = replace(cfg, seed=2, out_dir=f"{cfg.out_dir}_seeded")
    train.train(seeded)
    assert not set(losses(seeded).items()) & set(losses(uninterrupted).items())


# ---- ends and restarts ------------------------------------------------------------------------------------------------


def test_a_time_limit_saves_and_the_run_continues_later(cfg, uninterrupted, capsys):
    """As on a cluster that gives an hour at a time: no error, and the same run in the end."""
    train.train(replace(cfg, max_minutes=1e-6))
    assert "stopped after 1e-06 minutes, after step 1; to continue: python train.py" in capsys.readouterr().out
    train.train(replace(cfg, resume=True))
    assert_same(cfg, uninterrupted)


def test_auto_begins_resumes_and_knows_when_it_is_done(cfg, uninterrupted, interrupt, capsys):
    """One command for a scheduler to repeat: nothing there, a run that died before its first checkpoint, one with a
    checkpoint, one that is done."""
    cfg = replace(cfg, resume="auto", eval_interval=6, checkpoint_interval=4)
    for step in (2, 6):
        interrupt(step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(cfg)
    train.train(cfg)
    assert not Path(cfg.out_dir).with_name("run.1").exists()  # nothing was moved aside
    assert_same(cfg, uninterrupted)
    assert [r["step_done"] for r in events(cfg, "start")] == [0, 0, 4]
    capsys.readouterr()
    train.train(cfg)
    assert f"{cfg.out_dir} is finished at step 6" in capsys.readouterr().out
    assert digest(cfg) == digest(uninterrupted)


@pytest.mark.parametrize(("at", "batch", "validated"), [(3, 2, []), (6, 10, [3])])
def test_a_signal_does_not_wait_for_a_validation(cfg, uninterrupted, monkeypatch, at, batch, validated):
    """Which may take longer than the sender waits; the step before it is saved, also if it was the last."""
    plain, seen = evaluate.data.validation_batches, []

    def batches(*args):
        for content in plain(*args):
            seen.append(len(seen))
            if len(seen) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield content

    monkeypatch.setattr(evaluate.data, "validation_batches", batches)
    with pytest.raises(SystemExit) as e:
        train.train(cfg)
    assert e.value.code == 128 + signal.SIGTERM
    assert len(seen) <= batch + 1
    assert [r["step"] for r in records(cfg) if "val_loss" in r] == validated
    assert restore.newest(Path(cfg.out_dir)).name == f"step_{at:08d}"
    train.train(replace(cfg, resume=True))
    assert_same(cfg, uninterrupted)


# ---- what a machine lacks ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_trains_without_the_optional_packages_and_logs_with_wandb(run_script, tiny_flags, tmp_path):
    """wandb, datasets, transformers and matplotlib raise ImportError; and the output is complete."""
    for package in ("wandb", "datasets", "transformers", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')\n")
    flags = [*tiny_flags, f"--out_dir={tmp_path}/run"]
    done = run_script("train.py", *flags, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"saved {tmp_path}/run/step_00000006" in done.stdout
    pytest.importorskip("wandb")
    done = run_script("train.py", *flags, "--wandb=offline")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb"))


def test_a_damaged_checkpoint_is_reported_once_by_a_run_that_is_resumed_by_its_folder(cfg, capsys):
    train.train(replace(cfg, checkpoint_interval=3))
    os.truncate(Path(cfg.out_dir) / "step_00000006" / "model.safetensors", 100)
    train.main([cfg.out_dir])
    assert capsys.readouterr().out.count("skipping a checkpoint") == 1
