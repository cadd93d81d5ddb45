"""parallel.py: however many processes there are, they train what one would have trained, or find out that they disagree."""

import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from runs import equal, merged, state
from spoil import spoiled
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import optim
import train
from base import errors
from base.errors import UserError
from configurator import Config
from engine import effective, machine, parallel, restore
from engine.run import Run, build
from model import GPT
from safety import prove

CPU = torch.device("cpu")
KINDS = ["ddp", "zero1", "fsdp"]


@pytest.fixture
def cfg(uneven) -> Config:
    return uneven


# ---- one training run, however it is shared out -------------------------------------------------------------------------


def learn(cfg: Config, steps: int = 5) -> dict:
    """A few steps: (loss, gradient norm) of each, what is on after the last, what is wrong, and the state."""
    run = build(cfg)
    results = [train.train_step(run, step) for step in range(steps)]
    on = effective.effective(run)
    wrong = effective.mismatches(run, on)
    found = dict(numbers=np.array([(r.loss, r.grad_norm) for r in results]), on=on, wrong=wrong, state=state(run))
    run.close()
    return found


VARIANTS = {  # name -> (settings, the kinds, how near the numbers must be; parameters are compared where that is rounding)
    "clipped and accumulated": (dict(grad_clip=0.05, batch_size=1), KINDS, 1e-5),
    "untied, padded, unclipped": (dict(grad_clip=0.0, tie_weights=False, vocab_multiple=64), KINDS, 1e-5),
    "no biases, looped AdamW": (dict(bias=False, fused_adamw=False, n_layer=3), KINDS, 1e-5),
    "bfloat16": (dict(dtype="bfloat16"), KINDS, 2e-2),
    "float16": (dict(dtype="float16"), KINDS[:2], 2e-2),  # sharding is refused
}


@pytest.mark.parametrize(
    ("world", "variant"),
    [
        (2, "clipped and accumulated"),
        pytest.param(4, "clipped and accumulated", marks=pytest.mark.slow),
        *(pytest.param(2, variant, marks=pytest.mark.slow) for variant in [*VARIANTS][1:]),
    ],
)
def test_all_kinds_train_what_one_process_trains(cfg, tmp_path, world, variant):
    settings, kinds, near = VARIANTS[variant]
    cfg = replace(cfg, **settings)
    alone = learn(cfg)
    assert (alone["numbers"][:, 1] > 0.05).all()  # so that clipping to that is something
    for kind in kinds:
        found = ranks.run(world, tmp_path / kind, learn, replace(cfg, parallel=kind, processes=world))
        whole = merged([f["state"] for f in found])
        assert whole.keys() == alone["state"].keys()
        for f in found:
            assert f["wrong"] == []
            assert (f["on"]["parallel"], f["on"]["processes"]) == (kind, world)
            assert (f["numbers"] == found[0]["numbers"]).all()
            assert f["numbers"] == pytest.approx(alone["numbers"], rel=near)
        for name, _ in GPT(cfg).named_parameters() if near == 1e-5 else []:
            torch.testing.assert_close(whole[name], alone["state"][name], rtol=0, atol=1e-5, msg=f"{kind}: {name}")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_single_process_is_the_same_under_each_kind(cfg, kind):
    assert equal(learn(replace(cfg, parallel=kind))["state"], learn(cfg)["state"])


@pytest.mark.slow
@pytest.mark.skipif(machine.why_no_compile(CPU) is not None, reason="no C++ compiler here")
def test_a_sharded_model_is_compiled_block_by_block(cfg, tmp_path):
    alone = learn(cfg, 3)
    for f in ranks.run(2, tmp_path / "ranks", learn, replace(cfg, parallel="fsdp", compile=True), 3, timeout=120):
        assert f["wrong"] == []
        assert (f["on"]["compile"], f["on"]["compile_scope"]) == (True, "block")
        assert f["numbers"] == pytest.approx(alone["numbers"], rel=1e-4)


