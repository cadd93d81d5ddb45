"""export.py and engine/pretrained.py: what is exported works in transformers unchanged, or nothing is left of it."""

import hashlib
import json

import pytest
import torch

from base.errors import UserError
from corpus import bpe
from engine import pretrained, restore
from engine.pretrained import config_to_hf, export_hf, spelled, to_hf_state
from model import GPT
from tokenizer import GPT2_MERGES, GPT2_RANKS, BPETokenizer, CharTokenizer, GPT2Tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")


def ours(tiny, seed=0, **changes):
    """A GPT of ours with every parameter random, padding rows included."""
    torch.manual_seed(seed)
    model = GPT(tiny(**changes)).eval()
    for p in model.parameters():
        p.data.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    return model


def read_by_transformers(folder):
    model, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, left over or of another shape
    return model.eval()


@torch.inference_mode()
def assert_same_logits(a, b, V, T=8, atol=1e-4):
    idx = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))
    left, right = (out if isinstance(out, torch.Tensor) else out.logits for out in (a(idx), b(idx)))
    assert left.std() > 0.1  # there is something to compare
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


# ---- export

PROSE = "The cat sat on the mat, and it's the cat's mat.  Žluť 🙂 日本\n\n\tIn 1492 \u2028 the <|user|> ran away. \n " * 5
TOKENIZERS = {
    "gpt2": GPT2Tokenizer(),
    "bpe": bpe.train([PROSE], 320),
    "bpe with special tokens": bpe.train([PROSE], 330, ("<|user|>", "<|end|>", "<|endoftext|>")),
    "bytes": BPETokenizer([]),
    "char": CharTokenizer.train(PROSE),
    "two characters": CharTokenizer(["a", "\n"]),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == "gpt2" else name for name in TOKENIZERS])
def tokenizer(request):
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return TOKENIZERS[request.param]


def no_trace_of(folder):
    return not folder.exists() and not list(folder.parent.glob(f".{folder.name}*"))


@pytest.mark.parametrize("changes", [{}, dict(tie_weights=False, vocab_multiple=64, bias=False)], ids=str)
def test_what_is_exported_works_in_transformers_as_it_is(tmp_path, tiny, tokenizer, changes):
    """The Auto classes find everything out by themselves: logits, ids, text, the end of a document."""
    model, said = ours(tiny, vocab_size=tokenizer.vocab_size, **changes), []
    difference = export_hf(model, tokenizer, tmp_path / "new" / "out", said.append)
    assert difference < 1e-4
    assert f"{difference:.1e}" in said[0]
    assert said[1].startswith("done: ")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out").eval()
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path / "new" / "out")
    assert_same_logits(theirs, model, tokenizer.vocab_size)
    assert len(encoder) == tokenizer.vocab_size
    assert theirs.config.eos_token_id == encoder.eos_token_id == tokenizer.end_of_text
    assert encoder.model_max_length == theirs.config.n_positions == 32
    texts = ["a", "a\na", "\n", "aaa \n\n a", PROSE, PROSE[7:50], "cafés don't", "", " ", "\r\n\t", "\x00\x7f\xad\xa0"]
    for text in texts:
        if not isinstance(tokenizer, CharTokenizer) or set(text) <= set(tokenizer.characters):
            if isinstance(tokenizer, BPETokenizer) and len(tokenizer.special_tokens) > 1:
                text = text.replace("<|user|>", "")  # special in theirs, text in ours
            ids = encoder.encode(text)
            assert ids == tokenizer.encode(text)
            assert encoder.decode(ids) == text
            assert encoder(text)["input_ids"] == ids  # nothing is put before or behind


