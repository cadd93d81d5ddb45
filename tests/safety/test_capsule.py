"""safety/capsule.py: a number that is not finite is traced to its module, and the step in which it arose can be run again."""

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
from runs import equal, state
from spoil import poison, spoiled
from trained import seal

import train
from base.errors import UserError
from configurator import Config
from engine import checkpoint, restore
from engine.outliers import TrainingStopped
from engine.run import Run, build
from safety.capsule import first_nonfinite_module

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
def test_the_first_module_or_gradient_that_is_bad_is_named(cfg, quick_compiler, way):
    """Backward goes from the head down: where gradients of activations turn bad, all parameters below are bad as well."""
    run = build(replace(cfg, tie_weights=False, **way))
    train.train_step(run, 0)
    token = run.read(1, 0)[0][0, 0]
    for name in MODULES:
        weight = run.model.get_submodule(name).weight
        row = int(token) if name == "transformer.wte" else 0
        spot = weight.data[row] if weight.dim() == 2 else weight.data[:1]
        good = spot.clone()
        spot.fill_(math.inf)
        with pytest.raises(TrainingStopped):
            train.train_step(run, 1)
        before = state(run)
        assert first_nonfinite_module(run, 1, BEFORE) == f"{name} (output)"
        assert equal(state(run), before)
        assert all(p.grad is None for p in run.model.parameters())
        spot.copy_(good)
    for name in ("transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"):
        hook = run.model.get_parameter(name).register_hook(lambda g: g * math.nan)
        assert first_nonfinite_module(run, 1, BEFORE) == f"{name} (gradient)"
        hook.remove()
    hook = run.model.transformer.h[1].attn.register_forward_hook(lambda _, __, out: bad_gradient(out))
    assert re.fullmatch(r"transformer\.h\.1\.attn\S* \(gradient.*\)", first_nonfinite_module(run, 1, BEFORE))
    hook.remove()
    assert first_nonfinite_module(run, 1, BEFORE).startswith("nothing")
    assert math.isfinite(train.train_step(run, 1).loss)  # no hook is left, and compiled code runs again
    run.close()


# ---- the capsule --------------------------------------------------------------------------------------------------------


def bad_gradient(t: torch.Tensor) -> None:
    """The loss stays what it is, so a replay can be compared with it."""
    t.register_hook(lambda g: g * math.nan)


def nan_in_a_gradient(run: Run) -> None:
    bad_gradient(run.model.transformer.ln_f.weight)


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


def loss_and_capsule(message: str) -> tuple[float, Path]:
    found = re.search(r"step 5: .* is not finite \(loss (\S+), .*python train\.py --replay (\S+) --dtype=float32", message)
    return float(found[1]), Path(found[2])


@pytest.fixture
def crash(cfg, monkeypatch):
    """crash(spoil, **changes) -> the message of the run; the spoiling comes before step 5."""

    def run(spoil, **changes) -> str:
        with monkeypatch.context() as patched:
            spoiled(patched, train, spoil, 5)
            return error_of(lambda: train.train(replace(cfg, **changes)))

    return run


def replayed(capsys, *argv: object) -> tuple[float, str]:
    """(loss, first wrong) of python train.py --replay …; if it went wrong again, with an error."""
    capsys.readouterr()
    try:
        train.main(["--replay", *map(str, argv)])
    except UserError as e:
        print(e)
    said = capsys.readouterr().out
    found = re.search(r"step 5 again, dtype=\w+: loss (\S+), gradient norm (\S+); first wrong: (.*)\n(.*)\n$", said)
    fine = math.isfinite(float(found[1])) and math.isfinite(float(found[2]))
    assert found[4] == f"the step {'is fine' if fine else 'goes wrong again'} with these settings"
    return float(found[1]), found[3]


def test_a_bad_number_leaves_a_capsule_that_shows_it_again_and_is_no_checkpoint(cfg, crash, capsys):
    """Activations beyond 65504, which are fine in float32: LayerNorm makes small numbers of them again."""

    def spoil(run):
        run.model.transformer.h[0].mlp.c_fc.weight.mul_(1e5)
        run.model.transformer.h[0].mlp.c_proj.weight.mul_(1e3)

    message = crash(spoil, dtype="float16", checkpoint_interval=4, eval_interval=6)
    _, capsule = loss_and_capsule(message)
    out = Path(cfg.out_dir)
    assert capsule == out / "crash_00000005"
    loss, where = replayed(capsys, capsule)
    assert math.isnan(loss)
    assert re.fullmatch(r"transformer\.h\.0\.mlp\S+ \(output\)", where)
    assert f"First wrong: {where}. " in message
    loss, where = replayed(capsys, capsule, "--dtype=float32")
    assert math.isfinite(loss)
    assert where.startswith("nothing")
    assert [p.name for p in checkpoint.candidates(out)] == ["step_00000004"]
    model, _ = restore.load_model(str(out))
    assert all(p.isfinite().all() for p in model.parameters())
    train.train(replace(cfg, resume=True))  # and the run can go on from before it
    assert restore.newest(out).name == "step_00000006"
    assert capsule.is_dir()


