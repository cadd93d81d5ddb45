"""sample.py: the distribution that is drawn from, the window that moves, and what reaches the terminal."""

import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from trained import build, save_run

import sample
from base.errors import UserError
from configurator import GPTConfig
from engine import restore
from engine.pretrained import save_hf_dir
from kernels import decode
from model import GPT
from sample import SampleConfig, generate, next_distribution
from tokenizer import CharTokenizer, GPT2Tokenizer


@pytest.fixture(scope="module")
def model(tiny):
    """Random weights, large enough that the likeliest token is not in doubt by a rounding error."""
    return build(tiny(init="pytorch", block_size=8))


def draw(model: GPT, prompt: list[int], n: int, **how) -> list[list[int]]:
    """The ids of each sample."""
    return torch.stack(list(generate(model, prompt, n, **how)), dim=1).tolist()


# ---- the distribution


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The same in plain float64, for distinct logits."""
    weights = {i: math.exp((x - max(logits)) / temperature) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total, mass, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if top_p < 1.0 and kept:
            assume(abs(mass - top_p) > 1e-4)  # too near to call in float32
            if mass >= top_p:
                break
        kept.append(i)
        mass += weights[i] / total
    norm = sum(weights[i] for i in kept)
    return [weights[i] / norm if i in kept else 0.0 for i in range(len(logits))]


@given(
    st.lists(st.integers(-60, 60).map(lambda n: n / 8), min_size=1, max_size=12, unique=True),
    st.floats(0.2, 5),
    st.integers(0, 14),
    st.just(1.0) | st.floats(0.001, 0.999),
)
def test_next_distribution_is_the_definition(logits, temperature, top_k, top_p):
    expected = reference(logits, temperature, top_k, top_p)
    p = next_distribution(torch.tensor([logits, logits[::-1]]), temperature, top_k, top_p)
    torch.testing.assert_close(p, torch.tensor([expected, expected[::-1]]), rtol=0, atol=1e-5)
    assert torch.equal(p == 0, torch.tensor([expected, expected[::-1]]) == 0)


def test_equal_logits_are_settled():
    """Greedy takes the lowest id; top_k keeps k tokens, not all that tie with the k-th (bf16 logits often tie)."""
    ties = torch.zeros(2, 9)
    assert next_distribution(ties, 0, 0, 1.0).argmax(1).tolist() == [0, 0]
    for k in (1, 4):
        assert (next_distribution(ties, 1.0, k, 1.0) > 0).sum(1).tolist() == [k, k]
    assert (next_distribution(ties, 1.0, 0, 0.5) > 0).sum(1).tolist() == [5, 5]


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-40, 1.0), (1e-300, 1.0), (1.0, 1e-50), (1e-40, 1e-50), (1e300, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_settings_and_low_precision_still_give_a_distribution(temperature, top_p, dtype):
    SampleConfig(temperature=temperature, top_p=top_p)  # allows them
    p = next_distribution(torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype), temperature, 0, top_p)
    assert p.sum().item() == pytest.approx(1)
    assert p.argmax() == 1 or temperature > 1
    logits = torch.randn(3, 50257, generator=torch.Generator().manual_seed(0)).to(dtype) * 50
    assert next_distribution(logits, 0.7, 200, 0.9).sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-2)


# ---- generation


@torch.inference_mode()
def by_definition(model: GPT, prompt: list[int], n: int, temperature: float, seed: int) -> list[int]:
    """No cache: each token from all that may be seen; the window, once overfull, keeps its newer half (at least one)."""
    window, random, out = model.cfg.block_size, torch.Generator().manual_seed(seed), []
    seen = prompt[-window:]
    for _ in range(n):
        logits = model(torch.tensor([seen]))[0, -1]
        p = (logits / temperature).softmax(0) if temperature else None
        out.append((logits.argmax() if p is None else p.multinomial(1, generator=random)).item())
        seen = [*seen, out[-1]]
        if len(seen) > window:
            seen = seen[-max(1, window // 2) :]
    return out


@pytest.mark.parametrize("kv_cache", [True, False])
@pytest.mark.parametrize("attention", ["naive", "blocked", "sdpa"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 3, 8, 20])
def test_every_token_is_the_definitions_with_and_without_cache(tiny, kv_cache, attention, block_size, length):
    """Prompts shorter than, equal to and longer than the window; outputs several windows long; greedy and drawn."""
    model = build(tiny(init="pytorch", block_size=block_size, attention=attention))
    prompt = torch.randint(65, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    greedy, drawn = (by_definition(model, prompt, 35, temperature, seed=4) for temperature in (0, 0.8))
    assert len(set(drawn)) > 10
    assert draw(model, prompt, 35, temperature=0, kv_cache=kv_cache) == [greedy]
    assert draw(model, prompt, 35, top_k=1, num_samples=2, kv_cache=kv_cache) == [greedy] * 2
    assert draw(model, prompt, 35, temperature=0.8, seed=4, kv_cache=kv_cache) == [drawn]


# ---- a draft that proposes


def speculated(model: GPT, other: GPT, prompt: list[int], n: int, **how) -> tuple[list[int], sample.SpeculationStats]:
    counts = sample.SpeculationStats()
    return [int(t) for t in sample.speculate(model, other, prompt, n, counts, **how)], counts


@pytest.mark.parametrize("block_size", [3, 8, 20])
@pytest.mark.parametrize("draft_tokens", [1, 2, 5])
@pytest.mark.parametrize("prompt", [[3], list(range(30))])
def test_speculation_is_greedy_where_generate_is(model, tiny, draft_tokens, block_size, prompt):
    """Over several moves of both windows, whatever the draft's length, size and opinion; as many tokens as asked."""
    expected = draw(model, prompt, 40, temperature=0)[0]
    for seed, n in enumerate((0, 1, 2, 40, 40)):
        draft = build(tiny(init="pytorch", block_size=block_size, n_layer=1), seed)
        found, counts = speculated(model, draft, prompt, n, draft_tokens=draft_tokens, temperature=0)
        assert found == expected[:n]
        assert counts.accepted + counts.passes == n


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.5, top_k=6), dict(top_p=0.7)])
def test_speculation_has_the_models_distribution(tiny, how):
    """Chi-square over pairs of tokens, of which the first is proposed: 1,000 draws against the probabilities written out. The
    draft's own distribution must fail the same test.
    """
    n, V = 1_000, 12
    shape = dict(init="pytorch", block_size=8, vocab_size=V)
    model, draft = build(tiny(**shape)), build(tiny(**shape, n_layer=1), seed=3)
    pairs, accepted = torch.zeros(V, V), 0
    for seed in range(n):
        (a, b), counts = speculated(model, draft, [7], 2, draft_tokens=3, seed=seed, **how)
        pairs[a, b] += 1
        accepted += counts.accepted
    assert 0.1 * n < accepted < 0.9 * n  # both ways are taken

    def statistic(of: GPT) -> float:
        """How far chi-square lies from its mean, in its standard deviations; infinite if something impossible was drawn."""
        asked = dict(temperature=1.0, top_k=0, top_p=1.0) | how
        first = sample.next_distribution(of(torch.tensor([[7]]))[:, -1], **asked)[0]
        rows = [sample.next_distribution(of(torch.tensor([[7, a]]))[:, -1], **asked)[0] * first[a] for a in range(V)]
        expected = torch.stack(rows) * n
        likely = expected >= 5  # the rule of thumb for the approximation; the rest is one class
        expected, observed = (torch.cat((t[likely], t[~likely].sum().view(1))) for t in (expected, pairs))
        kept = expected > 0
        if observed[~kept].any():
            return math.inf
        x2, freedom = ((observed - expected)[kept].square() / expected[kept]).sum().item(), kept.sum().item() - 1
        return (x2 - freedom) / (2 * freedom) ** 0.5

    with torch.no_grad():
        assert abs(statistic(model)) < 4
        assert statistic(draft) > 20


