"""train.py: what must not change what is learned does not, and a run that is stopped loses nothing."""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import optim
import train
from base import errors
from base.errors import UserError
from configurator import Config
from engine import checkpoint, machine, parallel, restore
from engine.outliers import TrainingStopped
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    """The tiny run, into a fresh folder; with dropout, so that random numbers matter."""
    return Config(**tiny_run, out_dir=str(tmp_path / "run"), dropout=0.1)


def no_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def records(cfg: Config) -> list[dict]:
    """log.jsonl, strictly."""
    text = (Path(cfg.out_dir) / "log.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def losses(cfg: Config) -> dict[int, str]:
    """{step: loss, gradient norm and learning rate in hex}, the last of each step."""
    return {r["step"]: " ".join(r[k].hex() for k in ("loss", "grad_norm", "lr")) for r in records(cfg) if "loss" in r}


def digest(cfg: Config) -> str:
    """sha256 of the last checkpoint's weights, moments, step counters and random states."""
    folder = restore.newest(Path(cfg.out_dir))
    assert folder.name == f"step_{cfg.max_steps:08d}"
    return hashlib.sha256(b"".join((folder / f"{name}.safetensors").read_bytes() for name in ("model", "training"))).hexdigest()


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def stepped(cfg: Config, steps: int = 5) -> tuple[list[float], torch.Tensor]:
    """(losses, final weights) of a few steps without the loop around them."""
    run = build(cfg)
    return [train.train_step(run, s).loss for s in range(steps)], weights(run)


# ---- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_accumulation_equals_one_large_batch(cfg, batch_size):
    """k micro-batches of b are one of k·b: a loss scaled wrongly by k would show in the gradient clip and the loss."""
    cfg = replace(cfg, dropout=0.0, learning_rate=1e-3)
    whole, w = stepped(replace(cfg, batch_size=8))
    split, v = stepped(replace(cfg, batch_size=batch_size))
    assert split == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(v, w, rtol=0, atol=1e-5)


def test_a_step_is_clip_and_adamw_on_the_mean_gradient(cfg):
    """The step written out: mean loss of all its tokens, clipped to norm 0.1, AdamW at the schedule's rate."""
    cfg = replace(cfg, dropout=0.0, grad_clip=0.1, batch_size=8)
    run, other = build(cfg)[0], build(cfg)[0]
    for step in range(3):
        loss, norm = train.train_step(run, step)
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
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert norm == pytest.approx(total, rel=1e-4)  # before clipping
    torch.testing.assert_close(weights(run), weights(other), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_are_clipped_alike_inside_and_outside_of_the_kernel(cfg, dtype):
    """The fused AdamW clips while it reads; in float16 a GradScaler has a say in the same step."""
    cfg = replace(cfg, dropout=0.0, learning_rate=1e-3, dtype=dtype)
    fused, looped, unclipped = (
        stepped(replace(cfg, fused_adamw=fused, grad_clip=clip)) for fused, clip in ((True, 0.05), (False, 0.05), (True, 0.0))
    )
    assert fused[0] == pytest.approx(looped[0], rel=1e-3)
    torch.testing.assert_close(fused[1], looped[1], rtol=0, atol=1e-5 if dtype == "float32" else 2e-4)
    assert not torch.equal(fused[1], unclipped[1])


@contextlib.contextmanager
def alone_in_a_group(folder: Path):
    """A gloo process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_gradients_travel_once_per_step(cfg, tmp_path):
    """With 8 micro-batches, DDP's communication hook sees each bucket on the last one only; the result is the same."""
    cfg = replace(cfg, batch_size=1)
    plain = stepped(cfg, 2)
    with alone_in_a_group(tmp_path):
        run = build(cfg)
        run.train_model = DDP(run.compiled, gradient_as_bucket_view=True)
        sent = []

        def hook(_, bucket):
            sent.append(sum(g.numel() for g in bucket.gradients()))
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        run.train_model.register_comm_hook(None, hook)
        assert run.accumulation == 8
        found = [train.train_step(run, s).loss for s in range(2)]
        assert sum(sent) == 2 * sum(p.numel() for p in run.model.parameters())
        with parallel.gradient_sync(run.train_model, on=False):
            run.train_model(*run.read(0, 0)).backward()
        assert sum(sent) == 2 * sum(p.numel() for p in run.model.parameters())
    assert found == plain[0]


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
    before = weights(run).clone()
    moments = {k: v.clone() for k, v in checkpoint.state_tensors(run.model, run.optimizer)[1].items()}
    with pytest.raises(TrainingStopped, match=f"step 2: the {poison}"):
        train.train_step(run, 1)
    assert torch.equal(weights(run).view(torch.int32), before.view(torch.int32))
    after = checkpoint.state_tensors(run.model, run.optimizer)[1]
    assert all(torch.equal(after[k], moments[k]) for k in moments)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision(cfg, dtype):
    """60 steps on words of a small dictionary: far below the loss at the start, which is near ln(vocabulary)."""
    cfg = replace(cfg, dtype=dtype, max_steps=60, dropout=0.0, eval_interval=60)
    train.train(cfg)
    found = [r["loss"] for r in records(cfg) if "loss" in r]
    assert found[0] == pytest.approx(math.log(cfg.vocab_size), abs=0.3)
    assert sum(found[-3:]) / 3 < found[0] - 1.0


def test_a_float16_overflow_is_left_out_and_the_log_stays_json(cfg, monkeypatch):
    """A scale at which every gradient overflows: no update, half the scale, until it fits; then it learns."""
    plain = build

    def build(cfg):
        run, said = plain(cfg)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return run, said

    monkeypatch.setattr(train, "build", build)
    cfg = replace(cfg, dtype="float16", dropout=0.0, batch_order="one_batch", max_steps=25)
    train.train(cfg)
    found = [r["loss"] for r in records(cfg) if "loss" in r]
    assert found[0] == found[1]  # nothing was updated
    assert found[-1] < found[0] - 0.2


# ---- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 31, 500, 10**6])
def test_validation_is_the_mean_over_the_same_tokens_whatever_the_batch(cfg, tokens):
    """Against the mean over single targets, each predicted from what its sequence of T holds before it."""
    found = []
    for batch_size in (1, 3, 8):
        run = build(replace(cfg, batch_size=batch_size, tokens_per_step=32 * 24, eval_tokens=tokens))
        found.append(train.validation(run)["loss"])
        assert run.model.training  # dropout is back on
    stream, T = run.dataset.split("val"), cfg.T
    count = min(tokens, len(stream) - 1)
    ids = torch.from_numpy(stream.read(0, count + 1))
    run.model.eval()
    with torch.no_grad():
        by_token = [
            F.cross_entropy(
                run.model(ids[None, s : min(s + T, count)])[0], ids[s + 1 : min(s + T, count) + 1], reduction="none"
            )
            for s in range(0, count, T)
        ]
    assert found == pytest.approx([torch.cat(by_token).mean().item()] * 3, rel=1e-6)


# ---- the whole run ----------------------------------------------------------------------------------------------------


def test_the_log_holds_one_object_per_event(cfg):
    train.train(cfg)
    lines = records(cfg)
    steps = [r for r in lines if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for r in steps:
        assert {"lr", "grad_norm", "ms", "tokens_per_s", "mfu", "memory_gib"} <= r.keys()
        assert r["mfu"] is None  # no data-sheet peak for a CPU
        assert r["lr"] == optim.learning_rate(cfg, r["step"] - 1)
        assert r["tokens_per_s"] == pytest.approx(cfg.tokens_per_step / r["ms"] * 1e3)
    assert [r["step"] for r in lines if "val_loss" in r] == [3, 6]
    start = next(r for r in lines if r.get("event") == "start")
    assert start["config"]["n_embd"] == 32
    assert start["step_done"] == 0


def test_mfu_is_flops_done_over_peak(cfg, monkeypatch, capsys):
    """6 x matmul weights + 12·L·C·T operations a token (PaLM, appendix B), over a made-up peak."""
    train.train(cfg)
    assert "mfu n/a" in capsys.readouterr().out
    monkeypatch.setattr(train.machine, "peak_flops", lambda device: 3e9)
    train.train(cfg)
    matmul_weights = 2 * 12 * 32 * 32 + cfg.vocab_size * 32
    per_token = 6 * matmul_weights + 12 * 2 * 32 * 32
    for r in records(cfg):
        if "loss" in r:
            assert r["mfu"] == pytest.approx(r["tokens_per_s"] * per_token / 3e9)


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(step, action) -> during that step (1, 2, …) of training the action happens, once."""

    def arrange(step: int, action):
        plain, pending = train.train_step, [action]

        def train_step(run, number):
            if number == step - 1 and pending:
                pending.pop()()
            return plain(run, number)

        monkeypatch.setattr(train, "train_step", train_step)

    return arrange


@pytest.fixture
def uninterrupted(cfg, tmp_path) -> Config:
    """The run as it would have been."""
    whole = replace(cfg, out_dir=str(tmp_path / "whole"))
    train.train(whole)
    return whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_saves_and_resuming_is_as_if_it_had_not_come(cfg, uninterrupted, interrupt, number, step):
    """The step at which it comes is finished and saved: every step is in the log once, and all is equal in hex. In the first
    step, which compiles, it is not waited for: nothing is lost."""
    interrupt(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as e:
        train.train(cfg)
    assert e.value.code == 128 + number
    assert [c.name for c in checkpoint.candidates(Path(cfg.out_dir))[:1]] == ([f"step_{step:08d}"] if step > 1 else [])
    train.train(replace(cfg, resume="auto"))
    assert [r["step"] for r in records(cfg) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)


@pytest.mark.parametrize("step", [3, 4])
def test_a_crash_loses_only_what_came_after_the_checkpoint(cfg, uninterrupted, interrupt, step):
    """Checkpoints at 2, at 3 (the best validation so far) and at 4; a crash goes on from the one before it."""

    def crash():
        raise RuntimeError("power cut")

    interrupt(step, crash)
    cfg = replace(cfg, checkpoint_interval=2)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(cfg)
    assert restore.newest(Path(cfg.out_dir)).name == f"step_{step - 1:08d}"
    train.train(replace(cfg, resume=True))
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)


def test_how_often_is_validated_logged_and_saved_changes_nothing(cfg, uninterrupted):
    often = replace(cfg, eval_interval=1, log_interval=1, checkpoint_interval=1, eval_tokens=64)
    train.train(often)
    assert losses(often) == losses(uninterrupted)
    assert digest(often) == digest(uninterrupted)


def test_the_seed_decides_the_run(cfg, uninterrupted):
    """Else the equalities above would hold for a program that ignores everything."""
    train.train(replace(cfg, seed=2))
    assert not set(losses(cfg).items()) & set(losses(uninterrupted).items())


def torchrun(ranks: int, script: str, cfg: Config, root: Path, **how) -> subprocess.CompletedProcess:
    flags = [f"--{name}={value}" for name, value in vars(cfg).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, encoding="utf-8", timeout=120, **how)


def test_two_processes_train_as_one(cfg, root, tmp_path):
    """Losses, validation, final weights; and one process goes on where two stopped."""
    cfg = replace(cfg, dropout=0.0, batch_size=2, learning_rate=1e-3, checkpoint_interval=3)
    one = replace(cfg, out_dir=str(tmp_path / "one"))
    train.train(one)
    done = torchrun(2, "train.py", cfg, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step      1/6 | loss") == 1  # one of them prints

    def numbers(of: Config, key: str) -> list[float]:
        return [r[key] for r in records(of) if key in r]

    assert numbers(cfg, "loss") == pytest.approx(numbers(one, "loss"), rel=1e-5)
    assert numbers(cfg, "val_loss") == pytest.approx(numbers(one, "val_loss"), rel=1e-5)
    last = [safetensors.torch.load_file(restore.newest(Path(c.out_dir)) / "model.safetensors") for c in (cfg, one)]
    for name in last[0]:
        torch.testing.assert_close(last[0][name], last[1][name], rtol=0, atol=1e-4)

    shutil.rmtree(Path(cfg.out_dir) / "step_00000006")
    train.train(replace(cfg, resume=True))
    assert numbers(cfg, "loss")[6:] == pytest.approx(numbers(one, "loss")[3:], rel=1e-5)


def test_a_real_process_is_stopped_by_ctrl_c(cfg, root):
    """Sent from outside at any moment: saved, exit status 130, and what is saved is the last step that was logged."""
    cfg = replace(cfg, max_steps=10**6)
    flags = [f"--{name}={value}" for name, value in vars(cfg).items()]
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    log = Path(cfg.out_dir) / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and '"step": 5' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == ""
    last = max(losses(cfg))
    assert f"stopped by a signal after step {last}: type --resume" in out
    assert restore.newest(Path(cfg.out_dir)).name == f"step_{last:08d}"


# ---- an end that was asked for, or a beginning that was not -----------------------------------------------------------


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_time_limit_saves_and_the_run_goes_on_later(cfg, tmp_path, uninterrupted, capsys, engine):
    """As on a cluster that gives an hour at a time: no error, and as if it had not been (here with two processes as well)."""
    cfg = replace(cfg, parallel=engine)
    short = replace(cfg, max_minutes=1e-6)
    if engine == "ddp":
        train.train(short)
        assert "stopped after 1e-06 minutes, after step 1: type --resume" in capsys.readouterr().out
        train.train(replace(cfg, resume=True))
        assert losses(cfg) == losses(uninterrupted)
        assert digest(cfg) == digest(uninterrupted)
        return
    with ranks.started(2, tmp_path / "ranks", train.train, short) as found:
        ranks.wait(found)
        assert [r.status for r in found] == [0, 0], found[0].stderr
        assert "stopped after 1e-06 minutes, after step 1" in found[0].stdout
    for now in (replace(short, resume="auto"), replace(cfg, resume="auto")):
        ranks.run(2, tmp_path / "ranks", train.train, now)
    assert [r["step"] for r in records(cfg) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_auto_begins_goes_on_and_knows_when_it_is_done(cfg, uninterrupted, interrupt, capsys):
    """One command for a scheduler to repeat: nothing there, a run that died before its first checkpoint, one with a
    checkpoint, one that is done."""
    cfg = replace(cfg, resume="auto", eval_interval=6, checkpoint_interval=4)

    def crash():
        raise RuntimeError("power cut")

    for step in (2, 6):
        interrupt(step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(cfg)
    train.train(cfg)
    assert not Path(cfg.out_dir).with_name("run.1").exists()  # nothing was moved aside
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)
    assert [r["step_done"] for r in records(cfg) if r.get("event") == "start"] == [0, 0, 4]
    capsys.readouterr()
    train.train(cfg)
    assert f"{cfg.out_dir} is at step 6 already" in capsys.readouterr().out
    assert digest(cfg) == digest(uninterrupted)


def test_a_run_that_torchrun_starts_anew_goes_on(cfg, uninterrupted, interrupt, monkeypatch):
    def crash():
        raise RuntimeError("power cut")

    cfg = replace(cfg, checkpoint_interval=2, eval_interval=6)
    interrupt(4, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(cfg)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train.train(cfg)
    assert [r["step_done"] for r in records(cfg) if r.get("event") == "start"] == [0, 2]
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)


@pytest.mark.parametrize("at", [3, 6])
def test_a_signal_does_not_wait_for_a_validation(cfg, uninterrupted, monkeypatch, at):
    """Which may take longer than whoever sent it; the step before it is saved, also where it was the last."""
    plain, seen = train.data.validation_batches, []

    def batches(*args):
        for batch in plain(*args):
            seen.append(len(seen))
            if len(seen) == (2 if at == 3 else 10):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(train.data, "validation_batches", batches)
    with pytest.raises(SystemExit) as e:
        train.train(cfg)
    assert e.value.code == 128 + signal.SIGTERM
    assert len(seen) <= (3 if at == 3 else 11)
    assert [r["step"] for r in records(cfg) if "val_loss" in r] == ([] if at == 3 else [3])
    assert restore.newest(Path(cfg.out_dir)).name == f"step_{at:08d}"
    train.train(replace(cfg, resume=True))
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)


@pytest.mark.parametrize("rest", ['{"step": 99, "lo', '{"step": 99, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}', "\0\0\0"])
def test_half_a_line_at_the_end_of_the_log_is_taken_away(cfg, uninterrupted, rest):
    """Of a run that was killed while it wrote; what follows must be readable."""
    train.train(replace(cfg, max_steps=3, schedule="constant"))
    log = Path(cfg.out_dir) / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + rest)
    train.train(replace(cfg, resume=True))
    assert log.read_text().startswith(whole)
    assert max(losses(cfg)) == 6


@pytest.mark.parametrize("resume", [True, "auto"])
def test_what_a_killed_save_left_is_put_right_on_resuming(cfg, resume):
    train.train(replace(cfg, max_steps=3))
    out = Path(cfg.out_dir)
    shutil.copytree(out / "step_00000003", out / ".writing_step_00000006")
    shutil.copytree(out / "step_00000003", out / ".replaced_step_00000002")
    train.train(replace(cfg, resume=resume, keep_checkpoints=9))
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["step_00000002", "step_00000003", "step_00000006"]


# ---- saves that fail --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(step): the checkpoint of that step cannot be written."""

    def arrange(step: int) -> None:
        plain = checkpoint.write_config

        def write_config(folder, cfg):
            if f"{step:08d}" in folder.name:
                raise OSError(28, "No space left on device")
            plain(folder, cfg)

        monkeypatch.setattr(checkpoint, "write_config", write_config)

    return arrange


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_on_the_way_is_told_and_training_goes_on(cfg, uninterrupted, full_disk, capsys, background):
    full_disk(4)
    cfg = replace(cfg, checkpoint_interval=2, eval_interval=6, background_save=background)
    train.train(cfg)
    assert re.search(r"WARNING: cannot save .*No space left on device.*; training goes on", capsys.readouterr().err)
    assert [c.name for c in checkpoint.candidates(Path(cfg.out_dir))] == ["step_00000006", "step_00000002"]
    assert [r["reason"].count("No space left") for r in records(cfg) if r.get("event") == "save_failed"] == [1]
    assert [r["step_done"] for r in records(cfg) if r.get("event") == "saved"] == [2, 6]
    assert losses(cfg) == losses(uninterrupted)
    assert digest(cfg) == digest(uninterrupted)


@pytest.mark.parametrize("background", [True, False])
def test_a_last_save_that_fails_is_an_error(cfg, full_disk, background):
    full_disk(6)
    cfg = replace(cfg, checkpoint_interval=4, eval_interval=6, background_save=background)
    with pytest.raises(UserError, match="No space left on device"):
        train.train(cfg)
    assert [c.name for c in checkpoint.candidates(Path(cfg.out_dir))] == ["step_00000004"]
    assert [r["step_done"] for r in records(cfg) if r.get("event") == "saved"] == [4]


@pytest.mark.parametrize("background", [True, False])
def test_each_save_is_said_and_logged(cfg, capsys, background):
    train.train(replace(cfg, background_save=background))
    said = capsys.readouterr().out
    saved = [r for r in records(cfg) if r.get("event") == "saved"]
    assert [r["step_done"] for r in saved] == [3, 6]
    assert all(r["save_ms"] > 0 for r in saved)
    for step in (3, 6):
        assert f"saved {cfg.out_dir}/step_{step:08d} in " in said


# ---- too little memory ------------------------------------------------------------------------------------------------

MESSAGES = [
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of …",
]


@pytest.fixture
def short_of_memory(monkeypatch):
    """short_of_memory(most, …): from some micro-batch of some step on, those of more sequences do not fit."""

    def arrange(most: int, since: tuple[int, int] = (0, 0), where: str = "forward", message: str = MESSAGES[0]) -> None:
        plain, read = build, Run.next_batch
        now = [(0, 0)]

        def next_batch(run, step, micro):
            now[0] = step, micro
            return read(run, step, micro)

        def too_much(*_):
            raise RuntimeError(message)

        def forward(model, args, loss):
            if now[0] >= since and args[0].size(0) > most and loss.requires_grad:
                too_much() if where == "forward" else loss.register_hook(too_much)

        def build(cfg):
            run, said = plain(cfg)
            run.model.register_forward_hook(forward)
            return run, said

        monkeypatch.setattr(train, "build", build)
        monkeypatch.setattr(Run, "next_batch", next_batch)

    return arrange


@pytest.mark.parametrize("batch_size", [8, "auto"])
@pytest.mark.parametrize(("most", "fits"), [(7, 4), (3, 2), (1, 1)])
def test_out_of_memory_is_the_same_run_in_smaller_micro_batches(
    cfg, tmp_path, short_of_memory, monkeypatch, capsys, most, fits, batch_size
):
    """Losses, norms, weights, moments and dropout: in hex those of the run that had begun so."""
    small = replace(cfg, batch_size=fits, out_dir=str(tmp_path / "small"))
    train.train(small)
    capsys.readouterr()
    with monkeypatch.context():
        short_of_memory(most)
        train.train(replace(cfg, batch_size=batch_size))
    said = capsys.readouterr().out
    for size in [s for s in (8, 4, 2) if s > fits]:
        assert f"out of memory with micro-batches of {size} sequences" in said
    assert f"the same step again as {8 // fits} x {fits}; type --batch_size={fits} to begin so" in said
    assert [(r["step_done"], r["micro_batch"]) for r in records(cfg) if r.get("event") == "out_of_memory"] == [(1, fits)]
    on = next(r["effective"] for r in records(cfg) if "effective" in r)
    assert (on["micro_batch"], on["accumulation"]) == (fits, 8 // fits)
    assert losses(cfg) == losses(small)
    assert digest(cfg) == digest(small)


def test_as_much_as_fits_is_the_whole_share(cfg, capsys):
    train.train(replace(cfg, batch_size="auto", tokens_per_step=32 * 12))
    said = capsys.readouterr().out
    assert "chosen: batch_size = 12, the whole share of a process; halved until it fits" in said
    assert "1 micro-batches x 12 sequences" in said


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("message", MESSAGES, ids=["cpu", "cuda"])
def test_memory_may_run_out_in_the_middle_of_a_step(cfg, tmp_path, short_of_memory, where, message):
    """In its second micro-batch, of a later step: what the first has added to the gradients does not count twice. From there
    on it is the run that was resumed there with smaller ones."""
    cfg = replace(cfg, max_steps=5, eval_interval=5, schedule="constant")
    other = replace(cfg, out_dir=str(tmp_path / "other"))
    train.train(replace(other, max_steps=3))
    train.train(replace(other, batch_size=2, resume=True))
    short_of_memory(2, since=(3, 1), where=where, message=message)
    train.train(cfg)
    assert losses(cfg) == losses(other)
    assert digest(cfg) == digest(other)


def test_one_sequence_that_does_not_fit_is_an_error(cfg, short_of_memory):
    short_of_memory(0)
    with pytest.raises(RuntimeError, match="can't allocate memory") as e:
        train.train(cfg)
    assert errors.is_out_of_memory(e.value)


def test_other_errors_are_not_taken_for_too_little_memory(cfg, short_of_memory):
    short_of_memory(0, message="mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train.train(cfg)


def tight(cfg: Config, spare_mib: int) -> tuple[int, float, float]:
    """A step in a process that may take no more than so much memory than it has: (micro-batch, loss, MiB it has)."""
    run = build(cfg)
    used = 1024 * int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + spare_mib * 2**20, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    loss, _ = train.train_step(run, 0)
    run.close()
    return run.micro_batch, loss, used / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux only")
def test_real_memory_that_runs_out_is_survived(cfg, tmp_path):
    """The kernel refuses more than 200 MiB: 2,048 sequences of 32 tokens need about 1,000 at once."""
    cfg = replace(cfg, dropout=0.0, tokens_per_step=32 * 2048, batch_size="auto")
    ((micro_batch, loss, _),) = ranks.run(1, tmp_path / "ranks", tight, cfg, 200)
    assert 16 <= micro_batch <= 1024
    assert loss == pytest.approx(stepped(replace(cfg, batch_size=64), 1)[0][0], rel=1e-5)


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


@pytest.mark.parametrize("engine", ["ddp", "zero1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_take_what_fits_the_smallest(cfg, tmp_path, engine, rank):
    """Found before they exchange anything; then the run is the one that had begun so, in hex."""
    cfg = replace(cfg, tokens_per_step=32 * 16, batch_size=8, parallel=engine)
    parts = ranks.run(2, tmp_path / "ranks", short_in_one, cfg, 3, rank)
    expected = ranks.run(2, tmp_path / "ranks", short_in_one, replace(cfg, batch_size=2), 3, rank)
    for part in parts:
        assert part["tries"] == [8, 4, 2]
        assert (part["micro_batch"], part["accumulation"]) == (2, 4)
        assert part["found"] == expected[0]["found"]


# ---- where a run goes -------------------------------------------------------------------------------------------------


def names(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_run_is_moved_aside_aloud(cfg, capsys):
    out = Path(cfg.out_dir)
    for number in range(3):
        train.train(replace(cfg, seed=number))
        said = capsys.readouterr().out
        assert ("moved to" in said) == (number > 0)
    seeds = [json.loads((p / "config.json").read_text())["seed"] for p in (out.with_name("run.1"), out.with_name("run.2"), out)]
    assert seeds == [0, 1, 2]


def test_a_folder_that_is_no_run_is_refused_and_left_alone(cfg):
    out = Path(cfg.out_dir)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run: type --out_dir"):
        train.train(cfg)
    assert names(out) == {"thesis.txt": b"years of work"}


def test_a_folder_that_cannot_be_is_found_before_the_first_step(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to out_dir"):
        train.train(replace(cfg, out_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 1, "resume": True}, r"trained with n_layer=2, not 1: type --n_layer=2"),
        ({"tie_weights": False, "resume": True}, r"tie_weights=True"),
        ({"wandb": "online"}, "pip install wandb"),
        ({"wandb": "online", "resume": True}, "pip install wandb"),
    ],
)
def test_a_run_that_is_refused_leaves_the_earlier_one_as_it_was(cfg, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    train.train(cfg)
    before = names(Path(cfg.out_dir).parent)
    with pytest.raises(UserError, match=message):
        train.train(replace(cfg, **changes))
    assert names(Path(cfg.out_dir).parent) == before


def test_resuming_nothing_is_refused_and_does_not_block_a_fresh_start(cfg):
    with pytest.raises(UserError, match="holds no checkpoint"):
        train.train(replace(cfg, resume=True))
    train.train(cfg)
    assert max(losses(cfg)) == 6


def test_other_data_is_refused_on_resuming(cfg, tmp_path, text):
    import prepare_data

    train.train(cfg)
    (tmp_path / "tiny.txt").write_text(text[::-1])
    prepare_data.main([str(tmp_path / "tiny.txt"), "--tokenizer=char", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="has changed since"):
        train.train(replace(cfg, resume=True, data_dir=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("before", ["float32", "float16"])
def test_a_run_can_go_on_in_another_precision(cfg, before, dtype, capsys):
    train.train(replace(cfg, dtype=before))
    capsys.readouterr()
    train.train(replace(cfg, dtype=dtype, resume=True, max_steps=8))
    assert max(losses(cfg)) == 8
    assert (f"resuming with dtype = '{dtype}'" in capsys.readouterr().out) == (dtype != before)


# ---- what a machine lacks ---------------------------------------------------------------------------------------------


def test_it_trains_without_the_optional_packages(run_script, tiny_flags, tmp_path):
    """wandb, datasets, transformers and matplotlib raise ImportError; the script's own output says where things went."""
    for package in ("wandb", "datasets", "transformers", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('not installed')\n")
    done = run_script("train.py", *tiny_flags, f"--out_dir={tmp_path}/run", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"saved {tmp_path}/run/step_00000006" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_writes_a_run(run_script, tiny_flags, tmp_path):
    done = run_script("train.py", *tiny_flags, f"--out_dir={tmp_path}/run", "--wandb=offline")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb"))


def test_without_a_compiler_auto_says_so_and_true_is_refused(cfg, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")
    train.train(replace(cfg, compile="auto"))
    assert "compile = False (there is no C++ compiler" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"compile=True cannot be had here: there is no C\+\+ compiler.*--compile=False"):
        train.train(replace(cfg, compile=True))


@pytest.mark.skipif(train.machine.why_no_compile(torch.device("cpu")) is not None, reason="no C++ compiler here")
@pytest.mark.parametrize(("scope", "n_layer"), [("model", 1), ("block", 2)])
def test_compiled_trains_as_eager(cfg, scope, n_layer):
    """Also in validation, whose last batch is padded."""
    cfg = replace(cfg, dropout=0.0, learning_rate=1e-3, n_layer=n_layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = replace(cfg, compile=True, compile_scope=scope, max_steps=3, eval_interval=3, out_dir=cfg.out_dir + "_compiled")
    train.train(replace(cfg, max_steps=3))
    train.train(compiled)
    for key in ("loss", "val_loss"):
        eager_numbers, compiled_numbers = ([r[key] for r in records(c) if key in r] for c in (cfg, compiled))
        assert compiled_numbers == pytest.approx(eager_numbers, rel=1e-4)
    on = next(r["effective"] for r in records(compiled) if "effective" in r)
    assert on["compile"] is True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
