"""Each toggle is read in one place, does what it says, and is found out where it does not; and what machine.py knows."""

import ast
import contextlib
import functools
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import configurator
import model
import optim
import train
from base.errors import UserError
from configurator import Config
from engine import checkpoint, machine, parallel
from engine.effective import effective, mismatches
from engine.run import Run, build

pytestmark = pytest.mark.usefixtures("own_signals", "as_before")

CPU = torch.device("cpu")
SPEED = "device dtype fp32_precision compile compile_scope attention vocab_multiple fused_adamw reuse_memory prefetch processes"
SPEED = [*SPEED.split(), "batch_size", "deterministic", "parallel", "compile_mode", "sdpa_backend"]


@pytest.fixture
def as_before():
    """What building a run sets for the whole process, put back."""
    precision = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = precision
    machine.set_deterministic(False)
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def cfg(tiny_run, tmp_path) -> Config:
    """The tiny run with every toggle named, and in its plain form."""
    plain = dict(attention="naive", vocab_multiple=1, fp32_precision="ieee", fused_adamw=False, prefetch=False)
    return Config(**tiny_run | plain, out_dir=str(tmp_path / "run"))


def stepped(cfg: Config, steps: int = 1) -> Run:
    """A run after its first steps, as effective() finds it."""
    run = build(cfg)
    for step in range(steps):
        train.train_step(run, step)
    return run


# ---- each toggle is read in one place -----------------------------------------------------------------------------------

# Where a setting takes effect: the one function that reads it.
PLACES = {
    "device": "build",
    "dtype": "Run.autocast",
    "fp32_precision": "build",
    "compile": "compile_model",
    "compile_scope": "compile_model",
    "compile_mode": "compile_model",
    "sdpa_backend": "build",
    "attention": "model.Attention.__init__",
    "vocab_multiple": "model.GPTConfig.padded_vocab_size",  # whoever needs the number of rows asks this property
    "fused_adamw": "optim.adamw",
    "reuse_memory": "build",
    "prefetch": "Run.next_batch",
    "processes": "build",
    "batch_size": "configurator.Config.split_step",
    "deterministic": "build",
    "parallel": "build",
}
# Read besides, with the reason.
BESIDES = {
    ("dtype", "build"): "the gradient scaler exists only for float16: a second object, made once",
    ("dtype", "train.replay"): "says in which precision the step was run again",
    ("batch_size", "build"): "says that the micro-batch is smaller than was asked for; changes nothing",
    ("parallel", "optim.adamw"): "the optimizer of zero1 is another class: a third object, made once",
    ("parallel", "train.loop"): "a micro-batch is tried out beforehand only where a pass exchanges nothing",
}
# Not training, or not taking effect: resolving "auto", checking values, reading back, measuring.
NO_EFFECT = {"configurator.Config.__post_init__", "machine.resolve", "effective", "mismatches"}
# sample.py has settings of its own; prove.py starts train.py with all of them
NO_TRAINING = {"bench", "verify", "why", "report", "compare", "sample", "prepare_data", "cluster", "prove", "curve"}
NO_TRAINING |= {"evaluate", "plan", "workers"}


def reads(tree: ast.Module, module: str):
    """Yield (setting, function, line) for each read of a speed setting off a config: cfg.x, run.cfg.x, getattr(cfg, "x"), or
    self.x inside the config classes. A setting whose name nothing else has counts whatever it is read off.
    """
    # of these names torch and the models have attributes, too
    shared = {"device", "dtype", "compile", "attention", "deterministic", "parallel"}
    configs = {"Config", "GPTConfig"}

    def is_config(node: ast.expr, classes: tuple[str, ...]) -> bool:
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in ("cfg", "config", "previous", "settings") or (name == "self" and classes[-1:] and classes[-1] in configs)

    def walk(node: ast.AST, names: tuple[str, ...], classes: tuple[str, ...]):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names += (node.name,)
            classes += (node.name,) if isinstance(node, ast.ClassDef) else ()
        field, base = None, None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            field, base = node.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            field, base = getattr(node.args[1], "value", None), node.args[0]
        if field in SPEED and (is_config(base, classes) or field not in shared):
            yield field, ".".join((module, *names)), node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, names, classes)

    yield from walk(tree, (), ())