# ---- the command line

TEXT = "日本 🙂 žluť ꙮ 𝔘𝔫 — ok"
CFG = GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=64, tie_weights=False)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A model folder whose greedy answer to a prompt of one token is TEXT, then <|endoftext|>: position t says token t."""
    script = [*GPT2Tokenizer().encode(TEXT), GPT2Tokenizer.end_of_text]
    assert sum("\ufffd" in GPT2Tokenizer().decode([token]) for token in script) > 10  # parts of characters
    assert len(script) < CFG.block_size
    model = GPT(CFG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(float(name == "transformer.ln_f.weight"))
        model.transformer.wpe.weight.copy_(torch.eye(64))
        for t, token in enumerate(script):
            model.lm_head.weight[token, t] = 100.0
    folder = tmp_path_factory.mktemp("parrot")
    save_hf_dir(model, folder)
    return str(folder)


@pytest.mark.parametrize("cache", [True, False])
def test_streaming_never_breaks_a_character(parrot, monkeypatch, cache):
    """Text arrives in many pieces, none of which has half a character in it."""
    pieces = []

    class Screen(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Screen())
    sample.main([parrot, "--prompt=A", "--temperature=0", f"--kv_cache={cache}"])
    assert "".join(pieces) == f"A{TEXT}\n"
    assert len([piece for piece in pieces if piece.strip()]) > 10


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt=A", "--num_samples=2"], f"--- sample 1 of 2 ---\nA{TEXT}\n--- sample 2 of 2 ---\nA{TEXT}\n"),
        ([], f"{TEXT}\n"),  # what stands before an empty prompt is not shown
        (["--prompt=A", "--max_new_tokens=1"], "A\ufffd\n"),  # a part of a character
        (["--prompt_file=FILE", "--max_new_tokens=0"], "ž\r\n\n"),
    ],
)
def test_what_is_printed_is_the_prompt_and_the_text_up_to_its_end(parrot, tmp_path, capsys, flags, expected):
    (tmp_path / "prompt.txt").write_bytes("ž\r\n".encode())
    sample.main([parrot, "--temperature=0", *(flag.replace("FILE", str(tmp_path / "prompt.txt")) for flag in flags)])
    assert capsys.readouterr().out == expected


def test_an_empty_prompt_is_end_of_text_or_a_new_line_or_the_checkpoints_own_start(parrot, run_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sample, "generate", lambda model, prompt, *_, **__: asked.append(prompt) or iter(()))
    save_run(tmp_path, *restore.load_model(run_dir), {"start": 0})
    for folder in (parrot, run_dir, str(tmp_path)):
        sample.main([folder])
    assert asked == [[50256], [1], [0]]


def test_a_long_prompt_is_shown_whole_and_said_to_be_cut(parrot, capsys):
    sample.main([parrot, "--prompt", "A " * 100, "--max_new_tokens=3"])
    shown = capsys.readouterr()
    assert shown.out.startswith("A " * 100)
    assert "its last 64 are used" in shown.err


def test_the_prompt_from_standard_input_in_any_locale(parrot, run_script):
    """The real program: UTF-8 in and out, whatever the locale says."""
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = run_script("sample.py", parrot, "--prompt", "-", "--max_new_tokens=0", input="žluť 🙂", env=env)
    assert (done.returncode, done.stdout) == (0, "žluť 🙂\n")
    assert re.fullmatch(r"computing in (bfloat16|float32) on \w+.*\n", done.stderr)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> str:
    """A run with a character tokenizer of three characters."""
    folder = tmp_path_factory.mktemp("run")
    cfg = GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=3)
    save_run(folder, build(cfg), CharTokenizer(["\t", "\n", "a"]))
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A run of a shape that the kernel takes, which has learned a sentence by heart."""
    sentence = "a small model learns one sentence by heart, and says it again and again.\n"
    tokenizer = CharTokenizer.train(sentence)
    cfg = GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=32, vocab_size=tokenizer.vocab_size)
    model, ids = build(cfg).train(), torch.tensor(tokenizer.encode(sentence * 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        idx = torch.stack([ids[start : start + 33] for start in range(step % 6, 150, 6)])
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("learned") / "run"
    save_run(folder, model, tokenizer)
    return str(folder)


def test_auto_gives_the_greedy_text_of_float32(trained, capsys):
    texts = {}
    for dtype in ("auto", "float32"):
        sample.main([trained, "--prompt=a small", f"--dtype={dtype}", "--temperature=0", "--max_new_tokens=200"])
        texts[dtype], told = capsys.readouterr()
        assert ("computing in" in told) == (dtype == "auto")
    assert texts["auto"] == texts["float32"]
    assert "sentence by heart, and says it again and again.\na small" in texts["auto"]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        (["--device=cpu"], None),
        (["--device=cpu", "--kv_cache=False"], "float32"),
        (["--device=cpu", "--draft=TRAINED"], "float32"),
        (["--quantize=int8"], "bfloat16"),
        (["--quantize=int4"], "bfloat16"),
    ],
    ids=str,
)
def test_auto_is_bfloat16_where_the_kernel_decodes_or_bits_are_fewer(trained, capsys, flags, dtype):
    fastest = "float32" if isinstance(decode.build(), str) else "bfloat16"
    sample.main([trained, "--max_new_tokens=3", *(f.replace("TRAINED", trained) for f in flags)])
    assert f"computing in {dtype or fastest} on" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--dtype=float32"], ["--kv_cache=False"]], ids=" ".join)
