"""measure/verify.py: its oracle against transformers and torch in float64, and wrong lines that make it fail."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model
import optim
from configurator import Config
from engine import pretrained
from engine.run import Run
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
    expected, mean_squares = reference

    def check(**toggles) -> dict:
        cfg = replace(base, **toggles)
        return verify.row(
            "a toggle", "float64", verify.tolerance(cfg), lambda: verify.compare(verify.take_steps(cfg, mean_squares), expected)
        )

    return check


@pytest.mark.parametrize("tie", [True, False])
def test_the_reference_is_transformers_gpt2_in_float64(base, tie):
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = replace(base, tie_weights=tie)
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
    """Clipping acts, attention looks around, and no gradient is so small that its error would be measured against the rest."""
    expected, mean_squares = reference
    assert expected.norm[""] > 1.2 * base.grad_clip
    assert expected.logits[""].std() > 0.5
    rms = {name: g.square().mean().sqrt().item() for name, g in expected.gradients.items()}
    assert min(rms.values()) > 1e-2 * max(rms.values())
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


@pytest.mark.parametrize(("found", "answer"), [(4.0, 0.0), (5.0, 0.2), (math.nan, math.nan), (math.inf, math.inf)])
def test_error_is_relative_to_the_norm_and_keeps_what_is_not_finite(found, answer):
    """The worst tensor's, as the first of two and as the second; but a tensor of nothing is not divided by nothing."""
    for order in (1, -1):
        a, b = ({k: torch.tensor(v) for k, v in list(dict(x=[3.0, t], y=[1.0, 1.0]).items())[::order]} for t in (found, 4.0))
        assert verify.error(a, b) == pytest.approx(answer, nan_ok=True)
    expected = {"large": torch.full((100,), 1.0), "nothing": torch.full((4,), 1e-12)}
    a = {"large": torch.full((100,), 1.001), "nothing": torch.zeros(4)}
    assert verify.error(a, expected) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(AssertionError, match="nothing"):
        verify.error({"large": a["large"]}, expected)


def test_a_right_toggle_passes_with_room_to_spare(verified):
    fast = dict(attention="sdpa", vocab_multiple=128, fused_adamw=True, prefetch=True, batch_size=8)
    for toggles in ({}, fast, dict(dtype="bfloat16"), dict(dtype="float16")):
        row = verified(**toggles)
        assert row["status"] == "passed"
        assert max(row["errors"].values()) < 0.7 * row["tolerance"], row
        assert set(row["errors"]) == set(verify.KINDS)


def undivided(plain, cfg):
    run = plain(cfg)
    run.train_model = lambda x, y: run.compiled(x, y) * run.accumulation
    return run


