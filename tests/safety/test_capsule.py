"""capsule.py: what stands out is found and dealt with as asked, a number that is not finite is traced to its module, and the
step it arose in can be run again.
"""

import functools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safety.guards import Outliers, TrainingStopped

import train
from base.errors import UserError
from configurator import Config
from engine import checkpoint, restore
from engine.run import Run, build
from safety import capsule

pytestmark = pytest.mark.usefixtures("own_signals")


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    """The tiny run, with dropout, so that random numbers matter, and accumulation."""
    return Config(**tiny_run | dict(batch_size=2), out_dir=str(tmp_path / "run"), dropout=0.1)


# ---- what stands out ----------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(0.5, 20.0, width=32),
    st.just(3.0),
    st.sampled_from([math.nan, math.inf]),
    st.floats(-(2.0**99), 2.0**99, width=32),
)


def judged(losses: list[float], z: float, window: int) -> list[float | None]:
    """By numpy: the score of each number against the `window` finite ones before it, None if there are not so many."""
    found = []
    for i, value in enumerate(losses):
        before = np.array([v for v in losses[:i] if math.isfinite(v)][-window:], dtype=np.longdouble)
        if len(before) < window or not math.isfinite(value):
            found.append(None)
            continue
        spread = max(before.std(), 1e-3 * abs(before.mean()), np.longdouble(1e-12))
        found.append(float((value - before.mean()) / spread))
    return found


@given(values=st.lists(NUMBERS, max_size=40), z=st.sampled_from([0.5, 2.0, 8.0]), window=st.integers(2, 7))
@settings(max_examples=150)
def test_an_outlier_is_what_numpy_says_it_is(values, z, window):
    found = Outliers(Config(outlier_z=z, outlier_window=window))
    flagged = 0
    for value, score in zip(values, judged(values, z, window), strict=True):
        said = found.judge(loss=value, gradient_norm=1.0)
        if score is not None and abs(score - z) < 1e-9 * max(1.0, abs(score)):
            return  # too near to tell apart
        assert (said is not None) == (score is not None and score > z)
        flagged += said is not None
        assert found.count == flagged
        if said:
            assert re.fullmatch(rf"loss \S+ is \S+ standard deviations above the {window} steps before \(\S+\)", said)


def test_nothing_stands_out_where_nobody_looks():
    found = Outliers(Config(outlier_z=0.0, outlier_window=2))
    assert [found.judge(loss=v) for v in (1.0, 1.0, 1.0, 1e9)] == [None] * 4


def test_a_drop_is_no_outlier_and_a_new_level_becomes_normal():
    found = Outliers(Config(outlier_z=4.0, outlier_window=5))
    said = [found.judge(loss=v) for v in [3.0, 3.1] * 5 + [0.1] + [3.0, 3.1] * 5 + [9.0] * 8]
    assert [i for i, s in enumerate(said) if s] == [21]
    assert "loss 9" in said[21]


def test_either_number_is_judged_by_its_own_past():
    found = Outliers(Config(outlier_z=5.0, outlier_window=4))
    for i in range(4):
        assert found.judge(loss=3.0 + 0.1 * (i % 2), gradient_norm=0.5 + 0.1 * (i % 2)) is None
    assert found.judge(loss=3.05, gradient_norm=3.05).startswith("gradient_norm 3.05")
    assert found.judge(loss=9.0, gradient_norm=0.5).startswith("loss 9")
    assert found.count == 2


@given(
    values=st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30),
    cut=st.integers(0, 30),
    windows=st.sampled_from([(5, 5), (6, 3), (3, 6)]),
)
def test_a_resumed_run_judges_as_if_it_had_not_stopped(values, cut, windows):
    """Through the JSON of a checkpoint; and with a smaller window, as one that had that window from the start."""
    before, after = windows
    first = Outliers(Config(outlier_z=2.0, outlier_window=before))
    whole = Outliers(Config(outlier_z=2.0, outlier_window=min(windows)))
    for a, b in values[:cut]:
        first.judge(loss=a, gradient_norm=b)
        whole.judge(loss=a, gradient_norm=b)
    second = Outliers(Config(outlier_z=2.0, outlier_window=after))
    second.load(json.loads(json.dumps(first.state())))
    assert second.count == first.count
    if after > before:
        return  # with a larger one it has to see more steps first
    for a, b in values[cut:]:
        assert second.judge(loss=a, gradient_norm=b) == whole.judge(loss=a, gradient_norm=b)


