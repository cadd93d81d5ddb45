"""effective.py: what is asked for is what is on, looking changes nothing, and a setting that does nothing is found."""

import contextlib
import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from runs import equal, state
from torch import nn
from torch._dynamo.utils import counters

import engine.run
import model
import optim
import train
from base import settings
from base.errors import UserError
from configurator import Config
from engine import machine, parallel
from engine.effective import _Spy, effective, mismatches
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals", "as_before")

CPU = torch.device("cpu")


@pytest.fixture
def as_before():
    """What building a run sets for the whole process, put back."""
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    precisions = [b.fp32_precision for b in backends]
    yield
    for backend, precision in zip(backends, precisions, strict=True):
        backend.fp32_precision = precision
    machine.set_sdpa_backend("any", torch.device("cuda"))
    machine.set_deterministic(False)
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def cfg(plain) -> Config:
    return plain


def stepped(cfg: Config, steps: int = 1) -> Run:
    """A run after its first steps, as effective() finds it."""
    run = build(cfg)
    for step in range(steps):
        train.train_step(run, step)
    return run


# ---- what is asked for is what is on ------------------------------------------------------------------------------------


def checked(cfg: Config) -> tuple[Run, dict]:
    """(the run, what is on) after a real step; nothing may differ from what was asked for."""
    run = stepped(cfg)
    on = effective(run)
    assert mismatches(run, on) == []
    return run, on


TOGGLES = dict(dtype=machine.DTYPES, attention=("naive", "blocked", "sdpa"))
TOGGLES |= dict.fromkeys(("fused_adamw", "prefetch", "tie_weights", "deterministic"), (False, True))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in TOGGLES.items() for value in values])
def test_a_toggle_that_is_on_is_seen_to_be_on(cfg, name, value):
    """Each by itself, and with everything else that a CPU has turned on."""
    fast = dict(attention="sdpa", vocab_multiple=64, dtype="bfloat16", fused_adamw=True, prefetch=True)
    for others in ({}, fast):
        _, on = checked(replace(cfg, **others | {name: value}))
        assert on[name] == value


@pytest.mark.slow
@pytest.mark.skipif(machine.why_no_compile(CPU) is not None, reason="no C++ compiler here")
@pytest.mark.parametrize("scope", ["model", "block"])
def test_what_inductor_compiles_is_seen_and_computes_the_same(cfg, scope):
    """Also in a validation whose last batch is padded. Attention stays what was asked for: inductor has patterns that turn one
    that is written out into the fused one."""
    eager = replace(cfg, n_layer=2, learning_rate=1e-3)
    found = []
    for asked in (eager, replace(eager, compile=True, compile_scope=scope)):
        run, _ = checked(asked)
        found.append([train.train_step(run, 1).loss, train.train_step(run, 2).loss, train.validation(run)["loss"]])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_each_run_of_a_process_is_judged_by_its_own_graphs(cfg, monkeypatch, scope):
    """Though it may find an earlier one's code in the compiler's cache; and one that falls back to eager is found out."""
    eager_backend(monkeypatch)
    asked = replace(cfg, compile=True, compile_scope=scope)
    for n_embd in (32, 32, 64):
        assert checked(replace(asked, n_embd=n_embd))[1]["graphs"] == (1 if scope == "model" else 2)
    with torch.compiler.set_stance("force_eager"):
        run = stepped(asked)
        assert mismatches(run, effective(run))[0].startswith("compile=")


def test_every_speed_setting_is_read_back(cfg):
    """Those of the sections "speed" and GPTConfig: what effective() does not look at can silently do nothing."""
    names = [f.name for f in fields(Config)]
    speed = names[names.index("device") : names.index("out_dir")]
    also = {"vocab_multiple": "padded_vocab_size", "batch_size": "micro_batch"}
    run, on = checked(cfg)
    assert "fused_adamw" in speed
    assert {also.get(name, name) for name in (*speed, "attention", *also)} <= on.keys()
    wrong = mismatches(run, on | {"device": "another", "tie_weights": False})
    assert wrong[0].startswith("device='cpu' was asked for, but 'another' is what runs: ")
    assert [w.partition("=")[0] for w in wrong] == ["device", "tie_weights"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["naive", "blocked", "sdpa"])
def test_the_attention_kernel_is_that_of_a_training_step(cfg, attention, dropout):
    """Not that of a pass without dropout: the CPU's fused kernel has none, and PyTorch falls back without a message."""
    run = stepped(replace(cfg, attention=attention, dropout=dropout))
    with _Spy() as spy:
        train.train_step(run, 1)
    kernels = {name for name in spy.kernels if "backward" not in name}
    assert effective(run)["attention_kernel"] == ("+".join(sorted(kernels)) or "separate matmuls")


