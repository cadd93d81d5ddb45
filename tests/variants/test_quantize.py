"""quantize.py: integers near their weights, kernels equal to plain arithmetic, a model that still says the same."""

import pytest
import torch
from torch import nn

from base.errors import UserError
from configurator import GPTConfig
from model import GPT
from variants import quantize

SIZES = dict(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=150, vocab_multiple=16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linear(out: int, width: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(width, out, bias=bias)
    made.weight.data *= torch.rand(out, 1) * 3  # rows of different sizes
    return made.to(dtype)


def test_integers_are_half_a_step_away_at_most_and_rows_of_zeros_stay_zeros():
    weight = linear(48, 96, torch.float32).weight
    integers, scales = quantize.to_int8(weight)
    assert integers.abs().amax(1).eq(127).all()  # every row uses its whole range
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    integers, scales, low = quantize.to_int4(weight)
    assert integers.max() == 15
    found = integers.unflatten(1, (3, 32)) * scales[..., None] + low[..., None]
    assert ((found.flatten(1) - weight).abs() <= scales.repeat_interleave(32, 1) * 0.5001).all()
    for form in quantize.FORMS.values():
        made = linear(32, 64, torch.float32, bias=False)
        made.weight.data[3] = 0
        assert form(made)(torch.randn(2, 64))[:, 3].abs().max() < 1e-20


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("form", quantize.FORMS)
def test_the_result_is_the_product_with_the_rounded_weights(form, kernel, dtype, monkeypatch):
    """In float64, from the integers by themselves: nothing of torch's kernel, of its packing, or of what other devices do."""
    monkeypatch.setattr(quantize, "has_kernel", lambda device: kernel)
    plain = linear(57, 96, dtype)  # an odd number of rows, as GPT-2's 50,257
    if form == "int8":
        integers, scales = quantize.to_int8(plain.weight.detach())
        weight = integers.double() * scales.to(dtype).double()[:, None]
    else:
        integers, scales, low = quantize.to_int4(plain.weight.detach())
        # the kernel adds (integer - 8) · scale to a middle, both in x's precision
        middle = (low + 8 * scales).to(dtype).double()[..., None]
        groups = integers.double().unflatten(1, (-1, quantize.GROUP)) - 8
        weight = (groups * scales.to(dtype).double()[..., None] + middle).flatten(1)
    for shape in ((1, 1), (2, 5)):
        x = torch.randn(*shape, 96).to(dtype)
        expected = x.double() @ weight.T + plain.bias.double()
        found = quantize.FORMS[form](plain)(x)
        assert found.dtype == dtype
        assert found.shape == (*shape, 57)
        assert (found.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize(("form", "near"), [("int8", 0.02), ("int4", 0.25)])
@pytest.mark.parametrize("tie", [True, False])
def test_a_converted_model_says_nearly_the_same_and_is_smaller(form, near, tie):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, tie_weights=tie, init="pytorch")).eval()
    idx = torch.randint(150, (2, 16))
    before, size, C = model(idx).detach(), quantize.bytes_per_token(model), 64
    assert size == 4 * (12 * C * C * 2 + 160 * C + 13 * C * 2 + 2 * C)  # each matrix and vector once, and no embedding
    made = quantize.convert(model, form)
    assert not [m for m in made.modules() if isinstance(m, nn.Linear)]  # everywhere
    assert 0 < (made(idx).detach() - before).norm() / before.norm() < near
    assert size / quantize.bytes_per_token(made) > {"int8": 3.0, "int4": 4.0}[form]
    assert made.transformer.wte.weight.dtype == torch.float32


def test_int4_refuses_widths_without_whole_groups():
    with pytest.raises(UserError, match=r"multiples of 32, not 40: use --quantize=int8"):
        quantize.convert(GPT(GPTConfig(**SIZES | dict(n_embd=40))), "int4")