def all_reads(root: Path) -> list[tuple[str, str, str]]:
    """(setting, function, file:line) of every read in the training code."""
    found = []
    for path in sorted(root.glob("*.py")):
        if path.stem not in NO_TRAINING:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(f, where, f"{path.name}:{line}") for f, where, line in reads(tree, path.stem) if where not in NO_EFFECT]
    return found


def test_the_table_names_every_speed_setting(root):
    """Every field of the section "speed" of Config, and those of GPTConfig that are no more than speed."""
    source = (root / "configurator.py").read_text(encoding="utf-8")
    section = source.split("# speed:")[1].split("# the run")[0]
    assert {*re.findall(r"^    (\w+):", section, re.MULTILINE), "attention", "vocab_multiple", "batch_size"} == set(PLACES)
    assert set(SPEED) == set(PLACES) <= {f.name for f in fields(Config)}


@pytest.mark.parametrize("field", SPEED)
def test_a_toggle_is_read_in_one_place(root, field):
    """One that is spread over functions is one that is half on."""
    found = [(where, line) for name, where, line in all_reads(root) if name == field]
    astray = [f"{line} ({where})" for where, line in found if where != PLACES[field] and (field, where) not in BESIDES]
    assert not astray, f"{field} takes effect in {PLACES[field]}, and is read in {', '.join(astray)} as well"
    assert PLACES[field] in {where for where, _ in found}, f"{field} is not read in {PLACES[field]}: does it do anything?"


def test_exceptions_are_not_kept_for_longer_than_needed(root):
    assert set(BESIDES) <= {(name, where) for name, where, _ in all_reads(root)}


def test_a_toggle_that_is_read_elsewhere_would_be_seen():
    """The search itself: on a source that reads in every way it knows."""
    source = """
class Config:
    def split(self):
        return self.batch_size
class Other:
    def f(self, run, t):
        a = self.cfg.dtype, run.cfg.compile, getattr(self.cfg, "device"), run.settings.attention
        return t.dtype, self.device, torch.compile, a, whatever.prefetch
def g(cfg):
    cfg.compile = 1
    return lambda: cfg.fused_adamw
"""
    found = sorted((field, where, line) for field, where, line in reads(ast.parse(source), "m"))
    assert found == [
        ("attention", "m.Other.f", 7),
        ("batch_size", "m.Config.split", 4),
        ("compile", "m.Other.f", 7),
        ("device", "m.Other.f", 7),
        ("dtype", "m.Other.f", 7),
        ("fused_adamw", "m.g", 11),
        ("prefetch", "m.Other.f", 8),
    ]