def test_each_process_keeps_its_share_and_no_more(cfg, tmp_path):
    """Parameters, gradients and two moments, 4 bytes each: all of them, half of them and a share of half, a share of all."""
    cfg = replace(cfg, n_embd=128)
    full = 16 * sum(p.numel() for p in GPT(cfg).parameters()) / 2**20
    held = {}
    for kind in KINDS:
        held[kind], other = (f["on"]["state_mib"] for f in ranks.run(2, tmp_path / kind, learn, replace(cfg, parallel=kind), 1))
        assert other == held[kind]
    assert held["ddp"] == pytest.approx([full] * 2, rel=0.01)
    assert sum(held["zero1"]) == pytest.approx(full * 3 / 2, rel=0.01)
    assert all(full / 2 < h < 0.9 * full for h in held["zero1"])
    assert held["fsdp"] == pytest.approx([full / 2] * 2, rel=0.02)


def whole_during(cfg: Config) -> list[list[bool]]:
    """Which blocks are whole while the second computes, and which after the step."""
    run, found = build(cfg), []
    blocks = run.model.transformer.h

    def look(*_) -> None:
        found.append([not isinstance(block.mlp.c_fc.weight, DTensor) for block in blocks])

    blocks[1].attn.register_forward_hook(look)
    train.train_step(run, 0)
    look()
    run.close()
    return found


def test_a_sharded_models_blocks_are_whole_one_at_a_time(cfg, tmp_path):
    cfg = replace(cfg, parallel="fsdp", n_layer=3)
    assert ranks.run(2, tmp_path / "ranks", whole_during, cfg) == [[[False, True, False], [False] * 3]] * 2


def validate(cfg: Config) -> float:
    run = build(cfg)
    found = train.validation(run)["loss"]
    run.close()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_validation_may_end_in_the_middle_of_a_round(cfg, tmp_path, kind):
    """9 rows of 4: with 2 processes, the second has none in the last round, though sharded parameters need its presence."""
    cfg = replace(cfg, eval_tokens=9 * 32, parallel=kind)
    assert ranks.run(2, tmp_path / "ranks", validate, cfg, timeout=30) == pytest.approx([validate(cfg)] * 2, rel=1e-6)


# ---- what is asked for is what is on ------------------------------------------------------------------------------------


def sabotaged(cfg: Config, how: str) -> tuple[str, list[str]]:
    """(what is on, what is wrong) of a run that shares out something else than was asked for."""
    plain = optim.adamw
    if how == "replicated":
        parallel.shard = lambda *_: None
        parallel.replicate = lambda model, *_: DDP(model)
    elif how == "whole moments":
        optim.adamw = lambda cfg, model: plain(replace(cfg, parallel="ddp"), model)
    else:
        parallel.replicate = lambda model, *_: model
    found = learn(cfg, 1)
    return found["on"]["parallel"], found["wrong"]


@pytest.mark.parametrize(
    ("kind", "how"), [("fsdp", "replicated"), ("zero1", "whole moments"), ("ddp", "bare"), ("zero1", "bare")]
)
def test_sharing_that_does_not_happen_is_found(cfg, tmp_path, kind, how):
    for on, wrong in ranks.run(2, tmp_path / "ranks", sabotaged, replace(cfg, parallel=kind), how):
        assert on != kind
        assert [w for w in wrong if w.startswith(f"parallel={kind!r} was asked for")], wrong


# ---- ranks that disagree -----------------------------------------------------------------------------------------------


def start_unlike(cfgs: list[Config], code: list[str]) -> str:
    """The error of training; a step would be an error of another kind."""
    rank = int(os.environ["RANK"])
    parallel.code_sha256 = lambda: code[rank]
    train.train_step = None
    try:
        train.train(cfgs[rank])
    except UserError as e:
        return str(e)
    return "nothing"


@pytest.mark.parametrize(("what", "who", "agent"), [("beta2", 2, True), ("data", 1, False), ("code", 2, False)])
def test_a_run_does_not_begin_unless_all_ranks_agree(cfg, tmp_path, text, what, who, agent):
    """Whether torchrun's agent keeps the store in which processes meet or, started by other means, the first of them."""
    import prepare_data

    cfg = replace(cfg, tokens_per_step=9 * 32)
    cfgs, code = [cfg] * 3, ["1"] * 3
    if what == "beta2":
        cfgs[who] = replace(cfg, beta2=0.9)
    elif what == "code":
        code[who] = "2"
    else:  # the same path on another machine, with other data in it
        (tmp_path / "tiny.txt").write_text(text[::-1])
        prepare_data.main([str(tmp_path / "tiny.txt"), "--tokenizer=char", f"--data_dir={tmp_path}"])
        cfgs[who] = replace(cfg, data_dir=str(tmp_path))
    messages = ranks.run(3, tmp_path / "ranks", start_unlike, cfgs, code, agent=agent)
    assert messages == [messages[0]] * 3
    assert re.search(rf"ranks disagree: {what} is .* in process 0 and .* in process {who}; start all", messages[0])
    assert "\n" not in messages[0]
    assert not Path(cfg.out_dir).exists()