# ---- looking changes nothing ----------------------------------------------------------------------------------------------


def bits(run: Run) -> dict[str, torch.Tensor]:
    return state(run) | {f"grad {k}": v.grad.clone() for k, v in run.model.named_parameters() if v.grad is not None}


WAYS = [
    dict(dropout=0.1),
    dict(dropout=0.1, attention="sdpa", prefetch=True, fused_adamw=True, batch_size=2),
    dict(dropout=0.1, dtype="bfloat16", vocab_multiple=64, prefetch=True),
    dict(dtype="float16", dropout=0.1),
    dict(compile=True, compile_scope="model"),
    dict(compile=True, compile_scope="block", prefetch=True),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda w: " ".join(f"{k}={v}" for k, v in w.items()))
def test_looking_changes_nothing(cfg, way, monkeypatch):
    """Weights, moments, gradients, random states and all that comes after are the same bits with and without it."""
    eager_backend(monkeypatch)
    found = []
    for look in (False, True):
        torch.compiler.reset()
        run = stepped(replace(cfg, **way), 2)
        for number, p in enumerate(run.model.parameters()):  # a step leaves none: so that one that is touched is seen
            p.grad = torch.full_like(p, 0.5 + number)
        before, ahead, stats = bits(run), list(run.pending), dict(counters["stats"])
        drawn = torch.get_rng_state()
        if look:
            on = effective(run)
            assert effective(run) == on  # nor does it depend on how often one looks
            assert mismatches(run, on) == []
        assert equal(bits(run), before)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert (list(run.pending), dict(counters["stats"])) == (ahead, stats)
        assert (run.model.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (True, True, False)
        run.optimizer.zero_grad(set_to_none=True)
        later = [train.train_step(run, step) for step in (2, 3)]
        found.append((later, bits(run) | {"random": torch.get_rng_state()}))
        run.close()
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


# ---- what silently does nothing is found out ------------------------------------------------------------------------------


def eager_backend(monkeypatch) -> None:
    """torch.compile without the code generation, which these tests do not need."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def replaced(owner: object, name: str, instead: Callable) -> Callable:
    """A sabotage: owner.name becomes instead(what it was, …) with its arguments."""

    def sabotage(monkeypatch) -> None:
        monkeypatch.setattr(owner, name, functools.partial(instead, getattr(owner, name)))

    return sabotage


def mlp_is(forward: Callable) -> Callable:
    return lambda monkeypatch: monkeypatch.setattr(model.MLP, "forward", forward)


def graph_break(monkeypatch, plain=model.MLP.forward) -> None:
    eager_backend(monkeypatch)
    mlp_is(lambda self, x: (torch._dynamo.graph_break(), plain(self, x))[1])(monkeypatch)


def in_float32(self, x: torch.Tensor, plain=model.MLP.forward) -> torch.Tensor:
    """A layer that leaves autocast: some matmuls are bfloat16 and some are not."""
    with torch.autocast("cpu", enabled=False):
        return plain(self, x.float())


def malloc_that_lies(monkeypatch) -> None:
    monkeypatch.setattr(machine, "set_reuse_memory", lambda: True)
    monkeypatch.setattr(machine, "reuses_memory", lambda: False)


def untied(plain: Callable, cfg: Config) -> model.GPT:
    net = plain(cfg)
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    return net


def alone(monkeypatch) -> None:
    plain = parallel.start
    monkeypatch.setattr(parallel, "start", lambda device, minutes: replace(plain(device, minutes), size=2))
    monkeypatch.setattr(parallel, "replicate", lambda model, how, world, device: model)


def nothing(monkeypatch) -> None:
    """The real machine's doing."""


def attention_is(name: str, instead: Callable) -> Callable:
    return lambda monkeypatch: monkeypatch.setitem(model.ATTENTION, name, instead)


def autocast_is(context: Callable) -> Callable:
    return replaced(Run, "autocast", lambda plain: context())


def fused_is(on: bool) -> Callable:
    return replaced(optim, "adamw", lambda plain, cfg, net: plain(replace(cfg, fused_adamw=on), net))


def deterministic_is(value: bool) -> Callable:
    return replaced(machine, "set_deterministic", lambda plain, on: plain(value))


not_compiled = replaced(torch, "compile", lambda plain, code, **_: code)
unpadded = replaced(engine.run, "GPT", lambda plain, cfg: plain(replace(cfg, vocab_multiple=1)))
bfloat16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)