class Watched(Config):
    """A Config that notes which function reads which speed setting."""

    seen: set[tuple[str, str]] = set()

    def __getattribute__(self, name: str):
        if name in SPEED:
            frame = sys._getframe(1)
            Watched.seen.add((name, f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"))
        return super().__getattribute__(name)


def test_nothing_else_reads_it_when_a_run_is_run(cfg):
    """By running: whatever the source calls its config, no other function of ours reads a speed setting."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    watched = Watched(**values | dict(dtype="bfloat16", prefetch=True, fused_adamw=True))
    Watched.seen = set()
    run = stepped(watched, steps=2)
    train.validation(run)["loss"]
    run.close()
    modules = ("train", "model", "optim", "data", "parallel", "guards", "checkpoint")
    ours = {(f, w) for f, w in Watched.seen if w.partition(".")[0] in modules and not w.endswith("__post_init__")}
    expected = {(f, PLACES[f]) for f in SPEED if not PLACES[f].startswith("configurator")} | set(BESIDES)
    assert ours <= expected
    assert {f for f, _ in Watched.seen} >= set(SPEED) - {"compile_scope", "compile_mode"}  # which count only under compile=True


# ---- what is asked for is what is on ------------------------------------------------------------------------------------


def checked(cfg: Config) -> tuple[Run, dict]:
    """(the run, what is on) after a real step; nothing may differ from what was asked for."""
    run = stepped(cfg)
    on = effective(run)
    assert mismatches(run, on) == []
    return run, on


TOGGLES = [
    *({"dtype": v} for v in ("float32", "bfloat16", "float16")),
    *({"attention": v} for v in ("naive", "blocked", "sdpa")),
    *({"fused_adamw": v} for v in (False, True)),
    *({"prefetch": v} for v in (False, True)),
    *({"tie_weights": v} for v in (False, True)),
    {"device": "cpu"},
    {"fp32_precision": "ieee"},
    {"reuse_memory": False},
    {"compile": False},
    {"processes": 1},
    *({"deterministic": v} for v in (False, True)),
    {"parallel": "ddp"},
]


@pytest.mark.parametrize("change", TOGGLES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_a_toggle_that_is_on_is_seen_to_be_on(cfg, change):
    """Each by itself, and with everything else that a CPU has turned on."""
    ((field, value),) = change.items()
    fast = dict(attention="sdpa", vocab_multiple=64, dtype="bfloat16", fused_adamw=True, prefetch=True)
    for others in ({}, fast):
        _, on = checked(replace(cfg, **others | change))
        assert on[field] == value


@pytest.mark.parametrize(("multiple", "rows"), [(1, 18), (16, 32), (64, 64), (128, 128)])
def test_vocabulary_rows_are_those_of_the_matrix(cfg, multiple, rows):
    assert cfg.vocab_size == 18
    run, on = checked(replace(cfg, vocab_multiple=multiple))
    assert on["padded_vocab_size"] == rows
    assert on["parameters"] == sum(p.numel() for p in run.model.parameters()) - (rows - 18) * cfg.n_embd


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "accumulation"), [(1, 1, 8), (2, 2, 4), (3, 2, 4), (8, 8, 1), (99, 8, 1)]
)
def test_the_micro_batch_is_what_forward_sees(cfg, batch_size, micro_batch, accumulation):
    run, on = checked(replace(cfg, batch_size=batch_size))
    assert (on["micro_batch"], on["accumulation"]) == (micro_batch, accumulation)
    seen = []
    run.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].size(0)))
    train.train_step(run, 1)
    assert seen == [micro_batch] * accumulation


@pytest.mark.parametrize("scope", ["model", "block"])
def test_compiled_code_is_seen_and_stays_what_it_is(cfg, scope):
    """For real, by inductor. The probe compiles nothing and makes nothing compile again; attention stays what was asked for
    (inductor has patterns that turn a written-out attention into the fused one).
    """
    if reason := machine.why_no_compile(CPU):
        pytest.skip(reason)
    attention = "naive" if scope == "block" else "sdpa"
    asked = replace(cfg, compile=True, compile_scope=scope, attention=attention, n_layer=2 if scope == "block" else 1)
    run, on = checked(asked)
    assert on["compile"] is True
    assert on["graph_breaks"] == 0
    assert on["graphs"] == {"model": 1, "block": 2}[scope]  # the whole; or one for all blocks and one for the head
    assert not [k for k in counters["inductor"] if "fuse_attention" in k]
    before = dict(counters["stats"])
    train.train_step(run, 1)
    assert dict(counters["stats"]) == before
    expected = stepped(replace(asked, compile=False))
    torch.testing.assert_close(
        train.validation(run)["loss"], train.evaluate(stepped(replace(asked, compile=False), 2)), atol=1e-3, rtol=0
    )
    assert expected.compiled is expected.model


def test_the_second_run_of_a_process_is_seen_to_be_compiled_as_well(cfg, monkeypatch):
    """Though it may find the first one's code in the compiler's cache: train, then resume, from one program."""
    eager_backend(monkeypatch)
    for _ in range(2):
        run = stepped(replace(cfg, compile=True))
        assert mismatches(run, effective(run)) == []


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_second_run_that_falls_back_to_eager_is_found_out(cfg, monkeypatch, scope):
    """What an earlier run of the process has compiled says nothing about this one."""
    eager_backend(monkeypatch)
    asked = replace(cfg, compile=True, compile_scope=scope)
    checked(asked)
    with torch.compiler.set_stance("force_eager"):
        run = stepped(asked)
        wrong = mismatches(run, effective(run))
    assert [w for w in wrong if w.startswith("compile=")], wrong


def test_graphs_are_those_of_this_run(cfg, monkeypatch):
    eager_backend(monkeypatch)
    found = [effective(stepped(replace(cfg, compile=True, n_embd=n)))["graphs"] for n in (32, 64)]
    assert found == [1, 1]


def test_every_speed_setting_is_read_back(cfg):
    """What effective() does not look at can silently do nothing."""
    also = {"vocab_multiple": "padded_vocab_size", "batch_size": "micro_batch"}
    on = effective(stepped(cfg))
    unseen = [f for f in SPEED if also.get(f, f) not in on]
    assert not unseen, f"effective() does not say: {', '.join(unseen)}"


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the fused attention kernels of forward passes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if "scaled_dot_product" in name and "backward" not in name:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["naive", "blocked", "sdpa"])
def test_the_attention_kernel_is_that_of_a_training_step(cfg, attention, dropout):
    """Not that of a pass without dropout: the CPU's fused kernel has none, and PyTorch falls back without a word."""
    run = stepped(replace(cfg, attention=attention, dropout=dropout))
    with Kernels() as kernels:
        train.train_step(run, 1)
    assert effective(run)["attention_kernel"] == ("+".join(sorted(kernels.seen)) or "separate matmuls")


# ---- looking changes nothing ----------------------------------------------------------------------------------------------


def bits(run: Run) -> dict[str, torch.Tensor]:
    """Weights, moments and gradients."""
    state = {f"weight {k}": v.detach().clone() for k, v in run.model.named_parameters()}
    state |= {f"moment {k}": v.clone() for k, v in checkpoint.state_tensors(run.model, run.optimizer)[1].items()}
    return state | {f"grad {k}": v.grad.clone() for k, v in run.model.named_parameters() if v.grad is not None}


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    """Weights, moments, gradients, random states and all that comes after are the same bits with and without it. (Compiled
    without inductor, in seconds: the graphs are what a look could disturb.)
    """
    eager_backend(monkeypatch)
    found = []
    for look in (False, True):
        torch.compiler.reset()
        run = stepped(replace(cfg, **way), 2)
        for number, p in enumerate(run.model.parameters()):  # a step leaves none: so that one that is touched is seen
            p.grad = torch.full_like(p, 0.5 + number)
        before, ahead, stats = bits(run), list(run.pending), dict(counters["stats"])
        states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
        if look:
            on = effective(run)
            assert effective(run) == on  # nor does it depend on how often one looks
            assert mismatches(run, on) == []
        assert is_equal(bits(run), before)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), repr(np.random.get_state())) == states[1:]
        assert run.model.training
        assert list(run.pending) == ahead
        assert dict(counters["stats"]) == stats
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        run.optimizer.zero_grad(set_to_none=True)
        later = [train.train_step(run, step) for step in (2, 3)]
        found.append((later, bits(run), torch.get_rng_state()))
        run.close()
    assert found[0][0] == found[1][0]
    assert is_equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


