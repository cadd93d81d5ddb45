"""parallel.py: however many processes there are and whatever they share out, they train what one process would have trained,
find out when they are not alike, and end when one of them is stuck.
"""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import train
from base import errors
from base.errors import UserError
from configurator import Config
from engine import checkpoint, effective, machine, parallel, restore
from engine.run import Run, build
from safety import capsule, prove, watchdog

CPU = torch.device("cpu")
ENGINES = ["ddp", "zero1", "fsdp"]


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    """The tiny run, without dropout: its 18 characters are no multiple of 4, so shares are uneven."""
    changes = dict(learning_rate=1e-3, out_dir=str(tmp_path / "run"), fused_adamw=True)
    return Config(**tiny_run | changes)


# ---- one training run, however it is shared out -------------------------------------------------------------------------


def state(run: Run) -> dict[str, torch.Tensor]:
    """Weights and moments, whole: under zero1 the moments that this process keeps."""
    weights, moments = checkpoint.state_tensors(run.model, run.optimizer)
    return {name: capsule.full(t).clone() for name, t in (weights | moments).items()}


def merged(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One state from those of all processes; what several have must be equal."""
    whole = {}
    for found in states:
        for name, t in found.items():
            assert torch.equal(whole.setdefault(name, t), t), name
    return whole


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def learn(cfg: Config, steps: int = 5) -> dict:
    """A few steps: their (loss, gradient norm), what is on after the first, what is wrong, and the state after the last."""
    run = build(cfg)
    numbers = [train.train_step(run, 0)]
    on = effective.effective(run)
    wrong = effective.mismatches(run, on)
    numbers += [train.train_step(run, step) for step in range(1, steps)]
    found = dict(numbers=numbers, on=on, wrong=wrong, state=state(run))
    run.close()
    return found


VARIANTS = {
    "clipped and accumulated": dict(grad_clip=0.05, batch_size=1),
    "untied, padded, unclipped": dict(grad_clip=0.0, tie_weights=False, vocab_multiple=64),
    "no biases, looped AdamW": dict(bias=False, fused_adamw=False, n_layer=3),
}


@pytest.mark.parametrize(("world", "variant"), [*((2, v) for v in VARIANTS), (4, "clipped and accumulated")])
def test_all_engines_train_what_one_process_trains(cfg, tmp_path, world, variant):
    """Losses, gradient norms and every parameter after 5 steps."""
    cfg = replace(cfg, **VARIANTS[variant])
    alone = learn(cfg)
    if cfg.grad_clip:
        assert all(norm > cfg.grad_clip for _, norm in alone["numbers"])
    for engine in ENGINES:
        found = ranks.run(world, tmp_path / engine, learn, replace(cfg, parallel=engine, processes=world))
        whole = merged([f["state"] for f in found])
        assert whole.keys() == alone["state"].keys()
        for f in found:
            assert f["wrong"] == []
            assert f["on"]["parallel"] == engine
            assert f["on"]["processes"] == world
            assert f["numbers"] == found[0]["numbers"]
            for a, b in zip(f["numbers"], alone["numbers"], strict=True):
                assert a == pytest.approx(b, rel=1e-5)
        for name in (n for n, _ in train.GPT(cfg).named_parameters()):
            torch.testing.assert_close(whole[name], alone["state"][name], rtol=0, atol=1e-5, msg=f"{engine}: {name}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_engines_train_in_low_precision(cfg, tmp_path, dtype):
    alone = learn(replace(cfg, dtype=dtype))
    for engine in ENGINES[: 3 if dtype == "bfloat16" else 2]:
        for f in ranks.run(2, tmp_path / engine, learn, replace(cfg, parallel=engine, dtype=dtype)):
            assert f["wrong"] == []
            for a, b in zip(f["numbers"], alone["numbers"], strict=True):
                assert a == pytest.approx(b, rel=2e-2)


def test_sharding_in_float16_is_refused(cfg):
    """The scaler would look for overflows in a process's own share."""
    with pytest.raises(UserError, match="--dtype=bfloat16"):
        build(replace(cfg, parallel="fsdp", dtype="float16"))


@pytest.mark.parametrize("engine", ENGINES)
def test_alone_every_engine_is_the_plain_one(cfg, engine):
    assert equal(learn(replace(cfg, parallel=engine))["state"], learn(cfg)["state"])


@pytest.mark.skipif(machine.why_no_compile(CPU) is not None, reason="no C++ compiler here")
def test_a_sharded_model_is_compiled_block_by_block(cfg, tmp_path):
    alone = learn(cfg, 3)
    for f in ranks.run(2, tmp_path / "ranks", learn, replace(cfg, parallel="fsdp", compile=True), 3, timeout=120):
        assert f["wrong"] == []
        assert (f["on"]["compile"], f["on"]["compile_scope"]) == (True, "block")
        for a, b in zip(f["numbers"], alone["numbers"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_each_process_keeps_its_share_and_no_more(cfg, tmp_path, world):
    """Parameters, gradients and two moments, 4 bytes each: all of them, half of them and a share of half, a share of all."""
    cfg = replace(cfg, n_embd=128)
    full = 16 * sum(p.numel() for p in train.GPT(cfg).parameters()) / 2**20
    most = math.ceil(cfg.vocab_size / world) * world / cfg.vocab_size  # of rows that do not divide
    for engine in ENGINES:
        found = ranks.run(world, tmp_path / engine, learn, replace(cfg, parallel=engine), 1)
        held = found[0]["on"]["state_mib"]
        assert [f["on"]["state_mib"] for f in found] == [held] * world
        if engine == "ddp":
            assert held == pytest.approx([full] * world, rel=0.01)
        elif engine == "zero1":
            assert sum(held) == pytest.approx(full * (world + 1) / 2, rel=0.01)
            assert all(full / 2 < h < 0.9 * full for h in held)
        else:
            assert sum(held) == pytest.approx(full, rel=0.01)
            assert all(h < 1.02 * most * full / world for h in held)


def whole_during(cfg: Config) -> tuple[list[bool], list[bool]]:
    """(which blocks are whole while the second computes, which after the step)."""
    run = build(cfg)
    blocks, during = run.model.transformer.h, []

    def whole() -> list[bool]:
        return [not isinstance(block.mlp.c_fc.weight, DTensor) for block in blocks]

    blocks[1].attn.register_forward_hook(lambda *_: during.append(whole()))
    train.train_step(run, 0)
    run.close()
    return during[0], whole()


def test_a_sharded_models_blocks_are_whole_one_at_a_time(cfg, tmp_path):
    cfg = replace(cfg, parallel="fsdp", n_layer=3)
    assert ranks.run(2, tmp_path / "ranks", whole_during, cfg) == [([False, True, False], [False] * 3)] * 2


def validate(cfg: Config) -> float:
    run = build(cfg)
    found = train.validation(run)["loss"]
    run.close()
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_validation_may_end_in_the_middle_of_a_round(cfg, tmp_path, engine):
    """9 rows of 4: with 2 processes, the second has none in the last round, though sharded parameters need its presence."""
    cfg = replace(cfg, eval_tokens=9 * 32, parallel=engine)
    assert ranks.run(2, tmp_path / "ranks", validate, cfg, timeout=30) == pytest.approx([validate(cfg)] * 2, rel=1e-6)


# ---- what is asked for is what is on ------------------------------------------------------------------------------------


def sabotaged(cfg: Config, how: str) -> tuple[str, list[str]]:
    """(engine found, what is wrong) of a run whose engine is not what was asked for."""
    if how == "replicated":
        parallel.shard = lambda *_: None
        parallel.wrap = lambda model, *_: DDP(model)
    elif how == "looped":
        parallel.optimizer = lambda groups, engine, **how: torch.optim.AdamW(groups, **how)
    else:
        parallel.wrap = lambda model, *_: model
    found = learn(cfg, 1)
    return found["on"]["parallel"], found["wrong"]


@pytest.mark.parametrize(("engine", "how"), [("fsdp", "replicated"), ("zero1", "looped"), ("ddp", "bare"), ("zero1", "bare")])
def test_an_engine_that_does_nothing_is_found(cfg, tmp_path, engine, how):
    """Of the bare model, gradients are not even averaged."""
    for on, wrong in ranks.run(2, tmp_path / "ranks", sabotaged, replace(cfg, parallel=engine), how):
        assert on != engine
        assert [w for w in wrong if w.startswith(f"parallel={engine!r} was asked for")], wrong


# ---- saved by one layout, resumed by another ----------------------------------------------------------------------------

LAYOUTS = [("ddp", 1), ("zero1", 2), ("fsdp", 2), ("fsdp", 4)]


def save(cfg: Config) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """(the state after two steps, which is saved, and the next two steps, which run meanwhile)."""
    run = build(cfg)
    out = Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for step in range(2):
        train.train_step(run, step)
    before = state(run)
    saver = checkpoint.Saver(out, run.world, parallel.shares_state(run.train_model, run.optimizer), background=True)
    extra = dict.fromkeys(("loss", "val_loss", "best_step", "best_val_loss"))
    saver.save(train.snapshot(run, 2, extra), 1, None)
    numbers = [train.train_step(run, step) for step in (2, 3)]
    saver.wait()
    saver.close()
    parallel.barrier()
    run.close()
    return before, numbers


def go_on(cfg: Config, folders: list[Path]) -> list[tuple[dict[str, torch.Tensor], list[tuple[float, float]]]]:
    """(the state as loaded, the next two steps) from each of some runs."""
    run = build(cfg)
    found = []
    for out in folders:
        assert train.resume(run, out)["step"] == 2
        found.append((state(run), [train.train_step(run, step) for step in (2, 3)]))
    run.close()
    return found


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory) -> dict[tuple[str, int], tuple]:
    """{layout: (run's folder, the state in it, the two steps after it)}."""
    folder, found = tmp_path_factory.mktemp("layouts"), {}
    for engine, world in LAYOUTS:
        out = folder / f"{engine}_{world}"
        cfg = Config(**tiny_run | dict(learning_rate=1e-3, parallel=engine, out_dir=str(out)))
        parts = ranks.run(world, folder / f"{out.name}_ranks", save, cfg) if world > 1 else [save(cfg)]
        found[engine, world] = out, merged([p[0] for p in parts]), parts[0][1]
    return found


@pytest.mark.parametrize(("engine", "world"), LAYOUTS)
def test_any_layout_goes_on_from_any_other(cfg, saved, tmp_path, engine, world):
    """Weights, moments and step counters bit for bit; then the same losses, within the rounding of other sums."""
    cfg, folders = replace(cfg, parallel=engine), [out for out, _, _ in saved.values()]
    parts = ranks.run(world, tmp_path / "ranks", go_on, cfg, folders) if world > 1 else [go_on(cfg, folders)]
    for number, (_, expected, numbers) in enumerate(saved.values()):
        loaded = merged([p[number][0] for p in parts])
        assert len(expected) == 4 * len(list(train.GPT(cfg).named_parameters()))
        assert equal(loaded, expected)
        for a, b in zip(parts[0][number][1], numbers, strict=True):
            assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_a_model_to_sample_from(saved, layout):
    out, expected, _ = saved[layout]
    model, tokenizer = restore.load_model(str(out))
    assert equal({n: p.detach() for n, p in model.named_parameters()}, {n: expected[n] for n, _ in model.named_parameters()})
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.cfg.tie_weights
    assert tokenizer.vocab_size == model.cfg.vocab_size
    assert model(torch.arange(8)[None]).isfinite().all()


@pytest.mark.parametrize("layout", [("zero1", 2), ("fsdp", 4)])
def test_a_share_that_is_missing_or_damaged_is_refused(saved, layout, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(saved[layout][0], out)
    folder = restore.newest(out)
    shares = sorted(folder.glob("shard-*.safetensors"))
    assert len(shares) >= 2
    content = shares[1].read_bytes()
    for change in (lambda p: p.unlink(), lambda p: p.write_bytes(content[:-1] + b"x"), lambda p: p.write_bytes(content[:99])):
        change(shares[1])
        with pytest.raises(UserError, match=shares[1].name):
            restore.verify(folder)
    shares[1].write_bytes(content)
    restore.verify(folder)


@pytest.mark.parametrize("layout", [("zero1", 2), ("fsdp", 4)])
def test_shares_that_do_not_make_a_whole_are_refused(saved, layout, tmp_path):
    """Even where the manifest was made to fit: nothing is left as it happened to be. Shares are those of no other model."""
    out = tmp_path / "run"
    shutil.copytree(saved[layout][0], out)
    folder = restore.newest(out)
    shares = sorted(folder.glob("shard-*.safetensors"))
    cfg = restore.read_config(folder)
    content = [p.read_bytes() for p in shares]
    tensors = safetensors.torch.load_file(shares[1])
    with safetensors.safe_open(shares[1], "pt") as f:
        metadata = f.metadata()

    def seal():
        manifest = json.loads((folder / "manifest.json").read_text())
        there = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}
        manifest["files"] = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in there.items()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        restore.verify(folder)

    def rewritten(change):
        changed, described = dict(tensors), dict(metadata or {})
        change(changed, described)
        safetensors.torch.save_file(changed, shares[1], described)

    name = next(n for n in tensors if n.startswith("exp_avg.") and tensors[n].dim() == 2)
    kind = next(iter(metadata))
    forgeries = [
        lambda: shares[1].unlink(),
        lambda: rewritten(lambda t, m: t.pop(name)),
        lambda: rewritten(lambda t, m: t.update({name: t[name][:-1].clone()})),
        lambda: rewritten(lambda t, m: t.update({name: t[name].long()})),
        lambda: rewritten(lambda t, m: t.update({"exp_avg.of.nothing": t[name].clone()})),
        lambda: rewritten(lambda t, m: m.clear()),
        lambda: rewritten(lambda t, m: m.update({kind: "{}"})),
        lambda: rewritten(lambda t, m: m.update({kind: "[" * 9})),
        lambda: rewritten(lambda t, m: m.update({kind: m[kind].replace("0", "1")})),
        lambda: rewritten(lambda t, m: m.update({kind: m[kind].replace("[", "[-7, ")})),
        lambda: shares[1].write_bytes(pickle.dumps(tensors)),
        lambda: shares[1].write_bytes(shares[0].read_bytes()),
    ]
    run = build(replace(cfg, parallel="ddp"))

    def load():
        restore.load_weights(folder, run.model)
        restore.load_training(folder, run.model, run.optimizer, 0, CPU)

    taken = []
    for number, forge in enumerate(forgeries):
        forge()
        seal()
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(9.0)
        said = ""
        try:
            load()
        except UserError as e:
            said = str(e)
        if not said and not equal(state(run), saved[layout][1]):  # else it was the same in other words
            taken.append(number)
        assert not said or str(folder) in said or shares[1].name in said
        assert "\n" not in said
        for path, whole in zip(shares, content, strict=True):
            path.write_bytes(whole)
    assert not taken
    seal()
    load()
    assert equal(state(run), saved[layout][1])


def full_disk(cfg: Config, where: str, rank: int) -> tuple[str, list[str], list[str]]:
    """A run whose second checkpoint meets a full disk: (what it raised, its checkpoints, what else lies there)."""
    plain_write, plain_mkdir = dcp.HuggingFaceStorageWriter.write_data, Path.mkdir
    mine = int(os.environ["RANK"]) == rank

    def full(path: object):
        if mine and "step_00000004" in str(path):
            raise OSError(28, "No space left on device")

    def write_data(self, *args):
        full(self.path)
        return plain_write(self, *args)

    def mkdir(self, *args, **how):
        full(self)
        return plain_mkdir(self, *args, **how)

    def write_config(folder, cfg, plain=checkpoint.write_config):
        full(folder)
        plain(folder, cfg)

    if where == "shares":
        dcp.HuggingFaceStorageWriter.write_data = write_data
    elif where == "folder":
        Path.mkdir = mkdir
    else:
        checkpoint.write_config = write_config
    try:
        train.train(cfg)
        raised = ""
    except UserError as e:
        raised = str(e)
    names = sorted(p.name for p in Path(cfg.out_dir).iterdir())
    return raised, [n for n in names if n.startswith("step_")], [n for n in names if n.startswith(".writing")]


@pytest.mark.parametrize("engine", ["zero1", "fsdp"])
@pytest.mark.parametrize(("where", "rank"), [("shares", 1), ("shares", 0), ("folder", 0), ("final", 0)])
def test_shared_saves_survive_a_full_disk(cfg, tmp_path, engine, where, rank):
    """Of any process: the run goes on, says so, and the next save is whole."""
    cfg = replace(cfg, parallel=engine, checkpoint_interval=2, eval_interval=6, keep_checkpoints=3)
    with ranks.started(2, tmp_path / "ranks", full_disk, cfg, where, rank) as found:
        ranks.wait(found, 40)
        assert [r.value for r in found] == [("", ["step_00000002", "step_00000006"], [])] * 2
        said = found[0].stderr + found[1].stderr
    assert "No space left on device" in said
    assert "training goes on" in said
    assert restore.newest(Path(cfg.out_dir)).name == "step_00000006"


def fails_at_the_end(cfg: Config) -> None:
    plain = checkpoint.write_config

    def write_config(folder, cfg):
        if "step_00000006" in folder.name:
            raise OSError(28, "No space left on device")
        plain(folder, cfg)

    checkpoint.write_config = write_config
    errors.entry(lambda _: train.train(cfg))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("why", ["not a run", "No space left on device"])
def test_what_only_the_first_process_finds_ends_all(cfg, tmp_path, engine, why):
    """It says why; the others, which lose it in the middle of an exchange, do not bury that under tracebacks."""
    if why == "not a run":
        Path(cfg.out_dir).mkdir()
        (Path(cfg.out_dir) / "thesis.txt").write_text("years of work")
    with ranks.started(2, tmp_path / "ranks", fails_at_the_end, replace(cfg, parallel=engine)) as found:
        ranks.wait(found, 30)
        assert found[0].status == 2
        assert found[1].status not in (0, None)
        lines = [r.stderr.splitlines() for r in found]
    assert lines[0][-1].startswith("[rank 0] error: ")
    assert why in lines[0][-1]
    assert len(lines[0]) == 1
    assert len(lines[1]) <= 1, lines[1][-1]


# ---- processes that were not started alike ------------------------------------------------------------------------------


def disagree(facts: list[dict]) -> str:
    world = parallel.start(CPU)
    try:
        parallel.check_same_on_all_ranks(world, facts[world.rank])
    except UserError as e:
        return str(e)
    finally:
        parallel.stop()
    return ""


@pytest.mark.parametrize(
    ("odd", "change"),
    [(None, {}), (1, dict(seed=2)), (3, dict(more="x")), (1, dict(out_dir=None)), (3, dict(text="ü")), (1, dict(flag=1.5))],
)
def test_one_that_differs_is_named_by_all(tmp_path, odd, change):
    facts = [dict(seed=1, out_dir="out", flag=True, text="") for _ in range(4)]
    if odd:
        facts[odd] = facts[odd] | change
    said = ranks.run(4, tmp_path / "ranks", disagree, facts)
    assert len(set(said)) == 1
    if odd is None:
        assert said[0] == ""
        return
    ((name, value),) = change.items()
    assert f"{name} is {facts[0].get(name)!r} in process 0 and {value!r} in process {odd}" in said[0]
    assert said[0].count(" in process 0") == 1
    assert "\n" not in said[0]


def start_unlike(cfgs: list[Config], code: list[str]) -> str:
    """What training says; a step would be an error of another kind."""
    rank = int(os.environ["RANK"])
    parallel.code_sha256 = lambda: code[rank]
    train.train_step = None
    try:
        train.train(cfgs[rank])
    except UserError as e:
        return str(e)
    return "nothing"


@pytest.mark.parametrize("what", ["a setting", "data", "code"])
def test_a_run_does_not_begin_unless_all_were_started_alike(cfg, tmp_path, prepared, text, what):
    import prepare_data

    cfgs, code = [cfg, cfg], ["1", "1"]
    if what == "a setting":
        cfgs[1], name = replace(cfg, beta2=0.9), "beta2"
    elif what == "code":
        code[1], name = "2", "code"
    else:  # the same path on another machine, with other data in it
        os.chdir(tmp_path)
        for rank, content in enumerate((text, text[::-1])):
            (tmp_path / "tiny.txt").write_text(content)
            prepare_data.main([str(tmp_path / "tiny.txt"), "--tokenizer=char", f"--data_dir={tmp_path / str(rank)}"])
        cfgs, name = [replace(cfg, data_dir=str(tmp_path / str(r))) for r in (0, 1)], "data"
    said = ranks.run(2, tmp_path / "ranks", start_unlike, cfgs, code)
    assert said[0] == said[1]
    assert "not started alike" in said[0]
    assert f"{name} is " in said[0]
    assert "process 1" in said[0]
    assert "\n" not in said[0]
    assert not Path(cfg.out_dir).exists()


# ---- a process that is stuck --------------------------------------------------------------------------------------------


def halting(cfg: Config, halt: list[int], how: str) -> None:
    """train.py, in which some processes stop in their fourth step."""
    plain, rank, sleep = train.train_step, int(os.environ["RANK"]), time.sleep
    parallel.time.sleep = lambda seconds: sleep(min(seconds, 2.0))  # the time that each has to tell where it stands

    def train_step(run, step):
        if step == 3 and rank in halt:
            if how == "asleep":
                run.batches.batch = lambda *_: sleep(1000)
            else:
                os.kill(os.getpid(), signal.SIGSTOP)
        if step >= 3:
            sleep(0.9)  # else the run is over before anybody is named
        return plain(run, step)

    train.train_step = train_step
    errors.entry(lambda _: train.train(cfg))


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SECONDS = 2.4  # without a step, until a run is taken to be stuck


@pytest.fixture
def impatient(cfg) -> Config:
    return replace(cfg, timeout_minutes=SECONDS / 60, prefetch=False, checkpoint_interval=2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_does_not_answer_is_named(impatient, tmp_path, silent):
    """By another, which ends; once it wakes up, it ends as well. What was saved stays."""
    other = 1 - silent
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [silent], "stopped") as found:
        until(lambda: stopped(found[silent].pid))
        ranks.wait([found[other]], 20)
        assert found[other].status == 2
        (line,) = found[other].stderr.splitlines()
        assert line.startswith(f"[rank {other}] error: nothing has finished for")
        assert re.search(rf"rank {silent} does not answer; rank {other} waits \([a-z ]+ step 3, at [a-z]+\.py:\d+\); ", line)
        assert "type --resume" in line
        os.kill(found[silent].pid, signal.SIGCONT)
        ranks.wait(found, 20)
        assert found[silent].status not in (0, None)
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000003"  # the best so far, by validation


def test_a_process_that_is_stuck_in_python_is_named_with_its_line(impatient, tmp_path):
    """Reading data for ever, say; the other one waits for it at a place of its own."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [1], "asleep") as found:
        ranks.wait(found, 30)
        assert [r.status for r in found] == [2, 2]
        (line,) = (found[0].stderr + found[1].stderr).splitlines()
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    number = next(n for n, text in enumerate(source, 1) if "run.batches.batch = lambda *_: sleep(1000)" in text)
    assert re.search(rf"rank 1 waits \([a-z ]+ step 3, at {Path(__file__).name}:{number}\)", line)
    assert re.search(r"rank 0 waits \([a-z ]+ step 3, at train\.py:\d+\)", line)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_a_run_that_is_suspended_as_a_whole_goes_on_when_it_is_woken(impatient, tmp_path):
    """By a scheduler, or a laptop's lid: nobody is stuck, and the time does not count."""
    with ranks.started(2, tmp_path / "ranks", halting, impatient, [0, 1], "stopped") as found:
        until(lambda: all(stopped(r.pid) for r in found))
        time.sleep(1.6 * SECONDS)
        for r in found:
            os.kill(r.pid, signal.SIGCONT)
        ranks.wait(found, 30)
        assert [r.status for r in found] == [0, 0], found[0].stderr + found[1].stderr
    assert restore.newest(Path(impatient.out_dir)).name == "step_00000006"


def test_a_process_alone_is_not_watched():
    watch = watchdog.Watchdog(parallel.World(), 0.01)
    assert not watch.is_alive()
    time.sleep(0.05)
    watch.beat("anything")
    watch.close()


# ---- replicas that have come apart --------------------------------------------------------------------------------------


def flip(parameter: torch.Tensor, place: int, bit: int) -> None:
    """Change one bit of one number."""
    bits = parameter.detach().view(torch.int32).view(-1)
    bits[place] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)


def flipping(cfg: Config, flips: list[tuple[str, int, int]]) -> list[list[str]]:
    """What is found before, and after each single flip in process 1, which is then undone."""
    run = build(cfg)
    train.train_step(run, 0)
    found, by_name = [parallel.different_replicas(run.model)], dict(run.model.named_parameters())
    for name, place, bit in flips:
        for _ in range(2):
            if run.world.rank == 1:
                flip(by_name[name], place % by_name[name].numel(), bit)
            found.append(parallel.different_replicas(run.model))
    run.close()
    return found


@pytest.mark.parametrize("engine", ["ddp", "zero1"])
def test_a_single_flipped_bit_is_found_and_named(cfg, tmp_path, engine):
    names = [n for n, _ in train.GPT(cfg).named_parameters()]
    flips = [(name, 7919 * i, (5 * i) % 32) for i, name in enumerate(names)] + [(names[0], i, i) for i in range(32)]
    expected = [[]] + [each for name, _, _ in flips for each in ([f"{name} in process 1"], [])]
    assert ranks.run(2, tmp_path / "ranks", flipping, replace(cfg, parallel=engine), flips) == [expected] * 2


def flip_in_a_run(cfg: Config) -> None:
    plain = train.train_step

    def train_step(run, step):
        numbers = plain(run, step)
        if step == 2 and run.world.rank == 1:
            flip(run.model.transformer.ln_f.weight, 3, 20)
        return numbers

    train.train_step = train_step
    errors.entry(lambda _: train.train(cfg))


def test_a_run_whose_replicas_differ_ends_with_the_parameters_name(cfg, tmp_path):
    with ranks.started(2, tmp_path / "ranks", flip_in_a_run, replace(cfg, replica_interval=2, eval_interval=6)) as found:
        ranks.wait(found, 30)
        assert [r.status for r in found] == [2, 2]
        said = found[0].stderr
    # the optimizer's step after the flip leaves no other parameter of process 1 equal
    assert "step 4: the processes no longer hold the same parameters (transformer." in said
    assert " in process 1" in said
    assert said.count("\n") == 1


# ---- small pieces -------------------------------------------------------------------------------------------------------


def test_without_a_group_everything_is_the_identity():
    t = torch.tensor([1.0, 2.0])
    assert parallel.all_reduce_sum(t) is t
    assert parallel.gather(t)[0] is t
    assert (parallel.any_rank(True, CPU), parallel.any_rank(False, CPU)) == (True, False)
    assert parallel.size() == 1
    assert parallel.different_replicas(torch.nn.Linear(2, 2)) == []
    parallel.barrier()
    parallel.stop()
    parallel.check_same_on_all_ranks(parallel.World(), {"a": object()})


def reduce(_: object) -> tuple:
    world = parallel.start(CPU)
    me = torch.tensor([float(world.rank), 1.0])
    found = parallel.all_reduce_sum(me.clone()).tolist(), [t.tolist() for t in parallel.gather(me)]
    flags = [parallel.any_rank(world.rank == n, CPU) for n in range(world.size + 1)]
    parallel.stop()
    return found, flags, world.is_main, parallel.size()


@pytest.mark.parametrize("agent", [True, False])
def test_sums_and_flags_are_the_same_everywhere(tmp_path, agent):
    """Whether torchrun's agent keeps the store in which processes meet or, started by other means, the first of them."""
    found = ranks.run(3, tmp_path / "ranks", reduce, None, agent=agent)
    numbers = ([3.0, 3.0], [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    assert found == [(numbers, [True, True, True, False], rank == 0, 1) for rank in range(3)]


# ---- torchrun's own doings ----------------------------------------------------------------------------------------------


def torchrun(*args: object, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def flags(cfg: Config) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(cfg).items()]


def test_two_machines_train_as_one_machine_with_two_processes(cfg, root, tmp_path):
    """Two agents that know of each other only by an endpoint, as on two nodes."""
    cfg = replace(cfg, eval_interval=6)
    one = replace(cfg, out_dir=str(tmp_path / "one"))
    ranks.run(2, tmp_path / "ranks", train.train, one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    meet = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=run")
    agents = [torchrun(*meet, root / "train.py", *flags(cfg), cwd=root) for _ in range(2)]
    said = [a.communicate(timeout=90) for a in agents]
    assert [a.returncode for a in agents] == [0, 0], said
    losses = [[float.fromhex(v.split()[0]) for v in prove.trajectory(Path(c.out_dir)).values()] for c in (one, cfg)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    ends = [dict(restore.load_model(c.out_dir)[0].named_parameters()) for c in (one, cfg)]
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=0, atol=1e-6)


DIES = """
import os, signal, sys
import configurator, parallel, train

plain = train.train_step

def train_step(run, step):
    if step == 4 and run.world.rank == 1 and parallel.attempt() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(run, step)

train.train_step = train_step
errors.entry(train.main)
"""


def test_torchrun_starts_a_run_anew_whose_process_was_killed(cfg, root, tmp_path):
    """It goes on by itself from its last checkpoint, and ends as if nothing had been."""
    cfg = replace(cfg, dropout=0.1, deterministic=True, checkpoint_interval=2)
    whole = replace(cfg, out_dir=str(tmp_path / "whole"))
    ranks.run(2, tmp_path / "ranks", train.train, whole)
    (tmp_path / "dies.py").write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n{DIES}", encoding="utf-8")
    run = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=1", tmp_path / "dies.py", *flags(cfg), cwd=root)
    out, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert out.count("step      6/6 | loss") == 1
    assert prove.difference(Path(whole.out_dir), Path(cfg.out_dir)) is None
