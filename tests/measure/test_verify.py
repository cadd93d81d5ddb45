"""measure/verify.py: its oracle against transformers and torch in float64, and wrong lines that make it fail."""

import contextlib
import dataclasses
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import engine.run
import model
import optim
from configurator import Config
from engine import pretrained
from engine.run import Run, build
from measure import ladder, verify
from model import GPT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_run) -> Config:
    """What verify(small=True) starts from, on the tiny data set."""
    where = {name: tiny_run[name] for name in ("dataset", "data_dir", "vocab_size")}
    return replace(verify.base_config(where["data_dir"], CPU, small=True), **where)


@pytest.fixture(scope="module")
def reference(base):
    """(what to find, mean squares), from before any test tampers with the code."""
    return verify.reference_step(base)


@pytest.fixture
def verified(base, reference):
    """verified(dtype="bfloat16", …) -> the row of the base config with these toggles."""

    def check(**toggles) -> dict:
        cfg = replace(base, **toggles)
        expected, mean_squares = reference
        return verify.row(
            "a toggle", "float64", verify.tolerance(cfg), lambda: verify.compare(verify.take_steps(cfg, mean_squares), expected)
        )

    return check


# ---- the oracle


@pytest.mark.parametrize("tie", [True, False])
def test_the_reference_is_transformers_gpt2_in_float64(base, tie):
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = replace(base, tie_weights=tie)
    torch.manual_seed(0)
    ours = GPT(cfg)
    verify.fill(ours)
    sizes = dict(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, vocab_size=cfg.vocab_size)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=cfg.block_size, tie_word_embeddings=tie)).eval()
    theirs.load_state_dict(pretrained.to_hf_state(ours), strict=False)
    theirs.tie_weights()
    idx = torch.randint(cfg.vocab_size, (3, cfg.block_size), generator=torch.Generator().manual_seed(1))
    W = {name: p.detach().double() for name, p in ours.named_parameters()}
    torch.testing.assert_close(verify.reference_logits(W, cfg, idx), theirs.double()(idx).logits, rtol=0, atol=1e-10)


def test_the_reference_update_is_torchs_adamw_in_float64(base, reference):
    """Started from the same moments, decaying what the name says is a matrix."""
    expected, mean_squares = reference
    torch.manual_seed(base.seed)
    gpt = GPT(base)
    verify.fill(gpt)
    for name, p in gpt.double().named_parameters():
        before = p.detach().clone()
        is_matrix = name.endswith("weight") and ".ln_" not in name
        decay = base.weight_decay if is_matrix else 0.0
        adamw = torch.optim.AdamW([p], lr=base.learning_rate, betas=(base.beta1, base.beta2), weight_decay=decay)
        moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.full_like(p, mean_squares[name]))
        adamw.state[p] = dict(step=torch.tensor(float(verify.MOMENT_STEPS)), **moments)
        p.grad = expected.gradients[name]
        adamw.step()
        torch.testing.assert_close(p.detach() - before, expected.update[name], rtol=1e-9, atol=1e-12)


def test_the_reference_puts_everything_at_stake(base, reference):
    """Clipping acts, attention looks around, and no gradient is so small that its error would be measured against the rest."""
    expected, _ = reference
    assert expected.norm[""] > 1.2 * base.grad_clip
    assert expected.logits[""].std() > 0.5
    total = math.sqrt(sum(g.square().sum().item() for g in expected.gradients.values()))
    assert total == pytest.approx(base.grad_clip)
    rms = {name: g.square().mean().sqrt().item() for name, g in expected.gradients.items()}
    assert min(rms.values()) > 1e-2 * max(rms.values())


@pytest.mark.parametrize(
    ("found", "expected", "answer"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 5.0], [3.0, 4.0], 0.2),
        ([math.nan, 4.0], [3.0, 4.0], math.nan),
        ([math.inf, 4.0], [3.0, 4.0], math.inf),
    ],
)
def test_error_is_relative_to_the_norm_and_keeps_what_is_not_finite(found, expected, answer):
    """As the first of two tensors and as the second."""
    for order in (1, -1):
        a, b = ({k: torch.tensor(v) for k, v in list(dict(x=t, y=[1.0, 1.0]).items())[::order]} for t in (found, expected))
        assert verify.error(a, b) == pytest.approx(answer, nan_ok=True)


