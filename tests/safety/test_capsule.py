"""safety/capsule.py: a number that is not finite is traced to its module, and the step in which it arose can be run again."""

import functools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
from spoil import louder, poison, spoiled
from trained import seal

import train
from base.errors import UserError
from configurator import Config
from engine import checkpoint, restore
from engine.outliers import Outliers, TrainingStopped
from engine.run import Run, build
from safety.capsule import first_nonfinite_module

pytestmark = pytest.mark.usefixtures("own_signals")


def state(run: Run) -> dict[str, torch.Tensor]:
    weights, moments = checkpoint.state_tensors(run.model, run.optimizer)
    return {n: t.clone() for n, t in (weights | moments).items()}


# ---- where it went wrong ------------------------------------------------------------------------------------------------

BEFORE = torch.get_rng_state()
MODULES = ["transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.ln_f", "lm_head"]
COMPILED = [dict(), dict(compile=True, compile_scope="model"), dict(compile=True, compile_scope="block")]


@pytest.fixture
def quick_compiler(monkeypatch):
    """torch.compile without the code generation, which these tests do not need."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: plain(self, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", COMPILED, ids=lambda w: w.get("compile_scope", "eager"))
def test_the_first_module_with_a_bad_output_is_named(cfg, quick_compiler, way):
    cfg = replace(cfg, tie_weights=False, **way)
    run = build(cfg)
    train.train_step(run, 0)
    token = run.read(1, 0)[0][0, 0]
    for name in MODULES:
        weight = run.model.get_submodule(name).weight
        row = int(token) if name == "transformer.wte" else 0
        spot = weight.data[row] if weight.dim() == 2 else weight.data[:1]
        good = spot.clone()
        spot.fill_(math.nan)
        with pytest.raises(TrainingStopped):
            train.train_step(run, 1)
        before = state(run)
        assert first_nonfinite_module(run, 1, BEFORE) == f"{name} (output)"
        for a, b in zip(state(run).values(), before.values(), strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        assert all(p.grad is None for p in run.model.parameters())
        spot.copy_(good)
    assert first_nonfinite_module(run, 1, BEFORE).startswith("nothing")
    assert math.isfinite(train.train_step(run, 1).loss)  # no hook is left, and compiled code runs again
    run.close()


@pytest.mark.parametrize("way", COMPILED, ids=lambda w: w.get("compile_scope", "eager"))
def test_the_first_gradient_that_is_bad_is_named(cfg, quick_compiler, way):
    """Backward goes from the head down: where gradients of activations turn bad, all parameters below are bad as well."""
    run = build(replace(cfg, **way))
    train.train_step(run, 0)
    for name in ("transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"):
        hook = run.model.get_parameter(name).register_hook(lambda g: g * math.nan)
        assert first_nonfinite_module(run, 1, BEFORE) == f"{name} (gradient)"
        hook.remove()

    def spoil(_, __, output):
        output.register_hook(lambda g: g * math.inf)

    hook = run.model.transformer.h[1].attn.register_forward_hook(spoil)
    assert re.fullmatch(r"transformer\.h\.1\.attn\S* \(gradient.*\)", first_nonfinite_module(run, 1, BEFORE))
    hook.remove()
    assert first_nonfinite_module(run, 1, BEFORE).startswith("nothing")
    run.close()


# ---- the capsule --------------------------------------------------------------------------------------------------------


def stopping(cfg: Config) -> Config:
    """Ends at an outlier."""
    return replace(cfg, on_outlier="stop", outlier_window=3)


@pytest.fixture
def crash(cfg, monkeypatch):
    """crash(spoil, **changes) -> (the message of the run, its capsule); the spoiling comes before step 5."""

    def run(spoil, **changes) -> tuple[str, Path]:
        with monkeypatch.context() as patched:
            spoiled(patched, train, spoil, 5)
            with pytest.raises(UserError) as e:
                train.train(replace(cfg, **changes))
        message = str(e.value)
        assert "\n" not in message
        return message, Path(re.search(r"python train\.py --replay (\S+) ", message)[1])

    return run


def replayed(capsys, *argv: object) -> tuple[float, str, str]:
    """(loss, first wrong, all that was said) of python train.py --replay …; if it went wrong again, with the error."""
    capsys.readouterr()
    error = ""
    try:
        train.main(["--replay", *map(str, argv)])
    except UserError as e:
        error = str(e)
    said = capsys.readouterr().out + error
    found = re.search(r"step 5 again, dtype=\w+: loss (\S+), gradient norm (\S+); first wrong: (.*)", said)
    fine = math.isfinite(float(found[1])) and math.isfinite(float(found[2]))
    assert ("the step is fine with these settings" in said) == fine == (not error)
    return float(found[1]), found[3], said


def test_a_bad_number_leaves_a_capsule_that_shows_it_again(cfg, crash, capsys):
    message, capsule = crash(poison)
    assert capsule == Path(cfg.out_dir) / "crash_00000005"
    assert message.startswith("step 5: the loss is not finite (loss nan")
    assert "First wrong: transformer.h.1.mlp.c_fc (output)" in message
    assert f"python train.py --replay {capsule} --dtype=float32" in message
    loss, where, said = replayed(capsys, capsule)
    assert math.isnan(loss)
    assert where == "transformer.h.1.mlp.c_fc (output)"
    assert "goes wrong again" in said
    assert replayed(capsys, capsule, "--dtype=bfloat16", "--batch_size=1")[1] == where


def test_a_bad_gradient_is_found_as_well(crash):
    message, _ = crash(lambda run: run.model.transformer.ln_f.weight.register_hook(lambda g: g * math.nan))
    assert message.startswith("step 5: the gradient norm is not finite")
    assert "First wrong: transformer.ln_f.weight (gradient)" in message


def test_a_capsule_is_no_checkpoint(cfg, crash):
    _, capsule = crash(poison, checkpoint_interval=4, eval_interval=6)
    out = Path(cfg.out_dir)
    assert restore.newest(out).name == "step_00000004"
    assert [p.name for p in checkpoint.candidates(out)] == ["step_00000004"]
    model, _ = restore.load_model(str(out))
    assert all(p.isfinite().all() for p in model.parameters())
    train.train(replace(cfg, resume=True))  # and the run can go on from before it
    assert restore.newest(out).name == "step_00000006"
    assert capsule.is_dir()


def test_a_step_that_is_bad_in_one_precision_only_is_fine_in_another(crash, capsys):
    """Activations beyond 65504: LayerNorm makes small numbers of them again, if they are still numbers."""

    def spoil(run):
        run.model.transformer.h[0].mlp.c_fc.weight.mul_(1e5)
        run.model.transformer.h[0].mlp.c_proj.weight.mul_(1e3)

    message, capsule = crash(spoil, dtype="float16")
    assert "(output)" in message
    assert math.isnan(replayed(capsys, capsule)[0])
    loss, where, _ = replayed(capsys, capsule, "--dtype=float32")
    assert math.isfinite(loss)
    assert where.startswith("nothing")


@pytest.fixture
def as_stopped(monkeypatch) -> list[float]:
    """The loss of every step, noted where it is judged."""
    found, plain = [], Outliers.judge

    def judge(self, **values):
        found.append(values["loss"])
        return plain(self, **values)

    monkeypatch.setattr(Outliers, "judge", judge)
    return found


def test_replaying_draws_the_same_dropout_and_needs_no_data(cfg, crash, capsys, as_stopped, prepared, tmp_path):
    """A step that was stopped for its size, not for what cannot be compared: the same loss, in hex."""
    shutil.copytree(prepared, tmp_path / "data")
    _, capsule = crash(louder, **vars(replace(stopping(cfg), data_dir=str(tmp_path / "data"))))
    shutil.rmtree(tmp_path / "data")
    loss, where, _ = replayed(capsys, capsule)
    assert loss.hex() == as_stopped[-1].hex()
    assert where.startswith("nothing")


def test_other_settings_may_be_tried(cfg, crash, capsys, as_stopped):
    """Cut into other micro-batches, the step is the same (without dropout, whose draws follow them)."""
    _, capsule = crash(louder, **vars(replace(stopping(cfg), dropout=0.0)))
    for flags in (["--batch_size=1"], ["--batch_size=8", "--attention=naive"], ["--parallel=fsdp"]):
        assert replayed(capsys, capsule, *flags)[0] == pytest.approx(as_stopped[-1], rel=1e-6)
    for flag, message in (("--dropout=2", "dropout=2"), ("--tokens_per_step=512", "capsule"), ("--n_layer=3", "missing")):
        with pytest.raises(UserError, match=message):
            train.main([f"--replay={capsule}", flag])


def crash_of_two(cfg: Config, bad: bool) -> tuple[str, float]:
    """(message, loss of the last step) of a run that is spoiled, with bad=True in process 1 alone."""
    losses, plain, judge = [], train.train_step, Outliers.judge

    def spoil(_, __, output):
        output.register_hook(lambda g: g * math.nan)

    def train_step(run, step):
        if step == 4 and bad and run.world.rank == 1:
            run.model.transformer.h[0].mlp.register_forward_hook(spoil)
        if step == 4 and not bad:
            run.model.transformer.ln_f.weight.data.mul_(50.0)
        return plain(run, step)

    def noted(self, **values):
        losses.append(values["loss"])
        return judge(self, **values)

    train.train_step, Outliers.judge = train_step, noted
    try:
        train.train(cfg)
    except UserError as e:
        return str(e), losses[-1]
    return "", 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp"])
def test_the_capsule_of_two_processes_is_replayed_by_one(cfg, tmp_path, capsys, engine):
    """The loss of all their shares."""
    cfg = replace(stopping(cfg), dropout=0.0, parallel=engine, eval_interval=6)
    (message, loss), other = ranks.run(2, tmp_path / "ranks", crash_of_two, cfg, False)
    assert other == (message, loss)
    capsule = Path(cfg.out_dir) / "crash_00000005"
    assert f"--replay {capsule} " in message
    assert replayed(capsys, capsule)[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_process_in_which_it_went_wrong_is_named(cfg, tmp_path, engine):
    found = ranks.run(2, tmp_path / "ranks", crash_of_two, replace(cfg, parallel=engine), True)
    assert found[0][0] == found[1][0]
    assert found[0][0].startswith("step 5: the gradient norm is not finite")
    (said,) = re.findall(r"First wrong: (.*?)\. To run", found[0][0])
    if engine == "ddp":
        assert re.fullmatch(r"transformer\.h\.0\.mlp\S* \(gradient.*\) in process 1", said)
    else:  # a block's gradients are exchanged before they can be seen: better no process than the wrong one
        assert re.match(r"transformer\.h\.0\.\S+ \(gradient", said)
        assert "process 0" not in said


def test_a_capsule_that_cannot_be_written_does_not_hide_what_happened(cfg, monkeypatch):
    """Training went wrong and the disk is full: both are said."""
    spoiled(monkeypatch, train, poison, 5)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    plain = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda p, t: full() if "crash_" in str(p) else plain(p, t))
    with pytest.raises(UserError) as e:
        train.train(cfg)
    assert "No space left on device" in str(e.value)
    assert "step 5: the loss is not finite" in str(e.value)
    assert "\n" not in str(e.value)


# ---- what is no capsule -------------------------------------------------------------------------------------------------


def test_other_folders_are_refused_in_one_line(cfg, crash, tmp_path):
    _, capsule = crash(poison, checkpoint_interval=4)
    damaged = tmp_path / "crash_00000009"
    shutil.copytree(capsule, damaged)
    content = bytearray((damaged / "batch.safetensors").read_bytes())
    content[-5] ^= 4
    (damaged / "batch.safetensors").write_bytes(content)
    wrong = {
        restore.newest(Path(cfg.out_dir)): "is not a crash capsule: use the folder",
        damaged: r"batch\.safetensors is damaged",
        tmp_path / "nowhere": "no readable manifest",
        capsule / "config.json": "no readable manifest",
    }
    for folder, message in wrong.items():
        with pytest.raises(UserError, match=message) as e:
            train.main(["--replay", str(folder)])
        assert "\n" not in str(e.value)
        assert str(folder) in str(e.value)
    with pytest.raises(UserError):
        train.main(["--replay"])


def test_a_capsule_never_leads_to_running_a_file(cfg, crash, capsys, tmp_path):
    """Its settings may name a config file, relative, absolute or inside the capsule, wherever a setting names something."""
    _, capsule = crash(louder, **vars(stopping(cfg)))
    (capsule / "config.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    for name in (str(capsule / "config.py"), os.path.relpath(capsule / "config.py"), "config.py"):
        values = json.loads((capsule / "config.json").read_text())
        values |= dict(init_from=name, data_dir=name, curve=name, resume="auto")
        (capsule / "config.json").write_text(json.dumps(values))
        seal(capsule)
        assert math.isfinite(replayed(capsys, capsule)[0])
    assert not (tmp_path / "ran").exists()


def test_a_forged_capsule_is_refused(cfg, crash):
    """Whole by its manifest, but with tensors that are no batch."""
    _, capsule = crash(poison)
    path = capsule / "batch.safetensors"
    good = safetensors.torch.load_file(path)
    forgeries = [
        {"inputs": good["inputs"]},
        good | {"inputs": good["inputs"].float()},
        good | {"inputs": good["inputs"][0]},
        good | {"targets": good["targets"][:1]},
        good | {"inputs": good["inputs"] + 1000},
        {name: t[:, :, :1] for name, t in good.items()},
    ]
    for forged in forgeries:
        safetensors.torch.save_file({n: t.contiguous() for n, t in forged.items()}, path)
        seal(capsule)
        with pytest.raises(UserError) as e:
            train.main(["--replay", str(capsule)])
        assert "\n" not in str(e.value)
        assert "batch.safetensors" in str(e.value)
