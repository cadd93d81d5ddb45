"""model.py: the mathematics, against itself written differently and against what a GPT must obey. That it is transformers'
GPT-2 is shown by tests/engine/test_pretrained.py and, for each setting, by tests/measure/test_verify.py.
"""

import math

import pytest
import torch
from trained import build

from configurator import GPTConfig
from model import ATTENTION, GPT, GPT2_SIZES, cross_entropy, naive_attention

ATTENTIONS = ["naive", "blocked", "sdpa"]


def tokens(cfg, B=2, T=None, seed=1):
    return torch.randint(cfg.vocab_size, (B, T or cfg.block_size), generator=torch.Generator().manual_seed(seed))


# ---- sizes


@pytest.mark.parametrize(
    ("changes", "count", "padding"),  # as published, without the padding rows
    [
        (GPT2_SIZES["gpt2"], 124_439_808, 0),
        (GPT2_SIZES["gpt2-medium"], 354_823_168, 0),
        (GPT2_SIZES["gpt2-large"], 774_030_080, 0),
        (GPT2_SIZES["gpt2-xl"], 1_557_611_200, 0),
        (dict(vocab_multiple=50257), 124_439_808, 0),
        (dict(vocab_multiple=128), 124_439_808, 47 * 768),
        (dict(tie_weights=False), 163_037_184, 0),
        (dict(tie_weights=False, vocab_multiple=128), 163_037_184, 2 * 47 * 768),
    ],
)
def test_n_params_counts_shared_matrices_once_and_padding_never(changes, count, padding):
    with torch.device("meta"):
        model, unbiased = GPT(GPTConfig(**changes)), GPT(GPTConfig(**changes, bias=False))
    assert model.n_params() == count
    assert sum(p.numel() for p in model.parameters()) == count + padding
    assert not [n for n, _ in unbiased.named_parameters() if n.endswith("bias")]


# ---- attention


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causality_by_gradient(attention):
    """d y[t] / d v[u] is exactly zero for u > t, and not zero for u <= t; in blocks of 20 queries, too."""
    q, k, v = (torch.randn(1, 1, 40, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y = ATTENTION[attention](q, k, v, 0.0)[0, 0]
    reach = torch.stack([torch.autograd.grad(row.sum(), v, retain_graph=True)[0][0, 0].abs().sum(1) for row in y])
    assert torch.equal(reach > 0, torch.ones(40, 40).tril().bool()), reach


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9), (1, 1), (8, 9), (40, 40), (37, 50), (300, 300)])
def test_naive_and_others_agree_in_float64_with_gradients(T, S, attention):
    """Also where the T queries are the last of S positions, as behind a cache; in one, two and three blocks, uneven too."""
    results = []
    for attend in (naive_attention, ATTENTION[attention]):
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
        y = attend(q, k, v, 0.0)
        results.append([y, *torch.autograd.grad((y * torch.randn(y.shape, generator=g, dtype=y.dtype)).sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- loss and head


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)], ids=["fp64", "fp32", "bf16"]
)
def test_cross_entropy_is_the_definition_in_at_least_float32(tiny, dtype, error):
    """log of the sum of exp(logits), minus the target's logit; the mean of all, or each. Of a model, too."""
    cfg = tiny()
    assert build(cfg, dtype=dtype)(tokens(cfg), tokens(cfg)).dtype == torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(3, 5, 65, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(65, (3, 5), generator=g)
    targets[1, 2:] = -100
    counts = targets >= 0
    exact = logits.double().logsumexp(-1) - logits.double().gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(cross_entropy(logits, targets).double(), exact[counts].mean(), rtol=0, atol=error)
    each = cross_entropy(logits, targets, reduction="none").view(targets.shape)
    torch.testing.assert_close(each.double(), exact * counts, rtol=0, atol=error)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_drops_its_share_in_all_four_places_in_training_only(tiny, attention):
    """Embeddings, attention weights (with one key, a head's whole output goes), and the ends of both branches."""
    shape = dict(attention=attention, init="pytorch")
    model, seen = build(tiny(dropout=0.3, **shape)), {}
    idx = tokens(model.cfg)
    assert torch.equal(model(idx), build(tiny(**shape))(idx))
    block = model.train().transformer.h[0]
    block.register_forward_pre_hook(lambda _m, args: seen.update(embeddings=args[0]))
    block.attn.c_proj.register_forward_pre_hook(lambda _m, args: seen.update(attention_weights=args[0]))
    block.attn.register_forward_hook(lambda _m, _i, out: seen.update(attention=out))
    block.mlp.register_forward_hook(lambda _m, _i, out: seen.update(mlp=out))
    model(tokens(model.cfg, B=2000, T=1))
    assert {k: (v == 0).float().mean().item() for k, v in seen.items()} == pytest.approx(dict.fromkeys(seen, 0.3), abs=0.05)
    assert len(seen) == 4


# ---- the padded vocabulary


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("init", ["gpt2", "pytorch"])
def test_padding_the_vocabulary_changes_nothing(tiny, tie, init):
    """Same seed: same weights, logits and loss; padding rows are zero and get no probability. Gradients: test_verify.py."""
    plain, padded = (build(tiny(tie_weights=tie, init=init, vocab_multiple=m)) for m in (1, 32))
    idx, targets = tokens(plain.cfg), tokens(plain.cfg, seed=2)
    assert padded.transformer.wte.weight.size(0) == padded.lm_head.weight.size(0) == 96
    assert padded(idx).shape == (2, 32, 65)
    torch.testing.assert_close(padded(idx), plain(idx), rtol=0, atol=1e-6)
    for (name, a), b in zip(plain.named_parameters(), padded.parameters(), strict=True):
        assert torch.equal(a, b[: a.size(0)]), name
        assert not b[a.size(0) :].any(), name
    before = padded(idx, targets).item()
    padded.lm_head.weight.data[65:] = 100.0
    assert padded(idx, targets).item() == before


# ---- initial weights


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("init", ["gpt2", "pytorch"])
def test_initial_weights_spread_as_gpt2s_or_as_pytorchs(tiny, init, tie, scale):
    """gpt2: normal(0.02), positions 0.01, biases 0. pytorch: linears uniform in ±1/sqrt(fan_in), biases alike; embeddings
    normal(1), but a tied matrix keeps the head's ±1/sqrt(C). Both: residual outputs over sqrt(2·n_layer), LayerNorm gains 1.
    """
    shape = dict(n_embd=128, vocab_size=500, block_size=64, n_layer=3)
    for name, p in build(tiny(**shape, init=init, scale_residual_init=scale, tie_weights=tie)).named_parameters():
        shrink = math.sqrt(6) if name.endswith("c_proj.weight") and scale else 1
        if "ln_" in name or (init == "gpt2" and p.dim() == 1):
            assert (p == float("ln_" in name and name.endswith("weight"))).all(), name
            continue
        bound = 1 / math.sqrt(4 * 128 if "mlp.c_proj" in name else 128) / shrink
        if init == "gpt2":
            std = (0.01 if "wpe" in name else 0.02) / shrink
        elif "wpe" in name or ("wte" in name and not tie):
            std = 1.0
        else:
            std = bound / math.sqrt(3)
            assert bound * 0.95 < p.abs().max().item() <= bound * (1 + 1e-6), name
        assert p.std().item() == pytest.approx(std, rel=0.05 if p.dim() > 1 else 0.2), name
        assert p.dim() == 1 or abs(p.mean().item()) < std / 20, name