def test_an_error_is_the_worst_tensors_but_a_tensor_of_nothing_is_not_divided_by_nothing():
    expected = {"large": torch.full((100,), 1.0), "nothing": torch.full((4,), 1e-12)}
    found = {"large": torch.full((100,), 1.001), "nothing": torch.zeros(4)}
    assert verify.error(found, expected) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(AssertionError, match="nothing"):
        verify.error({"large": found["large"]}, expected)


# ---- what is right passes


@pytest.mark.parametrize(
    "toggles",
    [
        {},
        {"attention": "sdpa", "vocab_multiple": 128, "fused_adamw": True, "prefetch": True},
        {"batch_size": 8},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=lambda toggles: ",".join(toggles) or "base",
)
def test_a_right_toggle_passes_with_room_to_spare(verified, toggles):
    row = verified(**toggles)
    assert row["status"] == "passed"
    assert max(row["errors"].values()) < 0.7 * row["tolerance"], row
    assert set(row["errors"]) == set(verify.KINDS)


# ---- what is wrong fails


def scaled_logits(patch):
    plain = GPT.head

    def head(self, x, targets):
        logits = plain(self, x, None) * 1.02
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    patch.setattr(GPT, "head", head)


def attention_without_its_scale(patch):
    plain = model.naive_attention
    patch.setitem(model.ATTENTION, "naive", lambda q, k, v, dropout: plain(q * math.sqrt(q.size(-1)), k, v, dropout))


def attention_that_sees_the_next_token(patch):
    patch.setattr(model, "causal_mask", lambda T, S, device: torch.ones(T, S, dtype=torch.bool).tril(S - T + 1))


def matrices_that_do_not_decay(patch):
    plain = optim.adamw

    def adamw(cfg, gpt):
        optimizer = plain(cfg, gpt)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        return optimizer

    patch.setattr(optim, "adamw", adamw)


def accumulation_without_division(patch):
    def build_wrongly(cfg):
        run = build(cfg)
        run.train_model = lambda x, y: run.compiled(x, y) * run.accumulation
        return run

    patch.setattr(verify, "build", build_wrongly)


def the_same_micro_batch_twice(patch):
    plain = Run.read
    patch.setattr(Run, "read", lambda run, step, micro: plain(run, step, 0))


def a_learning_rate_off_by_a_twentieth(patch):
    plain = optim.learning_rate
    patch.setattr(optim, "learning_rate", lambda cfg, step: 1.05 * plain(cfg, step))


def nan_logits(patch):
    plain = GPT.head
    patch.setattr(GPT, "head", lambda self, x, targets: plain(self, x, targets) * (math.nan if targets is None else 1.0))


SABOTAGE = {
    scaled_logits: "logits",
    attention_without_its_scale: "logits",
    attention_that_sees_the_next_token: "logits",
    matrices_that_do_not_decay: "update",
    accumulation_without_division: "loss",
    the_same_micro_batch_twice: "gradients",
    a_learning_rate_off_by_a_twentieth: "update",
    nan_logits: "logits",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("sabotage", "kind"), SABOTAGE.items(), ids=lambda s: getattr(s, "__name__", None))
def test_a_wrong_line_fails_in_every_precision(verified, monkeypatch, sabotage, kind, dtype):
    sabotage(monkeypatch)
    row = verified(dtype=dtype)
    assert row["status"].startswith("FAILED")
    assert kind in row["status"]
    json.dumps(row, allow_nan=False)


def test_the_exact_gelu_fails(verified, monkeypatch):
    """A difference of 5e-4 at most, which float32 shows and bfloat16 could not."""
    plain = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: plain(x))
    assert verified()["status"].startswith("FAILED")


def test_gradients_that_are_not_clipped_fail(verified):
    assert verified(grad_clip=0.0)["status"] == "FAILED: gradients; update"