SABOTAGE = [
    ("fused_adamw", dict(fused_adamw=True), fused_is(False)),
    ("fused_adamw", dict(fused_adamw=False), fused_is(True)),
    ("compile", dict(compile=True), not_compiled),
    ("compile", dict(compile=True, compile_scope="block"), not_compiled),
    ("graph_breaks", dict(compile=True), graph_break),
    ("graph_breaks", dict(compile=True, compile_scope="block"), graph_break),
    ("attention", dict(attention="sdpa"), attention_is("sdpa", model.naive_attention)),
    ("attention", dict(attention="naive"), attention_is("naive", model.sdpa_attention)),
    ("dtype", dict(dtype="bfloat16"), autocast_is(contextlib.nullcontext)),
    ("dtype", dict(dtype="float16"), autocast_is(contextlib.nullcontext)),
    ("dtype", dict(dtype="bfloat16"), mlp_is(in_float32)),
    ("dtype", dict(dtype="float32"), autocast_is(bfloat16)),
    ("fp32_precision", dict(fp32_precision="tf32"), nothing),
    ("fp32_precision", dict(fp32_precision="bf16"), nothing),
    ("reuse_memory", dict(reuse_memory=True), malloc_that_lies),
    ("prefetch", dict(prefetch=True), lambda monkeypatch: monkeypatch.setattr(Run, "next_batch", Run.read)),
    ("tie_weights", dict(tie_weights=True), replaced(engine.run, "GPT", untied)),
    ("padded_vocab_size", dict(vocab_multiple=64), unpadded),
    ("processes", dict(), alone),
    ("deterministic", dict(deterministic=True), deterministic_is(False)),
    ("deterministic", dict(deterministic=False), deterministic_is(True)),
]


@pytest.mark.parametrize(("name", "asked", "sabotage"), SABOTAGE, ids=lambda v: v if isinstance(v, str) else None)
def test_a_toggle_that_does_nothing_is_named_with_its_remedy(cfg, monkeypatch, name, asked, sabotage):
    """Found after the first step, and training ends with it: one line, whose remedy can be used as it stands."""
    cfg = replace(cfg, **asked)
    sabotage(monkeypatch)
    run = stepped(cfg)
    if sabotage is nothing and machine.fp32_precision_measured(CPU) == cfg.fp32_precision:
        pytest.skip(f"this CPU does round to {cfg.fp32_precision}: nothing is impossible about it here")
    (wrong,) = mismatches(run, effective(run))
    assert wrong.startswith(f"{name}=")
    assert "\n" not in wrong
    remedy = re.findall(r"use (--\w+=[^\s,;)]+)", wrong)
    assert remedy
    settings.parse(cfg, remedy, "")  # a setting that exists, at a value it can have
    run.close()
    torch.compiler.reset()
    with pytest.raises(UserError, match=re.escape(wrong)):
        train.train(cfg)


def test_what_is_known_before_the_first_step_is_refused_before_it(cfg, monkeypatch):
    monkeypatch.setattr(machine, "set_reuse_memory", lambda: False)
    with pytest.raises(UserError, match=r"reuse_memory=True.*--reuse_memory=False"):
        build(replace(cfg, reuse_memory=True))
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2"):
        build(replace(cfg, processes=2))


# ---- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(cfg) -> Config:
    """The fast form, heads of 64, on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    size = dict(n_head=1, n_embd=64, vocab_multiple=64, attention="sdpa", fused_adamw=True, prefetch=True)
    return replace(cfg, device="cuda", **size)


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["any", "flash", "efficient", "cudnn"])
def test_a_gpu_attends_with_the_kernel_that_is_asked_for(on_a_gpu, which):
    _, on = checked(replace(on_a_gpu, dtype="bfloat16", sdpa_backend=which))
    kernels = ["flash", "cudnn"] if which == "any" else [which]
    assert on["attention_kernel"] in [f"scaled_dot_product_{kernel}_attention" for kernel in kernels]
    assert (on["device"], on["dtype"], on["sdpa_backend"]) == ("cuda", "bfloat16", which)


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["ieee", "tf32"])
def test_a_gpu_rounds_to_tf32_only_where_asked(on_a_gpu, how):
    assert checked(replace(on_a_gpu, fp32_precision=how))[1]["fp32_precision"] == how


@pytest.mark.cuda
def test_a_step_holds_the_gpu_up_only_for_its_loss_and_norm(on_a_gpu):
    run = stepped(replace(on_a_gpu, dtype="bfloat16", batch_size=2), 2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.train_step(run, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 2