# ---- what silently does nothing is found out ------------------------------------------------------------------------------


def eager_backend(monkeypatch) -> None:
    """torch.compile without the code generation, which these tests do not need."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def unfused(monkeypatch) -> None:
    plain = optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda cfg, model: plain(replace(cfg, fused_adamw=False), model))


def fused_anyway(monkeypatch) -> None:
    plain = optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda cfg, model: plain(replace(cfg, fused_adamw=True), model))


def not_compiled(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda code, **_: code)


def graph_break(monkeypatch) -> None:
    eager_backend(monkeypatch)
    plain = model.MLP.forward

    def forward(self, x):
        torch._dynamo.graph_break()
        return plain(self, x)

    monkeypatch.setattr(model.MLP, "forward", forward)


def written_out(monkeypatch) -> None:
    monkeypatch.setitem(model.ATTENTION, "sdpa", model.naive_attention)


def fused_attention(monkeypatch) -> None:
    monkeypatch.setitem(model.ATTENTION, "naive", model.sdpa_attention)


def no_autocast(monkeypatch) -> None:
    monkeypatch.setattr(Run, "autocast", lambda self: contextlib.nullcontext())


def half_autocast(monkeypatch) -> None:
    """One layer leaves autocast: some matmuls are bfloat16 and some are not."""
    plain = model.MLP.forward

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return plain(self, x.float())

    monkeypatch.setattr(model.MLP, "forward", forward)


def autocast_anyway(monkeypatch) -> None:
    monkeypatch.setattr(Run, "autocast", lambda self: torch.autocast("cpu", dtype=torch.bfloat16))


def malloc_that_lies(monkeypatch) -> None:
    monkeypatch.setattr(machine, "set_reuse_memory", lambda: True)
    monkeypatch.setattr(machine, "reuses_memory", lambda: False)


def reads_when_asked(monkeypatch) -> None:
    monkeypatch.setattr(Run, "next_batch", Run.read)


def untied(monkeypatch) -> None:
    plain = build

    def build(cfg):
        run, said = plain(cfg)
        run.model.lm_head.weight = nn.Parameter(run.model.lm_head.weight.detach().clone())
        return run, said

    monkeypatch.setattr(train, "build", build)


def unpadded(monkeypatch) -> None:
    plain = train.GPT
    monkeypatch.setattr(train, "GPT", lambda cfg: plain(replace(cfg, vocab_multiple=1)))


def alone(monkeypatch) -> None:
    plain = parallel.start
    monkeypatch.setattr(parallel, "start", lambda kind, minutes: replace(plain(kind, minutes), size=2))
    monkeypatch.setattr(parallel, "wrap", lambda net, engine, world, device: net)


def never_deterministic(monkeypatch) -> None:
    plain = machine.set_deterministic
    monkeypatch.setattr(machine, "set_deterministic", lambda on: plain(False))


def always_deterministic(monkeypatch) -> None:
    plain = machine.set_deterministic
    monkeypatch.setattr(machine, "set_deterministic", lambda on: plain(True))


def nothing(monkeypatch) -> None:
    """The real machine's doing."""