def test_padding_in_the_softmax_fails(verified, monkeypatch):
    def head(self, x, targets):
        logits = self.lm_head(self.transformer.ln_f(x))
        if targets is None:
            return logits[..., : self.cfg.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    monkeypatch.setattr(GPT, "head", head)
    assert verified()["status"] == "passed"
    for dtype in ("float32", "bfloat16"):
        status = verified(vocab_multiple=128, dtype=dtype)["status"]
        assert "loss" in status
        assert "the padding rows of transformer.wte.weight receive a gradient" in status


@pytest.mark.parametrize(
    ("toggles", "where", "name", "nothing"),
    [
        (dict(compile=True), engine.run, "compile_model", lambda gpt, cfg: gpt),
        (dict(prefetch=True), Run, "next_batch", Run.read),
        (dict(dtype="bfloat16"), Run, "autocast", lambda run: contextlib.nullcontext()),
    ],
    ids=["compile", "prefetch", "dtype"],
)
def test_a_toggle_that_does_nothing_fails(verified, monkeypatch, toggles, where, name, nothing):
    """Its numbers are right, of course."""
    monkeypatch.setattr(where, name, nothing)
    row = verified(**toggles)
    assert all(e <= row["tolerance"] for e in row["errors"].values())
    assert row["status"].startswith("FAILED: ")
    assert "was asked for" in row["status"]


def test_a_cache_that_forgets_fails(base, monkeypatch):
    assert verify.cached_as_uncached(base, CPU)[0]["logits"] < 1e-6
    plain = model.KVCache.append
    monkeypatch.setattr(model.KVCache, "append", lambda cache, layer, k, v: plain(cache, layer, k, v * (k.size(2) > 1)))
    errors, wrong = verify.cached_as_uncached(base, CPU)
    assert errors["logits"] > 1e-2
    assert wrong == ["the greedy tokens differ"]


def test_an_export_that_rounds_fails(base, monkeypatch):
    assert verify.exported_as_imported(base) == ({}, [])
    plain = pretrained.to_hf_state
    monkeypatch.setattr(pretrained, "to_hf_state", lambda gpt: {name: t.half() for name, t in plain(gpt).items()})
    assert verify.exported_as_imported(base)[1] == [f"tie_weights={tied}: the weights differ" for tied in (True, False)]


# ---- what is verified, and how it is told


def test_every_speed_setting_is_switched(base, monkeypatch):
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    planned = verify.plan(base, CPU, small=True)
    names = ["attention", "vocab_multiple", "batch_size", "dtype", "fp32_precision", "compile", "compile_scope"]
    for name in [*names, "fused_adamw", "reuse_memory", "prefetch", "processes"]:
        assert len({getattr(cfg, name) for cfg in planned}) > 1, name
    kept = [cfg.reuse_memory for cfg in planned]
    assert kept == sorted(kept)  # what cannot be undone comes last
    top = dataclasses.asdict(list(planned)[-1])
    last = {name: value for change in verify.rungs() for name, value in change.items()}  # a setting may change twice
    del last["fp32_precision"]  # exists on other hardware
    assert {name: top[name] for name in last} == last


@pytest.mark.slow
def test_the_whole_command_with_two_processes_and_a_compiled_run(base, monkeypatch, tmp_path):
    """All equalities and three toggles; a fourth is more than any machine has."""
    compiled = replace(base, compile=True, compile_scope="block", attention="sdpa", dtype="bfloat16", vocab_multiple=128)
    planned = {base: "plain", compiled: "compiled", replace(base, fp32_precision="tf32"): "another machine's"}
    monkeypatch.setattr(verify, "base_config", lambda *_: base)
    monkeypatch.setattr(verify, "plan", lambda *_: planned)
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    result = json.loads(json.dumps(verify.verify("unused", CPU, True, tmp_path / "rows"), allow_nan=False))
    statuses = {row["check"]: row["status"] for row in result["rows"]}
    reason = statuses.pop("another machine's")
    assert reason == "skipped: fp32_precision=tf32 does nothing here: float32 matmuls run as ieee"
    assert set(statuses.values()) == {"passed"}, statuses
    assert result["passed"] is True


def test_one_failure_is_a_failure_of_all(base, monkeypatch, tmp_path):
    """Also a crash of the compiler's kind; JSON has no number for what is not finite."""
    monkeypatch.setattr(verify, "base_config", lambda *_: base)
    monkeypatch.setattr(verify, "plan", lambda *_: {base: "plain"})
    monkeypatch.setattr(verify, "steps_in_two_processes", verify.take_steps)
    monkeypatch.setattr(verify, "cached_as_uncached", lambda *_: ({"logits": math.nan}, []))

    def crash(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(verify, "exported_as_imported", crash)
    result = verify.verify("unused", CPU, True, tmp_path / "rows")
    rows = {row["check"]: row for row in result["rows"]}
    assert rows["cached"]["errors"]["logits"] is None
    assert rows["cached"]["status"] == "FAILED: logits"
    assert rows["import -> export"]["status"] == "FAILED: RuntimeError: no such kernel"
    assert result["passed"] is False