def test_the_window_travels_with_the_run(cfg):
    """Stopped and resumed, its checkpoint holds what it would have held."""
    train.train(cfg)
    halves = replace(cfg, out_dir=cfg.out_dir + "_2")
    train.train(replace(halves, max_steps=3, schedule="constant"))
    train.train(replace(halves, resume=True))
    kept = []
    for c in (cfg, halves):
        kept.append(json.loads((restore.newest(Path(c.out_dir)) / "training.json").read_text())["outliers"])
    assert [len(k["before"]["loss"]) for k in kept] == [6, 6]
    assert kept[0]["before"]["loss"][:2] == kept[1]["before"]["loss"][:2]  # the schedules differ from the third step on


# ---- what is done about it ----------------------------------------------------------------------------------------------


def state(run: Run) -> dict[str, torch.Tensor]:
    weights, moments = checkpoint.state_tensors(run.model, run.optimizer)
    return {n: t.clone() for n, t in (weights | moments).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def with_an_outlier(cfg: Config, at: int = 4) -> Run:
    """A run in whose step number `at` (0, 1, …) the gradients are a thousand times too large."""
    run = build(replace(cfg, outlier_window=3))
    run.step = -1
    plain = run.read
    run.read = lambda step, *args, **how: setattr(run, "step", step) or plain(step, *args, **how)
    run.model.lm_head.weight.register_hook(lambda g: g * (1000.0 if run.step == at else 1.0))
    return run


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", ["continue", "skip", "stop"])
def test_an_outlier_is_dealt_with_as_asked(cfg, policy, dtype):
    run = with_an_outlier(replace(cfg, on_outlier=policy, dtype=dtype, prefetch=False))
    for step in range(4):
        train.train_step(run, step)
        assert run.found is None
    before = state(run)
    if policy == "stop":
        with pytest.raises(
            TrainingStopped, match=r"step 5: gradient_norm .* \(on_outlier=stop\); the parameters are those before"
        ):
            train.train_step(run, 4)
    else:
        train.train_step(run, 4)
        assert run.found.startswith("gradient_norm ")
    assert run.outliers.count == 1
    assert equal(state(run), before) == (policy != "continue")
    assert all(p.grad is None for p in run.model.parameters())
    if policy != "stop":
        for step in (5, 6):
            train.train_step(run, step)
            assert run.found is None
        assert not equal(state(run), before)
        assert run.outliers.count == 1
    run.close()


@pytest.mark.parametrize("engine", ["fused", "looped"])
def test_a_skipped_step_is_one_that_never_was(cfg, engine):
    """Its gradients were clipped, and nothing of that reaches the next step, whose are not."""
    cfg = replace(cfg, on_outlier="skip", dropout=0.0, grad_clip=10.0, fused_adamw=engine == "fused", prefetch=False)
    found = []
    for steps in ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 5, 6)):
        run = with_an_outlier(cfg)
        norms = [train.train_step(run, step).grad_norm for step in steps]
        assert [n > 10.0 for n in norms] == [step == 4 for step in steps]
        found.append(state(run))
        run.close()
    assert equal(*found)


def spoiled(monkeypatch, spoil, at: int) -> None:
    """Before step `at` (1, 2, …) of training, spoil(run) happens."""
    plain = train.train_step

    def train_step(run, number):
        if number == at - 1:
            with torch.no_grad():
                spoil(run)
        return plain(run, number)

    monkeypatch.setattr(train, "train_step", train_step)


def louder(run: Run) -> None:
    """The loss jumps, and stays finite."""
    run.model.transformer.ln_f.weight.mul_(50.0)


