"""optim.py: the schedule by its properties, AdamW against the paper's formulas in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optim
from configurator import Config
from model import GPT


@st.composite
def plans(draw, schedules=("cosine", "linear", "constant")):
    """A Config whose schedule is at least one step long, with min_lr below the peak."""
    steps = draw(st.integers(1, 200))
    peak = draw(st.floats(1e-6, 1.0))
    return Config(
        max_steps=steps,
        warmup_steps=draw(st.integers(0, steps - 1)),
        learning_rate=peak,
        min_lr=peak * draw(st.floats(0, 1)),
        schedule=draw(st.sampled_from(schedules)),
    )


@given(plans())
def test_the_schedule_rises_in_equal_steps_and_falls_to_min_lr(cfg):
    """The first step has one step's share of the peak already. Then never rising, never outside [min_lr, peak], at min_lr once
    max_steps are done, where it stays; a constant one stays at the peak.
    """
    rates = [optim.learning_rate(cfg, s) for s in range(cfg.max_steps + 50)]
    rises, falls, slack = rates[: cfg.warmup_steps], rates[cfg.warmup_steps :], 1e-12
    assert rises == pytest.approx([cfg.learning_rate * (s + 1) / cfg.warmup_steps for s in range(cfg.warmup_steps)])
    assert falls[0] == pytest.approx(cfg.learning_rate)  # the first step after it
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(falls))
    lowest = cfg.learning_rate if cfg.schedule == "constant" else cfg.min_lr
    assert falls[cfg.max_steps - cfg.warmup_steps :] == pytest.approx([lowest] * 50, abs=slack)


@given(plans(("cosine", "linear")))
def test_halfway_down_both_schedules_are_at_the_mean(cfg):
    """cos(pi/2) = 0: the cosine and the line cross there; a quarter of the way the cosine is higher by (sqrt(2)-1)/4."""
    cfg = replace(cfg, max_steps=cfg.warmup_steps + 41)
    span, from_peak = cfg.learning_rate - cfg.min_lr, cfg.warmup_steps
    assert optim.learning_rate(cfg, from_peak + 20) == pytest.approx(cfg.min_lr + span / 2)
    quarter = 0.75 if cfg.schedule == "linear" else 0.5 + math.sqrt(0.5) / 2
    assert optim.learning_rate(cfg, from_peak + 10) == pytest.approx(cfg.min_lr + span * quarter)


def built(tiny, **settings) -> tuple[GPT, torch.optim.AdamW, Config]:
    torch.manual_seed(0)
    cfg = Config(**vars(tiny()) | dict(tokens_per_step=32, learning_rate=1e-2, weight_decay=0.3) | settings)
    model = GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases start at 0: decay would not show
    return model, optim.adamw(cfg, model), cfg


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("frozen", [(), ("transformer.wpe.weight", "transformer.h.0.")])
@pytest.mark.parametrize("size", [1e-3, 1.0])  # of each number: norms far below the bound and far above it
def test_gradients_are_clipped_as_torchs_clip_grad_norm_does(tiny, fused, frozen, size):
    """By what AdamW keeps of them, for its update hardly depends on their scale. Frozen parameters have no gradient."""
    found = []
    for ours in (True, False):
        model, optimizer, _ = built(tiny, fused_adamw=fused)
        noise = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(frozen or "nothing"))
            p.grad = size * torch.randn(p.shape, generator=noise) if p.requires_grad else None
        norm = optim.gradient_norm(model) if ours else torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        if ours:
            optim.clip(model, optimizer, 2.0, norm)
        optimizer.step()
        optim.unclip(optimizer)
        moments = [optimizer.state[p]["exp_avg"].flatten() for p in model.parameters() if p.requires_grad]
        found.append((norm, torch.cat(moments)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_papers_update(tiny, fused):
    """Five steps against Loshchilov & Hutter 2019, algorithm 2, written out in float64. Matrices decay, vectors do not."""
    model, optimizer, _ = built(tiny, fused_adamw=fused, beta1=0.8, beta2=0.97)
    assert bool(optimizer.param_groups[0]["fused"]) is fused
    reference = {n: [p.detach().double(), 0.0, 0.0] for n, p in model.named_parameters()}
    noise = torch.Generator().manual_seed(1)
    for t in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=noise)
            x, m, v = reference[name]
            g = p.grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.97 * v + 0.03 * g * g
            decay = 0.3 if p.dim() == 2 else 0.0
            x = x - 1e-2 * (m / (1 - 0.8**t) / ((v / (1 - 0.97**t)).sqrt() + 1e-8) + decay * x)
            reference[name] = [x, m, v]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), reference[name][0], rtol=1e-5, atol=1e-6)