SABOTAGE = [
    ("fused_adamw", dict(fused_adamw=True), unfused),
    ("fused_adamw", dict(fused_adamw=False), fused_anyway),
    ("compile", dict(compile=True), not_compiled),
    ("compile", dict(compile=True, compile_scope="block"), not_compiled),
    ("graph_breaks", dict(compile=True), graph_break),
    ("graph_breaks", dict(compile=True, compile_scope="block"), graph_break),
    ("attention", dict(attention="sdpa"), written_out),
    ("attention", dict(attention="naive"), fused_attention),
    ("dtype", dict(dtype="bfloat16"), no_autocast),
    ("dtype", dict(dtype="float16"), no_autocast),
    ("dtype", dict(dtype="bfloat16"), half_autocast),
    ("dtype", dict(dtype="float32"), autocast_anyway),
    ("fp32_precision", dict(fp32_precision="tf32"), nothing),
    ("fp32_precision", dict(fp32_precision="bf16"), nothing),
    ("reuse_memory", dict(reuse_memory=True), malloc_that_lies),
    ("prefetch", dict(prefetch=True), reads_when_asked),
    ("tie_weights", dict(tie_weights=True), untied),
    ("padded_vocab_size", dict(vocab_multiple=64), unpadded),
    ("processes", dict(), alone),
    ("deterministic", dict(deterministic=True), never_deterministic),
    ("deterministic", dict(deterministic=False), always_deterministic),
]


def flags(message: str) -> list[tuple[str, str]]:
    """The (name, value) of each --name=value that a message tells one to type."""
    return re.findall(r"--(\w+)=([^\s,;)]+)", message)


@pytest.mark.parametrize(("name", "asked", "sabotage"), SABOTAGE, ids=lambda v: getattr(v, "__name__", None))
def test_a_toggle_that_does_nothing_is_named_with_its_remedy(cfg, monkeypatch, name, asked, sabotage):
    """Found after the first step, and training ends with it: one line, whose remedy can be typed as it stands."""
    cfg = replace(cfg, **asked)
    sabotage(monkeypatch)
    run = stepped(cfg)
    if sabotage is nothing and machine.fp32_precision_measured(CPU) == cfg.fp32_precision:
        pytest.skip(f"this CPU does round to {cfg.fp32_precision}: nothing is impossible about it here")
    wrong = mismatches(run, effective(run))
    assert [w for w in wrong if w.startswith(f"{name}=")], wrong
    assert len(wrong) == 1, wrong
    assert ": type --" in wrong[0] or "none" in wrong[0]
    typed = flags(wrong[0])
    assert typed
    configurator.parse(cfg, [f"--{k}={v}" for k, v in typed], "")  # a setting that exists, at a value it can have
    run.close()

    torch.compiler.reset()
    with pytest.raises(UserError) as e:
        train.train(cfg)
    assert e.value.args[0] == wrong[0]
    assert "\n" not in wrong[0]