def test_each_of_several_samples_is_the_one_that_its_own_seed_gives_alone(trained, capsys, flags):
    """With the kernel, in a batch, and without a cache."""
    argv = [trained, "--prompt=a", "--temperature=2", "--max_new_tokens=40", *flags]
    alone = []
    for seed in (5, 6, 7):
        sample.main([*argv, f"--seed={seed}"])
        alone.append(capsys.readouterr().out)
    sample.main([*argv, "--num_samples=3", "--seed=5"])
    assert re.split(r"--- sample . of 3 ---\n", capsys.readouterr().out)[1:] == alone
    assert len(set(alone)) == 3
    assert {len(text) for text in alone} == {1 + 40 + 1}


def test_a_draft_that_is_hardly_accepted_ends_with_a_warning(trained, tmp_path, capsys):
    opposite = damaged(trained, tmp_path, lambda t: t.ln_f.weight.mul_(-1))  # the least likely token is its likeliest
    for draft, warns in {opposite: True, trained: False}.items():
        sample.main([trained, "--prompt=a", "--max_new_tokens=60", f"--draft={draft}"])
        assert ("warning: the model hardly accepts" in capsys.readouterr().err) == warns


@pytest.mark.parametrize("start", [3, -1, "a", None, True])
def test_a_start_that_is_no_token_is_refused(run_dir, tmp_path, start):
    save_run(tmp_path, *restore.load_model(run_dir), {"start": start})
    with pytest.raises(UserError, match=r"training\.json: start=.* is not one of 3 ids"):
        sample.main([str(tmp_path)])