@pytest.mark.parametrize("kind", ["bpe with special tokens", "gpt2"])
def test_special_tokens_are_told_apart_in_theirs(tmp_path, tiny, gpt2_files, kind):
    tokenizer = TOKENIZERS[kind]
    export_hf(ours(tiny, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out", lambda _: None)
    encoder = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for token, i in getattr(tokenizer, "special_ids", {"<|endoftext|>": 50256}).items():
        text, end = f"the{token} cat", tokenizer.encode(" cat")
        assert encoder.encode(text) == [*tokenizer.encode("the"), i, *end]
        assert encoder.decode([i, *end], skip_special_tokens=True) == " cat"


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_older_files_say_the_same(tmp_path, tiny, gpt2_files, kind):
    tokenizer = TOKENIZERS[kind]
    export_hf(ours(tiny, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out", lambda _: None)
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(PROSE) == tokenizer.encode(PROSE)


def test_gpt2s_own_files_come_out_as_openai_released_them(gpt2_files):
    files = pretrained.tokenizer_files(GPT2Tokenizer(), 1024)
    assert hashlib.sha256(files["merges.txt"]).hexdigest() == GPT2_MERGES.sha256
    assert json.loads(files["vocab.json"]) == json.loads(pretrained.gpt2_file(GPT2_RANKS))


def test_bytes_are_spelled_as_gpt2_spells_them():
    assert spelled(b" the\n") == "ĠtheĊ"
    assert spelled(b"\x00\xad") == "ĀŃ"
    assert len({spelled(bytes([byte])) for byte in range(256)}) == 256
    assert spelled("ž".encode()) == "Å¾"


def test_an_exported_gpt2_is_read_by_us_too(tmp_path, tiny, gpt2_files):
    model = ours(tiny, vocab_size=50257)
    export_hf(model, GPT2Tokenizer(), tmp_path / "out", lambda _: None)
    again, tokenizer = restore.load_model(str(tmp_path / "out"))
    assert tokenizer.encode("the cat") == GPT2Tokenizer().encode("the cat")
    assert_same_logits(again.eval(), model, 50257, atol=0)


def test_a_character_that_is_not_known_is_refused_there_too(tmp_path, tiny):
    tokenizer = TOKENIZERS["two characters"]
    export_hf(ours(tiny, vocab_size=2), tokenizer, tmp_path / "out", lambda _: None)
    with pytest.raises(Exception, match="UNK"):
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab")


def spoil_weights(monkeypatch):
    def transposed(model):
        state = to_hf_state(model)
        return state | {"transformer.h.0.attn.c_proj.weight": state["transformer.h.0.attn.c_proj.weight"].t().contiguous()}

    monkeypatch.setattr(pretrained, "to_hf_state", transposed)


def spoil_slightly(monkeypatch):
    def nudged(model):
        state = to_hf_state(model)
        return state | {"transformer.ln_f.weight": state["transformer.ln_f.weight"] * 1.001}

    monkeypatch.setattr(pretrained, "to_hf_state", nudged)


def spoil_shape(monkeypatch):
    monkeypatch.setattr(pretrained, "config_to_hf", lambda cfg: config_to_hf(cfg) | {"n_embd": 64})


def spoil_tokens(monkeypatch):
    honest = pretrained.tokenizer_files
    monkeypatch.setattr(pretrained, "tokenizer_files", lambda t, n: honest(CharTokenizer(t.characters[::-1]), n))


def spoil_tokenizer(monkeypatch):
    monkeypatch.setattr(pretrained, "tokenizer_files", lambda t, n: {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "logits differ by"),
        (spoil_slightly, "logits differ by"),
        (spoil_shape, "does not read it"),
        (spoil_tokens, "other tokens"),
        (spoil_tokenizer, "does not read it"),
    ],
)
def test_what_comes_back_as_something_else_is_refused_and_leaves_nothing(tmp_path, tiny, monkeypatch, spoil, message):
    tokenizer, said = TOKENIZERS["char"], []
    spoil(monkeypatch)
    with pytest.raises(UserError, match=message) as refusal:
        export_hf(ours(tiny, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out", said.append)
    assert "\n" not in str(refusal.value)
    assert said == []
    assert no_trace_of(tmp_path / "out")


def test_a_model_that_is_not_finite_is_refused(tmp_path, tiny):
    model = ours(tiny, vocab_size=2)
    model.transformer.wpe.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match="nan"):
        export_hf(model, TOKENIZERS["two characters"], tmp_path / "out", lambda _: None)
    assert no_trace_of(tmp_path / "out")


def test_large_logits_may_differ_by_more(tmp_path, tiny):
    """GPT-2's own reach -140, where float32 has steps of 1.5e-5."""
    model = ours(tiny, vocab_size=2)
    model.transformer.ln_f.weight.data *= 1e4
    assert 1e-4 < export_hf(model, TOKENIZERS["two characters"], tmp_path / "out", lambda _: None) < 1


def test_nothing_is_overwritten(tmp_path, tiny):
    model, tokenizer = ours(tiny, vocab_size=2), TOKENIZERS["two characters"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(UserError, match="already exists"):
            export_hf(model, tokenizer, tmp_path / name, lambda _: None)
    with pytest.raises(UserError, match="cannot write"):
        export_hf(model, tokenizer, tmp_path / "file" / "out", lambda _: None)
    (tmp_path / "empty").mkdir()
    export_hf(model, tokenizer, tmp_path / "empty", lambda _: None)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_without_transformers_it_says_so(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    said = []
    assert export_hf(ours(tiny, vocab_size=2), TOKENIZERS["two characters"], tmp_path / "out", said.append) is None
    assert "not installed" in said[0]
    assert said[1].startswith("done")


def test_a_special_token_that_is_spelled_like_another_is_refused(tmp_path, tiny):
    """No training makes such merges; a stranger's tokenizer.json may."""
    spelling, merges = b"<|endoftext|>", []
    for k, byte in enumerate(spelling[1:]):
        merges.append([spelling[0] if k == 0 else 255 + k, byte])
    tokenizer = BPETokenizer(merges)
    assert tokenizer.decode([255 + len(merges)]) == "<|endoftext|>"
    with pytest.raises(UserError, match="spelled like"):
        export_hf(ours(tiny, vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out", lambda _: None)
    assert no_trace_of(tmp_path / "out")