SABOTAGE = {  # where, what, (the right one, its arguments) -> the wrong one, which error shows it
    "attention that sees the next token": (
        model,
        "causal_mask",
        lambda plain, T, S, device: torch.ones(T, S, dtype=torch.bool).tril(S - T + 1),
        "logits",
    ),
    "matrices that do not decay": (
        optim,
        "adamw",
        lambda plain, cfg, gpt: plain(replace(cfg, weight_decay=0.0), gpt),
        "update",
    ),
    "accumulation without division": (verify, "build", undivided, "loss"),
    "the same micro-batch twice": (Run, "read", lambda plain, run, step, micro: plain(run, step, 0), "gradients"),
    "a learning rate off by a twentieth": (optim, "learning_rate", lambda plain, *args: 1.05 * plain(*args), "update"),
    "nan logits": (GPT, "head", lambda plain, gpt, x, y: plain(gpt, x, y) * (math.nan if y is None else 1.0), "logits"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_line_fails_in_every_precision(verified, monkeypatch, name, dtype):
    owner, attribute, wrong, kind = SABOTAGE[name]
    plain = getattr(owner, attribute)
    monkeypatch.setattr(owner, attribute, lambda *args: wrong(plain, *args))
    row = verified(dtype=dtype)
    assert row["status"].startswith("FAILED")
    assert kind in row["status"]
    json.dumps(row, allow_nan=False)


def test_what_float32_alone_shows_fails(verified, monkeypatch):
    """The exact GELU differs by 5e-4 at most."""
    assert verified(grad_clip=0.0)["status"] == "FAILED: gradients; update"
    plain = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: plain(x))
    assert verified()["status"].startswith("FAILED")


def test_padding_in_the_softmax_fails(verified, monkeypatch):
    def head(self, x, targets):
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits[..., : self.cfg.vocab_size] if targets is None else model.cross_entropy(logits, targets)

    monkeypatch.setattr(GPT, "head", head)
    assert verified()["status"] == "passed"
    status = verified(vocab_multiple=128, dtype="bfloat16")["status"]
    assert "loss" in status
    assert "the padding rows of transformer.wte.weight receive a gradient" in status


def test_a_toggle_that_does_nothing_fails(verified, monkeypatch):
    """Its numbers are right, of course. Other toggles: tests/engine/test_effective.py."""
    monkeypatch.setattr(Run, "next_batch", Run.read)
    row = verified(prefetch=True)
    assert all(e <= row["tolerance"] for e in row["errors"].values())
    assert row["status"].startswith("FAILED: prefetch=True was asked for")


def test_a_cache_that_forgets_and_an_export_that_rounds_fail(base, monkeypatch):
    assert verify.cached_as_uncached(base, CPU)[0]["logits"] < 1e-6
    plain = model.KVCache.append
    monkeypatch.setattr(model.KVCache, "append", lambda cache, layer, k, v: plain(cache, layer, k, v * (k.size(2) > 1)))
    errors, wrong = verify.cached_as_uncached(base, CPU)
    assert errors["logits"] > 1e-2
    assert wrong == ["the greedy tokens differ"]
    assert verify.exported_as_imported(base) == ({}, [])
    exact = pretrained.to_hf_state
    monkeypatch.setattr(pretrained, "to_hf_state", lambda gpt: {name: t.half() for name, t in exact(gpt).items()})
    assert verify.exported_as_imported(base)[1] == [f"tie_weights={tied}: the weights differ" for tied in (True, False)]


def test_every_speed_setting_is_switched(base, monkeypatch):
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    planned = verify.plan(base, CPU, small=True)
    names = ["attention", "vocab_multiple", "batch_size", "dtype", "fp32_precision", "compile", "compile_scope"]
    for name in [*names, "fused_adamw", "reuse_memory", "prefetch", "processes"]:
        assert len({getattr(cfg, name) for cfg in planned}) > 1, name
    kept = [cfg.reuse_memory for cfg in planned]
    assert kept == sorted(kept)  # what cannot be undone comes last
    last = {name: value for change in verify.rungs() for name, value in change.items()}  # a setting may change twice
    del last["fp32_precision"]  # exists on other hardware
    assert {name: getattr(list(planned)[-1], name) for name in last} == last


def rows_of_the_command(base, monkeypatch, tmp_path, planned) -> tuple[dict, bool]:
    """({check: row}, passed) of all equalities and these toggles."""
    monkeypatch.setattr(verify, "base_config", lambda *_: base)
    monkeypatch.setattr(verify, "plan", lambda *_: planned)
    monkeypatch.setattr(ladder, "precision_that_runs", lambda how, device: "ieee")
    result = json.loads(json.dumps(verify.verify("unused", CPU, True, tmp_path / "rows"), allow_nan=False))
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == result["rows"]
    return {row["check"]: row for row in result["rows"]}, result["passed"]


@pytest.mark.slow
def test_the_whole_command_with_two_processes(base, monkeypatch, tmp_path):
    """Of one layer: the equalities see no more in two. A compiled step's numbers are tests/engine/test_effective.py's."""
    one = replace(base, n_layer=1)
    planned = {one: "plain", replace(one, fp32_precision="tf32"): "another machine's"}
    rows, passed = rows_of_the_command(one, monkeypatch, tmp_path, planned)
    reason = rows.pop("another machine's")["status"]
    assert reason == "skipped: fp32_precision=tf32 does nothing here: float32 matmuls run as ieee"
    assert {row["status"] for row in rows.values()} == {"passed"}, rows
    assert passed


def test_one_failure_is_a_failure_of_all(base, monkeypatch, tmp_path):
    """Also a crash of the compiler's kind; JSON has no number for what is not finite."""

    def crash(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(verify, "steps_in_two_processes", verify.take_steps)
    monkeypatch.setattr(verify, "cached_as_uncached", lambda *_: ({"logits": math.nan}, []))
    monkeypatch.setattr(verify, "exported_as_imported", crash)
    rows, passed = rows_of_the_command(base, monkeypatch, tmp_path, {base: "plain"})
    assert rows["cached"]["errors"]["logits"] is None
    assert rows["cached"]["status"] == "FAILED: logits"
    assert rows["import -> export"]["status"] == "FAILED: RuntimeError: no such kernel"
    assert not passed
