"""kernels/decode.c against the model written out in float64, on the same weights; and when it is not used."""

import os

import pytest
import torch
from torch import Tensor

from configurator import GPTConfig
from engine import machine
from kernels import decode
from model import GPT, KVCache
from sample import DecodeState, generate
from variants import quantize

SHAPES = {
    "heads of 32": dict(n_layer=2, n_head=4, n_embd=128),
    "heads of 64, width of 5 x 64": dict(n_layer=3, n_head=5, n_embd=320),
    "one head of 192, no biases, untied": dict(n_layer=1, n_head=1, n_embd=192, bias=False, tie_weights=False),
    "padded vocabulary": dict(n_layer=2, n_head=2, n_embd=64, vocab_multiple=64),
}
COMMON = dict(block_size=48, vocab_size=301, init="pytorch")

needs_kernel = pytest.mark.skipif(isinstance(decode.build(), str), reason=f"no kernel here: {decode.build()}")


def build(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**COMMON | changes)).eval()
    with torch.no_grad():  # norms and biases that do something
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.bfloat16()


def in_float64(model: GPT) -> GPT:
    """A plain GPT of the same weights, integers multiplied out."""
    made = GPT(model.cfg).double().eval()
    state = model.state_dict()
    for name in [n for n in state if n.endswith(".integers")]:
        where = name.removesuffix(".integers")
        state[f"{where}.weight"] = state.pop(name).double() * state.pop(f"{where}.scales").double()[:, None]
        del state[f"{where}.row_sums"]
    if isinstance(model.lm_head, quantize.Int8Linear):  # no longer the embedding's
        made.lm_head.weight = torch.nn.Parameter(torch.empty_like(made.lm_head.weight))
    made.load_state_dict({name: t.double() for name, t in state.items()})
    return made


def away(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@needs_kernel
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_cache_are_the_models(shape, form):
    """As near to float64 as PyTorch's own bfloat16 is, or nearer: the kernel keeps what lies between the layers in float32."""
    model = build(**SHAPES[shape])
    if form == "int8":
        model = quantize.convert(model, "int8")
    fast = decode.wrap(model)
    assert isinstance(fast, decode.Decoder)
    idx = torch.randint(301, (1, 48), generator=torch.Generator().manual_seed(1))
    caches = [KVCache(model.cfg, 1, idx.device, torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        expected = in_float64(model)(idx)[0, 5:]
        for m, cache in zip((model, fast), caches, strict=True):
            m(idx[:, :5], cache=cache)
        plain, found = (
            torch.stack([m(idx[:, t : t + 1], cache=cache, last_only=True)[0, 0] for t in range(5, 48)]).double()
            for m, cache in zip((model, fast), caches, strict=True)
        )
    assert found.shape == expected.shape == (43, 301)  # no padding
    assert away(found, expected) < min(0.015, 1.05 * away(plain, expected))
    assert away(caches[1].k.double(), caches[0].k.double()) < 0.03
    assert away(caches[1].v.double(), caches[0].v.double()) < 0.03
    assert caches[1].length == 48


@needs_kernel
def test_a_window_that_moves_two_caches_in_turn_and_several_sequences():
    """Each token is the likeliest of the same window in float64, or ties; several sequences take the ordinary way."""
    model = build(**SHAPES["heads of 32"])
    fast, exact = decode.wrap(model), in_float64(model)
    for prompt in ([3], list(range(60))):
        past = DecodeState(exact, prompt)
        for token in generate(fast, prompt, 100, temperature=0):
            with torch.no_grad():
                logits = past.logits()[0, -1]
            assert logits[token] > logits.max() - 0.03 * logits.std()
            past.add(token[None])
    assert torch.equal(*(torch.stack(list(generate(m, [1], 5, num_samples=3, seed=1))) for m in (model, fast)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build(n_layer=1).float(), "not float32"),
        (lambda: quantize.convert(build(n_layer=1), "int4"), "Int4Linear"),
        (lambda: build(n_layer=1, n_head=2, n_embd=96), "96 and 48"),
        (lambda: build(n_layer=1, n_head=1, n_embd=320), "320 and 320"),
    ],
)
def test_what_it_cannot_decode_it_leaves_alone(make, reason):
    model = make()
    assert reason in decode.why_not(model)
    assert decode.wrap(model) is model


@needs_kernel
def test_it_is_built_once_for_this_user_alone_or_there_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, build = tmp_path / "nanoladder", decode.build.__wrapped__
    for where, name, value, reason in (
        (decode.shutil, "which", lambda name: None, "no C compiler"),
        (decode, "COMPILE", [*decode.COMPILE, "-mno-such-thing"], "cannot build decode.c: "),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(where, name, value)
            assert reason in build()
    assert not list(cache.iterdir())
    build()
    (library,) = cache.iterdir()
    assert cache.stat().st_mode & 0o077 == 0
    before = library.stat().st_mtime_ns
    build()
    assert library.stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(build(), str)


@needs_kernel
def test_loading_it_leaves_denormal_numbers_alone():
    """Libraries linked with -ffast-math turn them into zeros in the whole process."""
    list(generate(decode.wrap(build(n_layer=1, n_head=1, n_embd=64)), [0], 2))
    least = 2.0**-1074
    assert least * 1.0 > 0
    assert least + least == 2 * least
    assert (torch.tensor(1e-40) * 1.0).item() > 0


def test_compiled_code_lies_where_others_cannot_look(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back as it was
    for place, expected in (("new", str(tmp_path / "new" / "nanoladder" / "compiled")), ("file", None)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        machine.keep_compiled_code()
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == expected
    assert (tmp_path / "new" / "nanoladder").stat().st_mode & 0o077 == 0


@needs_kernel
def test_an_id_or_a_position_without_a_row_is_an_error():
    """Never a read outside the matrix, which once ended in a segmentation fault."""
    model = build(**SHAPES["padded vocabulary"])
    fast, rows = decode.wrap(model), len(model.transformer.wte.weight)
    cache = KVCache(model.cfg, 1, torch.device("cpu"), torch.bfloat16)
    for token in (-1, rows, 2**40):
        with pytest.raises(IndexError, match=f"token {token} at position 0: the model has {rows} tokens and 48 positions"):
            fast(torch.tensor([[token]]), cache=cache)
        assert cache.length == 0
    cache.length = 48
    with pytest.raises(IndexError, match="token 0 at position 48"):
        fast(torch.tensor([[0]]), cache=cache)