def test_replaying_draws_the_same_dropout_and_needs_no_data(crash, capsys, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    message = crash(nan_in_a_gradient, data_dir=str(tmp_path / "data"))
    assert "First wrong: transformer.ln_f.weight (gradient)" in message
    shutil.rmtree(tmp_path / "data")
    loss, capsule = loss_and_capsule(message)
    again, where = replayed(capsys, capsule)
    assert again.hex() == loss.hex()
    assert where.startswith("nothing")


def test_other_settings_may_be_tried(crash, capsys):
    """Cut into other micro-batches, the step is the same (without dropout, whose draws follow them)."""
    loss, capsule = loss_and_capsule(crash(nan_in_a_gradient, dropout=0.0))
    for flags in (["--batch_size=1"], ["--batch_size=8", "--attention=naive"], ["--parallel=fsdp"]):
        assert replayed(capsys, capsule, *flags)[0] == pytest.approx(loss, rel=1e-6)
    for flag, message in (("--dropout=2", "dropout=2"), ("--tokens_per_step=512", "capsule"), ("--n_layer=3", "missing")):
        assert message in error_of(lambda flag=flag: train.main([f"--replay={capsule}", flag]))


def crash_of_two(cfg: Config) -> str:
    """The message of a run in which a gradient is bad in process 1 alone."""
    plain = train.train_step

    def train_step(run, step):
        if step == 4 and run.world.rank == 1:
            run.model.transformer.h[0].mlp.register_forward_hook(lambda _, __, out: bad_gradient(out))
        return plain(run, step)

    train.train_step = train_step
    return error_of(lambda: train.train(cfg))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp"])
def test_the_process_in_which_it_went_wrong_is_named_and_one_replays_the_step_of_two(cfg, tmp_path, capsys, engine):
    """With the loss of all their shares."""
    cfg = replace(cfg, dropout=0.0, parallel=engine, eval_interval=6)
    message, other = ranks.run(2, tmp_path / "ranks", crash_of_two, cfg)
    assert other == message
    (said,) = re.findall(r"First wrong: (.*?)\. To run", message)
    # under fsdp a block's gradients are exchanged before they can be seen: better no process than the wrong one
    where = "" if engine == "fsdp" else " in process 1"
    assert re.fullmatch(rf"transformer\.h\.0\.\S+ \(gradient\){where}", said)
    loss, capsule = loss_and_capsule(message)
    assert replayed(capsys, capsule)[0] == pytest.approx(loss, rel=1e-6)


def test_a_capsule_that_cannot_be_written_does_not_hide_what_happened(crash, monkeypatch):
    """Training went wrong and the disk is full: both are said."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    plain = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda p, t: full() if "crash_" in str(p) else plain(p, t))
    message = crash(poison)
    assert "No space left on device" in message
    assert "step 5: the loss is not finite" in message


# ---- what is no capsule -------------------------------------------------------------------------------------------------


def test_other_folders_and_forged_capsules_are_refused_in_one_line(cfg, crash, tmp_path):
    """A forged one is whole by its manifest, but its tensors are no batch."""
    _, capsule = loss_and_capsule(crash(poison, checkpoint_interval=4))

    def refused(folder: Path, message: str) -> None:
        said = error_of(lambda: train.main(["--replay", str(folder)]))
        assert message in said
        assert str(folder) in said

    refused(restore.newest(Path(cfg.out_dir)), "is not a crash capsule: use the folder")
    refused(tmp_path / "nowhere", "no readable manifest")
    refused(capsule / "config.json", "no readable manifest")
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
        refused(capsule, "batch.safetensors: ")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    refused(capsule, "batch.safetensors is damaged")


def test_a_capsule_never_leads_to_running_a_file(crash, capsys, tmp_path):
    """Its settings may name a config file, relative, absolute or inside the capsule, wherever a setting names something."""
    loss, capsule = loss_and_capsule(crash(nan_in_a_gradient))
    (capsule / "config.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    for name in (str(capsule / "config.py"), os.path.relpath(capsule / "config.py"), "config.py"):
        values = json.loads((capsule / "config.json").read_text())
        values |= dict(init_from=name, data_dir=name, curve=name, resume="auto")
        (capsule / "config.json").write_text(json.dumps(values))
        seal(capsule)
        assert replayed(capsys, capsule)[0] == loss
    assert not (tmp_path / "ran").exists()