@pytest.mark.parametrize("name", ["device", "dtype", "attention", "compile", "fused_adamw", "prefetch", "deterministic"])
def test_whatever_is_off_is_named_once(cfg, name):
    """mismatches() alone: each single reading that differs gives one line with both values, and both of two are told."""
    run = stepped(cfg)
    on = effective(run)
    assert mismatches(run, on) == []
    (wrong,) = mismatches(run, on | {name: "something else"})
    assert wrong.startswith(f"{name}={getattr(run.cfg, name)!r} was asked for, but 'something else' is what runs: ")
    assert len(mismatches(run, on | {name: "something else", "tie_weights": False})) == 2


def test_memory_that_cannot_be_kept_ends_the_run_before_it_begins(cfg, monkeypatch):
    monkeypatch.setattr(machine, "set_reuse_memory", lambda: False)
    with pytest.raises(UserError, match="--reuse_memory=False") as e:
        build(replace(cfg, reuse_memory=True))
    assert "reuse_memory=True" in str(e.value)


def test_processes_that_were_not_started_end_the_run_before_it_begins(cfg):
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2"):
        build(replace(cfg, processes=2))


# ---- machine.py -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """Enough of one for resolve(), whatever is here."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(machine, "find_spec", lambda name: name)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("lacking", [None, "a compiler"])
def test_nothing_stays_auto_and_each_choice_is_said(cfg, monkeypatch, a_gpu, kind, lacking):
    monkeypatch.setattr(machine, "why_no_compile", lambda device: lacking)
    autos = ("device", "dtype", "compile", "compile_scope", "fused_adamw", "reuse_memory")
    values = {f: ("auto", getattr(cfg, f)) for f in autos}
    values |= dict(device=("auto", kind), compile_scope=("auto", "block"), reuse_memory=("auto", False))
    for chosen in itertools.product(*values.values()):
        asked = replace(cfg, **dict(zip(autos, chosen, strict=True)))
        resolved, said = machine.resolve(asked, torch.device(kind))
        assert "auto" not in vars(resolved).values()
        assert resolved.device == kind
        for f in autos:
            told = [line for line in said if line.startswith(f"{f} = ")]
            auto = getattr(asked, f) == "auto"
            # in which scope is no choice where nothing is compiled
            assert len(told) == (auto and (f != "compile_scope" or resolved.compile))
            if told:
                assert told[0].split()[2] == str(getattr(resolved, f))
            assert auto or getattr(resolved, f) == getattr(asked, f)
        assert configurator.diff(asked, resolved).keys() <= set(autos)
    resolved, said = machine.resolve(replace(cfg, compile="auto"), torch.device(kind))
    assert resolved.compile is (lacking is None)
    assert lacking is None or any(lacking in line for line in said)


@pytest.mark.parametrize(
    ("kind", "change", "lacking"),
    [
        ("cpu", dict(compile=True), "no compiler"),
        ("cuda", dict(reuse_memory=True), None),
        ("mps", dict(reuse_memory=True), None),
    ],
)
def test_what_was_named_and_cannot_be_had_is_refused(cfg, monkeypatch, a_gpu, kind, change, lacking):
    monkeypatch.setattr(machine, "why_no_compile", lambda device: lacking)
    ((field, _),) = change.items()
    with pytest.raises(UserError, match=f"{field}=True cannot be had here: .*--{field}=False"):
        machine.resolve(replace(cfg, **change), torch.device(kind))
    assert getattr(machine.resolve(replace(cfg, **{field: "auto"}), torch.device(kind))[0], field) is False


def test_a_machine_without_glibc_keeps_no_memory(cfg, monkeypatch):
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("musl", "1.2"))
    with pytest.raises(UserError, match="glibc"):
        machine.resolve(replace(cfg, reuse_memory=True), CPU)
    assert machine.resolve(replace(cfg, reuse_memory="auto"), CPU)[0].reuse_memory is False


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert machine.pick_device("auto") == machine.pick_device("cpu") == CPU
    for kind in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"device={kind} is not on this machine: type --device=auto .it has cpu"):
            machine.pick_device(kind)


def test_auto_takes_the_first_device_there_is_and_a_process_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert machine.pick_device("auto") == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        machine.pick_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto").type == "mps"