def damaged(run: str, folder: Path, damage) -> str:
    """A copy of a run with other weights: damage(model.transformer)."""
    model, tokenizer = restore.load_model(run)
    with torch.no_grad():
        damage(model.transformer)
    save_run(folder, model, tokenizer)
    return str(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "flags",
    [["--temperature=0"], ["--num_samples=2"], ["--dtype=bfloat16"], ["--quantize=int8"], ["--draft=GOOD"]],
    ids=" ".join,
)
def test_a_model_of_nan_or_infinite_weights_is_named(tmp_path, run_dir, value, flags):
    """In every form: the weights are looked at before anything is made of them. A bad draft, too."""
    bad = damaged(run_dir, tmp_path, lambda t: t.h[0].mlp.c_fc.weight[1, 1].fill_(value))
    message = rf"{tmp_path} in \w+: transformer\.h\.0\.mlp\.c_fc\.weight has NaN or infinite values"
    with pytest.raises(UserError, match=message):
        sample.main([bad, *(f.replace("GOOD", run_dir) for f in flags)])
    with pytest.raises(UserError, match=message):
        sample.main([run_dir, f"--draft={bad}"])


@pytest.mark.parametrize("flags", [[], ["--temperature=0"], ["--num_samples=2"]], ids=" ".join)
def test_logits_that_overflow_end_in_one_line(tmp_path, run_dir, flags):
    """Every weight is finite, and so is float16's largest number: their products are not."""
    bad = damaged(run_dir, tmp_path, lambda t: [w.fill_(6e4) for w in (t.ln_f.weight, t.wte.weight)])
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        sample.main([bad, "--dtype=float16", *flags])