@pytest.mark.parametrize("policy", ["continue", "skip"])
def test_an_outlier_is_flagged_counted_and_logged(cfg, monkeypatch, capsys, policy):
    spoiled(monkeypatch, louder, 5)
    train.train(replace(cfg, outlier_window=3, on_outlier=policy))
    found = [json.loads(line) for line in (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()]
    (event,) = [r for r in found if r.get("event") == "outlier" and r["step_done"] == 5]
    assert event["on_outlier"] == policy
    assert "standard deviations above the 3 steps before" in event["what"]
    assert re.search(rf"step +5: .* standard deviations above .*; on_outlier={policy}; 1 so far", capsys.readouterr().out)
    assert max(r["step"] for r in found if "loss" in r) == 6


# ---- where it went wrong ------------------------------------------------------------------------------------------------

MODULES = [
    "transformer.wte",
    "transformer.wpe",
    "transformer.h.0.ln_1",
    "transformer.h.0.attn.c_attn",
    "transformer.h.1.mlp.c_proj",
    "transformer.ln_f",
    "lm_head",
]
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
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_first_module_with_a_bad_output_is_named(cfg, quick_compiler, value, way):
    cfg = replace(cfg, tie_weights=False, **way)
    run = build(cfg)
    train.train_step(run, 0)
    token = run.read(1, 0)[0][0, 0]
    for name in MODULES:
        weight = run.model.get_submodule(name).weight
        row = int(token) if name == "transformer.wte" else 0
        spot = weight.data[row] if weight.dim() == 2 else weight.data[:1]
        good = spot.clone()
        spot.fill_(value)
        with pytest.raises(TrainingStopped):
            train.train_step(run, 1)
        before = state(run)
        assert capsule.first_nonfinite_module(run, 1) == f"{name} (output)"
        for a, b in zip(state(run).values(), before.values(), strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        assert all(p.grad is None for p in run.model.parameters())
        spot.copy_(good)
    assert capsule.first_nonfinite_module(run, 1).startswith("nothing")
    assert math.isfinite(train.train_step(run, 1).loss)  # no hook is left, and compiled code runs again
    run.close()


@pytest.mark.parametrize("way", COMPILED, ids=lambda w: w.get("compile_scope", "eager"))
def test_the_first_gradient_that_is_bad_is_named(cfg, quick_compiler, way):
    """Backward goes from the head down: where gradients of activations turn bad, all parameters below are bad as well."""
    run = build(replace(cfg, **way))
    train.train_step(run, 0)
    for name in ("transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"):
        hook = run.model.get_parameter(name).register_hook(lambda g: g * math.nan)
        assert capsule.first_nonfinite_module(run, 1) == f"{name} (gradient)"
        hook.remove()

    def spoil(_, __, output):
        output.register_hook(lambda g: g * math.inf)

    hook = run.model.transformer.h[1].attn.register_forward_hook(spoil)
    assert re.fullmatch(r"transformer\.h\.1\.attn\S* \(gradient.*\)", capsule.first_nonfinite_module(run, 1))
    hook.remove()
    assert capsule.first_nonfinite_module(run, 1).startswith("nothing")
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
            spoiled(patched, spoil, 5)
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


def poison(run: Run) -> None:
    run.model.transformer.h[1].mlp.c_fc.weight[3, 3] = math.inf


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


def test_a_bad_gradient_is_found_as_well(cfg, crash):
    def spoil(run):
        run.model.transformer.ln_f.weight.register_hook(lambda g: g * math.nan)

    message, _ = crash(spoil)
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


def test_replaying_draws_the_same_dropout(cfg, crash, capsys, as_stopped):
    """A step that was stopped for its size, not for what cannot be compared: the same loss, in hex."""
    _, capsule = crash(louder, **vars(stopping(cfg)))
    loss, where, _ = replayed(capsys, capsule)
    assert loss.hex() == as_stopped[-1].hex()
    assert where.startswith("nothing")


def test_replaying_needs_no_data(cfg, crash, capsys, as_stopped, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    _, capsule = crash(louder, **vars(replace(stopping(cfg), data_dir=str(tmp_path / "data"))))
    shutil.rmtree(tmp_path / "data")
    assert replayed(capsys, capsule)[0].hex() == as_stopped[-1].hex()


def test_other_settings_may_be_tried(cfg, crash, capsys, as_stopped):
    """Cut into other micro-batches, the step is the same (without dropout, whose draws follow them)."""
    _, capsule = crash(louder, **vars(replace(stopping(cfg), dropout=0.0)))
    for flags in (["--batch_size=1"], ["--batch_size=8", "--attention=naive"], ["--parallel=fsdp"]):
        assert replayed(capsys, capsule, *flags)[0] == pytest.approx(as_stopped[-1], rel=1e-6)
    for flag, message in (
        ("--dropout=2", "dropout=2"),
        ("--tokens_per_step=512", "capsule"),
        ("--n_layer=3", "missing"),
    ):
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


@pytest.mark.parametrize("engine", ["ddp", "zero1", "fsdp"])
def test_the_capsule_of_two_processes_is_replayed_by_one(cfg, tmp_path, capsys, engine):
    """The loss of all their shares; also written out over what the capsule holds."""
    cfg = replace(stopping(cfg), dropout=0.0, parallel=engine, eval_interval=6)
    (message, loss), other = ranks.run(2, tmp_path / "ranks", crash_of_two, cfg, False)
    assert other == (message, loss)
    capsule = Path(cfg.out_dir) / "crash_00000005"
    assert f"--replay {capsule} " in message
    assert replayed(capsys, capsule)[0] == pytest.approx(loss, rel=1e-6)
    read, crash, recorded = capsule.read_capsule(capsule)
    assert (crash["processes"], crash["micro_batch"], crash["accumulation"]) == (2, 2, 2)
    model = train.GPT(read)
    restore.load_weights(capsule, model)
    x, y = recorded.batch(0, 0, 8, 1, 0, 1)
    assert F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() == pytest.approx(loss, rel=1e-6)


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
    spoiled(monkeypatch, poison, 5)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    plain = checkpoint.write_safetensors
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda p, t: full() if "crash_" in str(p) else plain(p, t))
    with pytest.raises(UserError) as e:
        train.train(cfg)
    assert "No space left on device" in str(e.value)
    assert "step 5: the loss is not finite" in str(e.value)
    assert "\n" not in str(e.value)


@given(micro=st.sampled_from([1, 2, 4]), world=st.sampled_from([1, 2]), other=st.sampled_from([1, 2, 4]))
@settings(max_examples=12)
def test_a_recorded_step_is_dealt_out_like_the_data_it_came_from(micro, world, other):
    class Stream:
        def __len__(self):
            return 10_000

        def read(self, start, count):
            return np.arange(start, start + count)

    batches = train.data.TrainBatches(Stream(), 16, 0, "shuffled")
    accumulation = 8 // (micro * world)
    cut = [[batches.batch(7, m, micro, accumulation, r, world) for r in range(world)] for m in range(accumulation)]
    inputs, targets = (torch.stack([torch.stack([part[i] for part in row]) for row in cut]) for i in (0, 1))
    recorded = capsule.ReplayBatch(inputs, targets)
    for ranks_now in (1, 2):
        accumulation = 8 // (other * ranks_now)
        for m in range(accumulation):
            for r in range(ranks_now):
                mine, theirs = (b.batch(7, m, other, accumulation, r, ranks_now) for b in (recorded, batches))
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


# ---- what is no capsule -------------------------------------------------------------------------------------------------


def test_other_folders_are_refused_in_one_line(cfg, crash, tmp_path):
    _, capsule = crash(poison, checkpoint_interval=4)
    damaged = tmp_path / "crash_00000009"
    shutil.copytree(capsule, damaged)
    content = bytearray((damaged / "batch.safetensors").read_bytes())
    content[-5] ^= 4
    (damaged / "batch.safetensors").write_bytes(content)
    (tmp_path / "empty").mkdir()
    wrong = {
        restore.newest(Path(cfg.out_dir)): "is no crash capsule: type the folder",
        damaged: r"batch\.safetensors is damaged",
        tmp_path / "empty": "no readable manifest",
        tmp_path / "nowhere": "no readable manifest",
        Path(cfg.out_dir): "no readable manifest",
        capsule / "config.json": "no readable manifest",
    }
    for folder, message in wrong.items():
        with pytest.raises(UserError, match=message) as e:
            train.main(["--replay", str(folder)])
        assert "\n" not in str(e.value)
        assert str(folder) in str(e.value)
    with pytest.raises(UserError):
        train.main(["--replay"])


def test_a_forged_capsule_is_refused(cfg, crash):
    """Whole by its manifest, but with tensors that are no batch."""
    import hashlib

    import safetensors.torch

    _, capsule = crash(poison)
    path, manifest = capsule / "batch.safetensors", capsule / "manifest.json"
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
        values = json.loads(manifest.read_text())
        content = path.read_bytes()
        values["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(values))
        restore.verify(capsule)
        with pytest.raises(UserError) as e:
            train.main(["--replay", str(capsule)])
        assert "\n" not in str(e.value)
        assert "batch.safetensors" in str(e.value)