def test_what_compiling_needs(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang++" else None)
    paths = sysconfig.get_paths()
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths | {"include": str(tmp_path)})
    assert machine.why_no_compile(CPU) is None
    monkeypatch.setenv("CXX", "icpx -O2")  # the one that is named is the one that is used
    assert "C++ compiler" in machine.why_no_compile(CPU)
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert machine.why_no_compile(CPU) is None
    (tmp_path / "Python.h").unlink()
    assert "Python.h" in machine.why_no_compile(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in machine.why_no_compile(CPU)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert "triton" in machine.why_no_compile(torch.device("cuda"))
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "7.0" in machine.why_no_compile(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "C compiler" in machine.why_no_compile(torch.device("cuda"))  # Triton's launcher is C
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (tmp_path / "Python.h").touch()
    assert machine.why_no_compile(torch.device("cuda")) is None
    assert machine.why_no_compile(torch.device("mps"))


def test_without_a_compiler_auto_is_eager_and_says_so(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    run, said = build(replace(cfg, compile="auto"))
    assert run.cfg.compile is False
    assert run.compiled is run.model
    assert [line for line in said if "C++ compiler" in line]
    with pytest.raises(UserError, match="--compile=False"):
        build(replace(cfg, compile=True))


@pytest.mark.parametrize(
    ("kind", "how", "fine"),
    [("cpu", "ieee", 1), ("cpu", "tf32", 1), ("cpu", "bf16", 1), ("cuda", "tf32", 1), ("cuda", "bf16", 0), ("mps", "tf32", 0)],
)
def test_a_precision_that_a_device_does_not_know_is_refused(kind, how, fine):
    device = torch.device(kind)
    if fine:
        machine.check_fp32_precision(how, device)
        return
    with pytest.raises(UserError, match=f"fp32_precision={how} does not exist on {kind}: type --fp32_precision="):
        machine.check_fp32_precision(how, device)


@pytest.mark.parametrize(("digits", "name"), [(23, "ieee"), (10, "tf32"), (7, "bf16")])
def test_precision_is_told_from_the_error(monkeypatch, digits, name):
    """Matmuls whose inputs are rounded to so many bits of mantissa, as the hardware does it."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(t)
        return torch.ldexp(torch.round(mantissa * 2 ** (digits + 1)) / 2 ** (digits + 1), exponent)

    plain = torch.Tensor.__matmul__

    def matmul(a, b):
        return plain(rounded(a), rounded(b)) if a.dtype == torch.float32 else plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    assert machine.fp32_precision_measured(CPU) == name


# Prints, of a fresh process, whether freed memory is reused at first and, in five forks with heaps as odd as those of real
# programs, after set_reuse_memory().
FRESH = """
import os, random, sys
from engine import machine
print(machine.reuses_memory(), flush=True)
for seed in range(5):
    if os.fork() == 0:
        sizes = random.Random(seed)
        held = [bytearray(sizes.randrange(16, 200_000)) for _ in range(sizes.randrange(200))]
        took = machine.set_reuse_memory()
        print(took and machine.reuses_memory(), flush=True)
        os._exit(0)
    os.wait()
"""


def fresh(code: str, root: Path, **env: str) -> list[str]:
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_glibc = pytest.mark.skipif(machine.platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")


@needs_glibc
def test_freed_memory_is_kept_once_malloc_is_told_to(root):
    before, *after = fresh(FRESH, root)
    assert before == "False"
    assert after == ["True"] * 5


@needs_glibc
def test_huge_pages_are_not_taken_for_kept_memory(root):
    """Faulted in 2 MiB at a time, 64 MiB are 32 faults: fewer, and still every page is zeroed anew."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    assert fresh("import machine; print(machine.reuses_memory())", root, THP_MEM_ALLOC_ENABLE="1") == ["False"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L40", None),  # half an L40S, and no L4
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_that_of_the_longest_name_that_matches(monkeypatch, name, peak):
    """Bytes and makers follow a name; another model's digits do not."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_flops(torch.device("cuda")) == peak
    assert machine.peak_flops(CPU) is None
    assert machine.peak_flops(torch.device("mps")) is None


@pytest.mark.parametrize(
    ("kind", "bf16", "best"), [("cuda", 1, "bfloat16"), ("cuda", 0, "float16"), ("cpu", 1, "bfloat16"), ("cpu", 0, "float32")]
)
def test_the_best_precision_is_one_the_hardware_multiplies(monkeypatch, kind, bf16, best):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bool(bf16))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(bf16))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert machine.best_dtype(torch.device(kind)) == best
    assert machine.best_dtype(torch.device("mps")) == "float32"


def test_hardware_is_called_what_people_call_it(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    assert machine.hardware_name(CPU).endswith(f", {cores} cores")
    assert machine.hardware_name(CPU).partition(",")[0]

    def unreadable(*args, **how):
        raise FileNotFoundError

    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    for text in (unreadable, lambda *a, **k: "processor : 0\nFeatures : asimd\n"):  # macOS; Linux on ARM
        monkeypatch.setattr(Path, "read_text", text)
        assert machine.hardware_name(CPU) == f"arm64, {cores} cores"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert machine.hardware_name(torch.device("cuda")) == "NVIDIA H200"


def test_a_machine_is_described_in_json_values(monkeypatch):
    where = machine.describe(CPU)
    assert set(where) == {"hardware", "device", "threads", "python", "torch", "cuda", "system", "commit", "dirty"}
    assert where["device"] == "cpu"
    assert where["threads"] == torch.get_num_threads()
    assert all(v is None or isinstance(v, str | int | bool) for v in where.values())
    for commit, status in (("abc1234", ""), ("abc1234", " M model.py")):
        answers = {"rev-parse": commit + "\n", "status": status}
        done = lambda command, answers=answers, **_: types.SimpleNamespace(returncode=0, stdout=answers[command[1]])  # noqa: E731
        monkeypatch.setattr(machine.subprocess, "run", done)
        assert machine.describe(CPU)["commit"] == "abc1234"
        assert machine.describe(CPU)["dirty"] is bool(status)


def test_a_source_tree_without_git_has_no_commit(monkeypatch):
    def no_git(*args, **how):
        raise FileNotFoundError("git")

    for run in (no_git, lambda *a, **k: types.SimpleNamespace(returncode=128, stdout="")):
        monkeypatch.setattr(machine.subprocess, "run", run)
        where = machine.describe(CPU)
        assert where["commit"] is None
        assert where["dirty"] is None


def test_memory_is_counted_in_gib():
    """This process has torch in it: more than 0.1 GiB, and no more than the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    before = machine.memory_gib(CPU)
    assert 0.1 < before < total
    block = torch.ones(2**25)  # 128 MiB
    assert before <= machine.memory_gib(CPU) < before + 0.2
    del block


# ---- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(cfg) -> Config:
    """The fast form, heads of 64, on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    size = dict(n_head=1, n_embd=64, vocab_multiple=64, attention="sdpa", fused_adamw=True, prefetch=True)
    return replace(cfg, device="cuda", **size)


@pytest.mark.cuda
def test_a_gpu_runs_the_flash_kernel_in_bfloat16(on_a_gpu):
    _, on = checked(replace(on_a_gpu, dtype="bfloat16"))
    assert "flash" in on["attention_kernel"] or "cudnn" in on["attention_kernel"]
    assert on["dtype"] == "bfloat16"
    assert on["fused_adamw"] is True
    assert on["prefetch"] is True
    assert on["device"] == "cuda"


@pytest.mark.cuda
@pytest.mark.parametrize("which", ["flash", "efficient", "cudnn"])
def test_a_gpu_attends_with_the_kernel_that_is_asked_for(on_a_gpu, which):
    try:
        _, on = checked(replace(on_a_gpu, dtype="bfloat16", sdpa_backend=which))
        assert on["attention_kernel"] == f"scaled_dot_product_{which}_attention"
        assert on["sdpa_backend"] == which
    finally:
        machine.set_sdpa_backend("any", torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["ieee", "tf32"])
def test_a_gpu_rounds_to_tf32_only_where_asked(on_a_gpu, how):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert checked(replace(on_a_gpu, fp32_precision=how))[1]["fp32_precision"] == how
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.cuda
def test_a_step_holds_the_gpu_up_only_for_its_loss_and_norm(on_a_gpu):
    """Two numbers are read back per step, and nothing else waits."""
    run = stepped(replace(on_a_gpu, dtype="bfloat16", batch_size=2), 2)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.train_step(run, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 2