# ---- replicas that have come apart --------------------------------------------------------------------------------------


def flip(parameter: torch.Tensor, place: int, bit: int) -> None:
    bits = parameter.detach().view(torch.int32).view(-1)
    bits[place] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)


def flipping(cfg: Config, flips: list[tuple[str, int, int]]) -> list[list[str]]:
    """What is found before, and after each single flip in process 1, which is then undone."""
    run = build(cfg)
    found, by_name = [parallel.different_replicas(run.model)], dict(run.model.named_parameters())
    for name, place, bit in flips:
        for _ in range(2):
            if run.world.rank == 1:
                flip(by_name[name], place % by_name[name].numel(), bit)
            found.append(parallel.different_replicas(run.model))
    run.close()
    return found


def test_a_single_flipped_bit_is_found_and_named(cfg, tmp_path):
    names = [n for n, _ in GPT(cfg).named_parameters()]
    flips = [(name, 7919 * i, (5 * i) % 32) for i, name in enumerate(names)] + [(names[0], i, i) for i in range(32)]
    expected = [[]] + [each for name, _, _ in flips for each in ([f"{name} in process 1"], [])]
    assert ranks.run(2, tmp_path / "ranks", flipping, cfg, flips) == [expected] * 2


def flip_in_a_run(cfg: Config) -> None:
    def flipped(run: Run) -> None:
        if run.world.rank == 1:
            flip(run.model.transformer.ln_f.weight, 3, 20)

    spoiled(pytest.MonkeyPatch(), train, flipped, 4)
    errors.entry(lambda _: train.train(cfg))


def test_a_run_whose_replicas_differ_ends_with_the_parameters_name(cfg, tmp_path):
    with ranks.started(2, tmp_path / "ranks", flip_in_a_run, replace(cfg, replica_interval=2, eval_interval=6)) as found:
        ranks.wait(found, 30)
        assert [r.status for r in found] == [2, 2]
        output = found[0].stderr
    # the optimizer's step after the flip leaves no other parameter of process 1 equal
    assert "step 4: the processes no longer hold the same parameters (transformer." in output
    assert " in process 1" in output
    assert output.count("\n") == 1


# ---- small pieces -------------------------------------------------------------------------------------------------------


def test_the_code_hash_covers_every_room(tmp_path, root, monkeypatch):
    """Against git's list: any .py or .c file of the program changes it; tests, config files and other files do not."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git repository")
    names = listed.stdout.splitlines()
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(parallel, "ROOT", tmp_path)
    seen, covered = {parallel.code_sha256()}, set()
    for name in names:
        (tmp_path / name).write_text("changed")
        if parallel.code_sha256() not in seen:
            covered.add(name)
            seen.add(parallel.code_sha256())
    left_out = ("tests/", "config/", "docs/", ".")
    assert covered == {n for n in names if n.endswith((".py", ".c")) and not n.startswith(left_out)}


# ---- torchrun itself -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_machines_train_as_one_machine_with_two_processes(cfg, root, tmp_path):
    """Two agents that know of each other only by an endpoint, as on two nodes."""
    cfg = replace(cfg, eval_interval=6)
    one = replace(cfg, out_dir=str(tmp_path / "one"))
    ranks.run(2, tmp_path / "ranks", train.train, one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    meet = ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=run")
    flags = [f"--{name}={value}" for name, value in vars(cfg).items()]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, str(root / "train.py"), *flags]
    how = dict(cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, encoding="utf-8")
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) for _ in range(2)]
    output = [a.communicate(timeout=90) for a in agents]
    assert [a.returncode for a in agents] == [0, 0], output
    losses = [[float.fromhex(v.split()[0]) for v in prove.trajectory(Path(c.out_dir)).values()] for c in (one, cfg)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    ends = [dict(restore.load_model(c.out_dir)[0].named_parameters()) for c in (one, cfg)]
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=0, atol=1e-6)
